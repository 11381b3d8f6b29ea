"""The two middlewares around an application of our own: what ends how, and what is written of it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import time
from types import SimpleNamespace

import pytest

from maskpro_serve import lifecycle
from maskpro_serve.lifecycle import Lifecycle, Process
from maskpro_serve.request_log import RequestLog, open_log

TWO_USAGES = b"".join(b'data: {"usage":{"prompt_tokens":1,"completion_tokens":%d}}\n\n' % count for count in (1, 2))
STREAM = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
SIGNALS = signal.SIGTERM, signal.SIGINT


@pytest.fixture
def process(monkeypatch):
    fresh = Process()
    monkeypatch.setattr(lifecycle, "PROCESS", fresh)
    return fresh


@pytest.fixture
def lines(monkeypatch):
    """What is logged, parsed."""
    monkeypatch.setenv("MASKPRO_REQUEST_LOG", "off")
    written: list[dict[str, object]] = []
    logger = logging.getLogger("maskpro.requests")
    handler = logging.Handler()
    handler.emit = lambda record: written.append(json.loads(record.getMessage()))
    logger.addHandler(handler)
    yield written
    logger.handlers.clear()


async def call(app, path="/v1/completions", headers=(), received=(), root="", left=False):
    """Runs one request to its end; the messages that were sent, of which a client that has left takes none."""
    sent, pending = [], list(received)

    async def receive():
        if pending:
            return pending.pop(0)
        return await asyncio.get_running_loop().create_future()

    async def send(message):
        if left:
            raise ConnectionResetError
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": list(headers), "root_path": root}
    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize("stream", [True, False])
def test_the_drain_ends_what_it_cannot_finish(process, lines, stream):
    async def run():
        begun = asyncio.Event()

        async def application(scope, receive, send):
            if stream:
                await send(STREAM)
                await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
            begun.set()
            await asyncio.get_running_loop().create_future()

        request = asyncio.ensure_future(call(RequestLog(Lifecycle(application))))
        await begun.wait()
        assert process.requests == {request}
        process.ends_at = time.monotonic() + 1e-3  # uvloop may be early
        process._end_requests()
        return await asyncio.wait_for(request, 5)

    sent = asyncio.run(run())
    assert not process.requests
    assert not sent[-1].get("more_body")
    if stream:
        assert b"before the answer was complete" in sent[-1]["body"]
    else:
        assert sent[0]["status"] == 503
    assert lines[0]["outcome"] == ("failed" if stream else "rejected")


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_the_drain_hides_that_the_engine_is_gone(process, lines, stream, late):
    """A busy event loop hears of the engine's end before it comes to end the requests."""

    async def application(scope, receive, send):
        if stream:
            await send(STREAM)
            await send({"type": "http.response.body", "body": b'data: {"error": "dead"}\n\n', "more_body": True})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        else:
            await send({**STREAM, "status": 500})
            await send({"type": "http.response.body", "body": b"dead"})

    process.ends_at = 0.0 if late else float("inf")
    sent = asyncio.run(call(RequestLog(Lifecycle(application))))
    assert (b"shut" in sent[-1]["body"]) == late
    assert (b"dead" in b"".join(message.get("body", b"") for message in sent)) != late
    assert sent[0]["status"] == (200 if stream else 503 if late else 500)
    assert lines[0]["outcome"] == ("failed" if stream or not late else "rejected")


def test_a_request_that_its_client_cancels_is_no_drain(process, lines):
    async def application(scope, receive, send):
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(call(RequestLog(Lifecycle(application))))
    assert lines[0]["outcome"] == "failed"


@pytest.mark.parametrize("late", [True, False])
def test_signals_are_heard_beside_vllm_s_handler_whenever_it_comes(process, late):
    heard = []

    async def run():
        loop = asyncio.get_running_loop()
        server = SimpleNamespace(started=False)

        def install():
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, heard.append, number)

        if not late:
            install()
        process.watch_signals(server, 5.0)
        server.started = True
        if late:
            await asyncio.sleep(0.1)
            install()
        await process.watching
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.1)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        asyncio.run(run())
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert heard == [signal.SIGTERM]
    assert process.stopping
    assert 4 < process.ends_at - time.monotonic() < 5


