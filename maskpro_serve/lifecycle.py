"""Start and end of the API server: says when it is ready, and refuses new requests once it was asked to stop.

vLLM drains by itself (``--shutdown-timeout``), but meets a request that comes after SIGTERM with a stack trace and 500.
Its middleware hook (``--middleware``) takes a class by its import path, so what ``server.py`` knows reaches this one
through :data:`PROCESS`.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from maskpro_serve.loading import RETRY_AFTER_S, LoadingServer, unavailable

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

READY_PATH = "/ready"
_WHILE_STOPPING = ("/health", "/metrics", "/ping")


@dataclass
class Process:
    """What this process is doing.

    Attributes:
        loading: what answers on the port while the model loads.
        started: the API server has been ready.
        stopping: a signal asked it to stop.
    """

    loading: LoadingServer | None = None
    started: bool = False
    stopping: bool = False

    def ready(self, app: Any) -> None:
        """vLLM is about to accept requests, and has installed its signal handlers."""
        from maskpro_serve.startup import announce

        self.started = True
        announce(app.state.vllm_config)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._watch(number)
        if self.loading is not None:
            self.loading.stop()

    def _watch(self, number: int) -> None:
        # The event loop runs vLLM's handler when the signal wakes it, whatever Python's own handler is.
        previous = signal.getsignal(number)

        def stop(signum: int, frame: FrameType | None) -> None:
            self.stopping = True
            if callable(previous):
                previous(signum, frame)

        signal.signal(number, stop)


PROCESS = Process()


class Lifecycle:
    """ASGI middleware: ``/ready``, and 503 for what comes after SIGTERM.

    ``/ready`` is 200 while requests are taken, and 503 once the engine has died or the server was asked to stop.
    ``/health`` stays vLLM's: 200 as long as the engine lives, which it does while it drains.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, self._announcing(scope, send))
            return
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if PROCESS.stopping and path not in _WHILE_STOPPING:
                await _refuse(send)
                return
            if path == READY_PATH:
                scope = {**scope, "path": scope.get("root_path", "") + "/health", "raw_path": None}
        await self._app(scope, receive, send)

    @staticmethod
    def _announcing(scope: Scope, send: Send) -> Send:
        async def announce(message: Message) -> None:
            if message["type"] == "lifespan.startup.complete":
                PROCESS.ready(scope["app"])
            await send(message)

        return announce


async def _refuse(send: Send) -> None:
    body = json.dumps(unavailable("stopping", "the server is shutting down")).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", str(RETRY_AFTER_S).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})
