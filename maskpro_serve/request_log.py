"""One JSON line for every finished request: never its prompt, its answer, its query string or its headers."""

from __future__ import annotations

import json
import logging
import os
import re
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler

from maskpro_serve.lifecycle import READY_PATH, STREAM_ERRORS, App, Message, Receive, Scope, Send
from maskpro_serve.metrics import REQUESTS

FILE_VARIABLE = "MASKPRO_REQUEST_LOG"
"""A file to append to, or ``off``; unset: standard output."""
_HEADER = b"x-request-id"
_GOOD_ID = re.compile(rb"[\w.:-]{1,128}")
_PROBES = frozenset({"/health", "/metrics", "/ping", "/version", "/load", READY_PATH})
_LONGEST_PATH = 200
_USAGE = b'"usage":{'
_LONGEST_USAGE = 4096
_OUTCOMES = ("completed", "rejected", "failed", "disconnected")


@dataclass
class _Answer:
    """What is seen of a response as it passes."""

    status: int = 0
    first_byte: float | None = None
    usage: bytes = b""  # where the last one of the body begins
    error: bool = False
    complete: bool = False
    disconnected: bool = False

    def see(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            return
        body = message.get("body", b"")
        if body and self.first_byte is None:
            self.first_byte = time.monotonic()
        # Within a JSON string these quotes would be escaped: no prompt or answer can look like them.
        if (at := body.rfind(_USAGE)) >= 0:
            self.usage = body[at + len(_USAGE) - 1 :][:_LONGEST_USAGE]
        if body.startswith(STREAM_ERRORS):
            self.error = True
        self.complete = not message.get("more_body", False)

    @property
    def outcome(self) -> str:
        if self.error or (self.status >= 500 and self.status != 503):
            return "failed"
        if self.disconnected:
            return "disconnected"
        if not self.complete:
            return "failed"
        return "completed" if self.status < 400 else "rejected"

    def tokens(self) -> tuple[int | None, int | None]:
        """Prompt and completion tokens, where the response says them (a stream does if ``include_usage`` asks)."""
        try:
            usage, _ = json.JSONDecoder().raw_decode(self.usage.decode(errors="replace"))  # it may end within a letter
        except ValueError:  # none, or cut off
            return None, None
        prompt, completion = (usage.get(f"{part}_tokens") for part in ("prompt", "completion"))
        if prompt is None:  # as Anthropic and OpenAI's Responses call them
            prompt, completion = usage.get("input_tokens"), usage.get("output_tokens")
        return prompt, completion


class RequestLog:
    """ASGI middleware: gives every request an id, logs it when it ends, counts its outcome.

    The id is the client's ``X-Request-Id`` if it is a plain one (letters, digits, ``._:-``, at most 128), else a new
    one; it is vLLM's id as well, and comes back in the response. Probes are logged only when they fail.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._logger = open_log()
        for outcome in _OUTCOMES:
            REQUESTS.labels(outcome)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        scope, identifier = _with_id(scope)
        answer = _Answer()

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [(name, value) for name, value in message.get("headers", ()) if name.lower() != _HEADER]
                message = {**message, "headers": [*headers, (_HEADER, identifier)]}
            answer.see(message)
            try:
                await send(message)
            except OSError:  # the client has left; one that the application raises itself is its own
                answer.disconnected = True
                raise

        async def receiving() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not answer.complete:
                answer.disconnected = True
            return message

        try:
            await self._app(scope, receiving, sending)
        except Exception:
            if not (answer.status or answer.disconnected):
                answer.status = 500  # Starlette answers it, around all middleware
            raise
        finally:
            self._log(scope, identifier.decode(), answer, start)

    def _log(self, scope: Scope, identifier: str, answer: _Answer, start: float) -> None:
        probe = scope["path"].removeprefix(scope.get("root_path", "")) in _PROBES
        if not probe:
            REQUESTS.labels(answer.outcome).inc()
        if probe and answer.status < 400:
            return
        prompt, completion = answer.tokens()
        first_byte = None if answer.first_byte is None else round(answer.first_byte - start, 6)
        record = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": "request",
            "id": identifier,
            "method": scope["method"],
            "path": scope["path"][:_LONGEST_PATH],
            "status": answer.status or None,
            "outcome": answer.outcome,
            "duration_s": round(time.monotonic() - start, 6),
            "first_byte_s": first_byte,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
        }
        self._logger.info(json.dumps(record))


def _with_id(scope: Scope) -> tuple[Scope, bytes]:
    given = next((value for name, value in scope["headers"] if name == _HEADER), b"")
    identifier = given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex.encode()
    headers = [(name, value) for name, value in scope["headers"] if name != _HEADER]
    return {**scope, "headers": [*headers, (_HEADER, identifier)]}, identifier


def open_log() -> logging.Logger:
    """The logger of finished requests, with its handler.

    Raises:
        ValueError: the file that MASKPRO_REQUEST_LOG names cannot be written.
    """
    logger = logging.getLogger("maskpro.requests")
    logger.propagate = False
    # A logging configuration read since, as VLLM_LOGGING_CONFIG_PATH's, disables what was there and it does not name.
    logger.disabled = False
    logger.setLevel(logging.INFO)
    target = os.environ.get(FILE_VARIABLE, "")
    if not logger.handlers:
        handler: logging.Handler
        if target == "off":
            handler = logging.NullHandler()
        elif target:
            try:
                handler = WatchedFileHandler(target)
            except OSError as error:
                raise ValueError(f"{FILE_VARIABLE}={target}: {error.strerror}") from error
            # A forked engine would hold the file when it has long been rotated away.
            os.register_at_fork(after_in_child=handler.close)
        else:
            # A stream of its own: vLLM may put a prefix before what sys.stdout writes.
            handler = logging.StreamHandler(os.fdopen(os.dup(1), "w", buffering=1))
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    return logger