@pytest.mark.vllm
def test_an_engine_that_was_asked_to_end_is_no_error(process):
    dead = pytest.importorskip("vllm.v1.engine.exceptions").EngineDeadError

    def is_written(error):
        record = logging.LogRecord("engine", logging.ERROR, __file__, 1, "failed", None, (type(error), error, None))
        return process._is_news(record)

    assert is_written(dead())
    process.stopping = True
    assert not is_written(dead())
    assert is_written(ValueError())
    assert process._is_news(logging.LogRecord("engine", logging.INFO, __file__, 1, "a line", None, None))
    process.requests.add(object())
    assert is_written(dead())  # something is left to answer: it died early
    process.ends_at = 0.0  # the drain's time is over, and what is left is told so
    assert not is_written(dead())


@pytest.mark.parametrize(("path", "refused"), [("/v1/models", True), ("/ready", True), ("/metrics", False)])
def test_new_requests_are_refused_while_stopping(process, lines, path, refused):
    async def application(scope, receive, send):
        await send({**STREAM, "status": 204})
        await send({"type": "http.response.body"})

    process.stopping = True
    sent = asyncio.run(call(RequestLog(Lifecycle(application)), path))
    assert sent[0]["status"] == (503 if refused else 204)
    assert ((b"connection", b"close") in sent[0]["headers"]) == refused


@pytest.mark.parametrize("stopping", [False, True])
def test_paths_under_a_root(process, lines, stopping):
    """Probes and metrics are known below it as well; a probe that is answered is no line in the log."""
    asked = []

    async def application(scope, receive, send):
        asked.append(scope["path"])
        await send({**STREAM, "status": 200})
        await send({"type": "http.response.body"})

    process.stopping = stopping
    for path in ("/below/ready", "/below/metrics", "/below/v1/models"):
        asyncio.run(call(RequestLog(Lifecycle(application)), path, root="/below"))
    expected = ["/below/health", "/below/metrics", "/below/v1/models"]
    assert asked == (expected[1:2] if stopping else expected)
    assert [line["path"] for line in lines] == (["/below/ready"] if stopping else []) + ["/below/v1/models"]


def test_a_log_file_is_gone_on_with(process, monkeypatch, tmp_path):
    """Over a restart, and after a rotation in a new file."""
    path = tmp_path / "requests.jsonl"
    path.write_text("before\n")
    monkeypatch.setenv("MASKPRO_REQUEST_LOG", str(path))

    async def application(scope, receive, send):
        await send(STREAM)
        await send({"type": "http.response.body"})

    logger = logging.getLogger("maskpro.requests")
    monkeypatch.setattr(logger, "handlers", [])  # without pytest's
    open_log()
    monkeypatch.setattr(logger, "disabled", True)  # as logging.config does to what its configuration does not name
    log = RequestLog(application)
    (handler,) = logger.handlers
    asyncio.run(call(log, "/first"))
    path.rename(tmp_path / "rotated")
    asyncio.run(call(log, "/" + "x" * 10_000))
    handler.close()
    before, first = (tmp_path / "rotated").read_text().splitlines()
    assert (before, json.loads(first)["path"]) == ("before", "/first")
    assert set(json.loads(path.read_text())["path"][1:]) == {"x"}
    assert len(path.read_text()) < 2000


def test_a_client_that_leaves_while_it_is_written_to(process, lines):
    async def application(scope, receive, send):
        await send(STREAM)

    with pytest.raises(ConnectionResetError):
        asyncio.run(call(RequestLog(application), left=True))
    assert lines[0]["outcome"] == "disconnected"


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("error", [ConnectionRefusedError, RuntimeError])
def test_what_the_application_raises_is_its_own_failure(process, lines, started, error):
    """An image that cannot be fetched, for one: no handler of vLLM's takes it."""

    async def application(scope, receive, send):
        if started:
            await send(STREAM)
        raise error

    with pytest.raises(error):
        asyncio.run(call(RequestLog(application)))
    assert (lines[0]["status"], lines[0]["outcome"]) == (200 if started else 500, "failed")


