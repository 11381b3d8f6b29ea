"""Start and end of the API server: says when it is ready, and refuses new requests once it was asked to stop.

vLLM drains by itself (``--shutdown-timeout``), but meets a request that comes after SIGTERM with a stack trace and 500,
and those that are not done when the time is over with the same, or not at all: it waits for them, and they for the
engine that is gone. So they are ended here, just before. Its middleware hook (``--middleware``) takes a class by its
import path, so what ``server.py`` knows reaches this one through :data:`PROCESS`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import signal
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from maskpro_serve.forked_process import ForkedContext
from maskpro_serve.freed_memory import return_freed_memory
from maskpro_serve.loading import RETRY_AFTER_S, LoadingServer, unavailable

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

READY_PATH = "/ready"
STREAM_ERRORS = (b'data: {"error"', b"event: error")
"""How a stream says that it failed, in OpenAI's and in Anthropic's way."""
_WHILE_STOPPING = ("/health", "/metrics", "/ping")
_LAST_SECONDS = 1.0
"""Of the shutdown timeout, to tell those that are not done: once the engine is killed, vLLM answers them with 500."""


@dataclass
class Process:
    """What this process is doing.

    Attributes:
        loading: what answers on the port while the model loads.
        started: the API server has been ready.
        stopping: a signal asked it to stop.
        ends_at: when the requests that are left then are ended, on the monotonic clock.
        requests: the tasks of HTTP requests under way.
        handlers: ours, by signal.
        watching: installs them again where vLLM has replaced them.
    """

    loading: LoadingServer | None = None
    started: bool = False
    stopping: bool = False
    ends_at: float = math.inf
    requests: set[asyncio.Task[Any]] = field(default_factory=set)
    handlers: dict[int, Callable[[int, FrameType | None], None]] = field(default_factory=dict)
    watching: asyncio.Task[None] | None = None

    @property
    def out_of_time(self) -> bool:
        """The shutdown timeout is over, or about to be."""
        return time.monotonic() >= self.ends_at

    def ready(self, app: Any) -> None:
        """vLLM is about to accept requests."""
        from maskpro_serve.startup import announce

        self.started = True
        if ForkedContext.end_if_waiting():
            logging.getLogger("vllm.maskpro").warning(
                "maskpro: vLLM started its engine by itself, not as the process that was forked for it"
            )
        config = app.state.vllm_config
        announce(config)
        logging.getLogger("vllm.v1.engine.async_llm").addFilter(self._is_news)
        self.watch_signals(app.state.server, max(0.0, config.shutdown_timeout - _LAST_SECONDS))
        if self.loading is not None:
            self.loading.stop()
        return_freed_memory()
        if self.stopping:  # Python has ignored what a signal raised while it loaded: within a finalizer, say
            signal.raise_signal(signal.SIGTERM)

    def watch_signals(self, server: Any, seconds: float) -> None:
        """Hears of SIGTERM and SIGINT beside vLLM, and ends what is left ``seconds`` later."""
        loop = asyncio.get_running_loop()

        def watch() -> None:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._watch(number, loop, seconds)

        async def watch_again() -> None:
            # vLLM 0.27 looks every 0.1 s whether uvicorn has started, and then installs its handlers over these.
            while not server.started:
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.2)
            watch()

        watch()
        self.watching = loop.create_task(watch_again())

    def _watch(self, number: int, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        # The event loop runs vLLM's handler when the signal wakes it, whatever Python's own handler is.
        previous = signal.getsignal(number)
        if previous is self.handlers.get(number):
            return

        def stop(signum: int, frame: FrameType | None) -> None:
            if not self.stopping:
                self.stopping = True
                self.ends_at = time.monotonic() + seconds
                loop.call_soon_threadsafe(loop.call_later, seconds, self._end_requests)
            if callable(previous):
                previous(signum, frame)

        self.handlers[number] = stop
        signal.signal(number, stop)

    def _is_news(self, record: logging.LogRecord) -> bool:
        """False for the stack trace of an engine that ended because it was asked to, with nothing left to answer.

        vLLM closes the engine's socket, then cancels the task that reads it, from another thread: on a busy machine
        the task runs between the two, and reports the engine's death as an error.
        """
        over = self.stopping and (self.out_of_time or not self.requests)
        return not (over and record.exc_info and type(record.exc_info[1]).__name__ == "EngineDeadError")

    def _end_requests(self) -> None:
        self.ends_at = min(self.ends_at, time.monotonic())  # uvloop's timers may be a millisecond early
        for task in self.requests:
            task.cancel()


PROCESS = Process()


class Lifecycle:
    """ASGI middleware: ``/ready``, 503 for what comes after SIGTERM, an error for what the drain could not finish.

    ``/ready`` is 200 while requests are taken, and 503 once the engine has died or the server was asked to stop.
    ``/health`` stays vLLM's: 200 as long as the engine lives, which it does while it drains.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, _announcing(scope, send))
        elif scope["type"] == "http":
            await self._request(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _request(self, scope: Scope, receive: Receive, send: Send) -> None:
        root = scope.get("root_path", "")
        path = scope["path"].removeprefix(root)
        if PROCESS.stopping and path not in _WHILE_STOPPING:
            await _refuse(send)
            return
        if path == READY_PATH:
            scope = {**scope, "path": root + "/health", "raw_path": None}
        task = asyncio.current_task()
        assert task is not None
        begun: Message | None = None
        broken_off = False

        async def sending(message: Message) -> None:
            nonlocal begun, broken_off
            if broken_off:
                return
            # The engine is gone, and a busy event loop has seen that before it came to _end_requests.
            if PROCESS.out_of_time and _is_failure(message):
                broken_off = True
                PROCESS.requests.discard(task)  # or _end_requests might cancel it half way
                await _break_off(begun, send)
                return
            if message["type"] == "http.response.start":
                begun = message
            await send(message)

        PROCESS.requests.add(task)
        try:
            await self._app(scope, receive, sending)
        except (asyncio.CancelledError, Exception):
            if not PROCESS.out_of_time:
                raise
            if not broken_off:
                await _break_off(begun, send)
        finally:
            PROCESS.requests.discard(task)


def _is_failure(message: Message) -> bool:
    if message["type"] == "http.response.start":
        return bool(message["status"] == 500)
    return bytes(message.get("body", b"")).startswith(STREAM_ERRORS)


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


async def _break_off(begun: Message | None, send: Send) -> None:
    """Ends a request that ran out of time: with 503, or an error event in its stream."""
    if begun is None:
        await _refuse(send)
        return
    error = {"error": unavailable("stopping", "the server shut down before the answer was complete")["error"]}
    await send({"type": "http.response.body", "body": f"data: {json.dumps(error)}\n\n".encode()})