def test_a_client_that_leaves_before_its_request_was_read(process, lines):
    async def application(scope, receive, send):
        if (await receive())["type"] == "http.disconnect":
            raise RuntimeError("Starlette has an exception for it")

    with pytest.raises(RuntimeError):
        asyncio.run(call(RequestLog(application), received=[{"type": "http.disconnect"}]))
    assert (lines[0]["status"], lines[0]["outcome"]) == (None, "disconnected")


@pytest.mark.parametrize(
    ("given", "kept"),
    [(b"abc-1:2.3_4", True), (b"two words", False), (b"x" * 129, False), (b"\xff", False), (b"", False)],
)
def test_ids(process, lines, given, kept):
    seen = []

    async def application(scope, receive, send):
        seen.extend(value for name, value in scope["headers"] if name == b"x-request-id")
        await send({**STREAM, "headers": [(b"X-Request-Id", b"another")]})
        await send({"type": "http.response.body"})

    sent = asyncio.run(call(RequestLog(application), headers=[(b"x-request-id", given)]))
    returned = [value for name, value in sent[0]["headers"] if name.lower() == b"x-request-id"]
    assert returned == seen == [str(lines[0]["id"]).encode()]
    assert (returned == [given]) == kept
    assert kept or len(returned[0]) == 32


@pytest.mark.parametrize(
    ("pieces", "tokens", "outcome"),
    [
        ([b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}'], (3, 4), "completed"),
        ([b'data: {"usage":{"prompt_tokens":5,"completion_tokens":6}}\n\n', b"data: [DONE]\n\n"], (5, 6), "completed"),
        ([b'data: {"text":"\\"usage\\":{\\"prompt_tokens\\":1}"}\n\n'], (None, None), "completed"),
        ([b'{"usage":{"prompt_tokens":'], (None, None), "completed"),
        (
            [b'{"data":"' + b"x" * 100_000 + b'","usage":{"prompt_tokens":7,"completion_tokens":0}}'],
            (7, 0),
            "completed",
        ),
        ([b'{"usage":{"prompt_tokens":3,"completion_tokens":4},"x":"' + 5000 * "é".encode()], (3, 4), "completed"),
        ([b'{"usage":{"prompt_tokens":3,"completion_tokens":4},"xx":"' + 5000 * "é".encode()], (3, 4), "completed"),
        ([b'event: message_delta\ndata: {"usage":{"input_tokens":8,"output_tokens":9}}\n\n'], (8, 9), "completed"),
        ([b'data: {"response":{"usage":{"input_tokens":1,"details":{},"output_tokens":2}}}'], (1, 2), "completed"),
        ([TWO_USAGES], (1, 2), "completed"),
        ([b'data: {"text":"a"}\n\n', b'data: {"error":{"message":"dead"}}\n\n'], (None, None), "failed"),
        ([b"event: ping\ndata: {}\n\n", b'event: error\ndata: {"type":"error"}\n\n'], (None, None), "failed"),
    ],
)
def test_tokens_and_errors_are_read_from_the_answer(process, lines, pieces, tokens, outcome):
    async def application(scope, receive, send):
        await send(STREAM)
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})

    asyncio.run(call(RequestLog(application)))
    assert (lines[0]["prompt_tokens"], lines[0]["completion_tokens"]) == tokens
    assert lines[0]["outcome"] == outcome


def test_a_client_that_leaves(process, lines):
    async def application(scope, receive, send):
        await send(STREAM)
        assert (await receive())["type"] == "http.disconnect"

    asyncio.run(call(RequestLog(application), received=[{"type": "http.disconnect"}]))
    assert lines[0]["outcome"] == "disconnected"


def test_a_signal_that_loading_has_swallowed_is_sent_again(process, monkeypatch):
    heard: list[int] = []
    monkeypatch.setattr("maskpro_serve.startup.announce", lambda config: None)
    before = [signal.signal(number, lambda number, frame: heard.append(number)) for number in SIGNALS]

    async def start(stopping: bool) -> None:
        process.stopping = stopping
        state = SimpleNamespace(vllm_config=SimpleNamespace(shutdown_timeout=1), server=SimpleNamespace(started=True))
        process.ready(SimpleNamespace(state=state))
        process.watching.cancel()

    try:
        asyncio.run(start(stopping=False))
        assert heard == []
        asyncio.run(start(stopping=True))
        assert heard == [signal.SIGTERM]
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
