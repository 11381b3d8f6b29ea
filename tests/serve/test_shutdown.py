"""What an orchestrator sees: 503 while the model loads, a drain at SIGTERM, exit code 0."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterable

import httpx
import psutil
import pytest
from operated import (
    FLAGS,
    ONE_THREAD,
    SEQUENCES,
    Load,
    complete,
    engine_processes,
    go_on,
    records,
    sample,
    stand_still,
    stand_still_when,
    wait_until,
    with_tokenizer,
)
from server import Server

pytestmark = [pytest.mark.alone, pytest.mark.vllm, pytest.mark.timeout(300)]


def answers(url: str, path: str) -> int | None:
    try:
        return httpx.get(url + path, timeout=5).status_code
    except httpx.TransportError:
        return None


def total(server: Server, names: Iterable[str]) -> float:
    metrics = server.get("/metrics")
    return sum(sample(metrics, name) for name in names)


def outcomes(log: str) -> Counter[str]:
    """How the completions ended, from the request log."""
    return Counter(record["outcome"] for record in records(log) if record["path"] == "/v1/completions")


def test_loads_serves_and_drains(tiny, tmp_path):
    model = with_tokenizer(tiny["packed"], tmp_path / "model")
    server = Server(["--model", str(model), *FLAGS, "--shutdown-timeout", "120"], tmp_path / "log", ONE_THREAD).start()
    try:
        # While it loads.
        wait_until(lambda: answers(server.url, "/ready") is not None, 120)
        loading = httpx.get(f"{server.url}/health")
        assert loading.status_code == 503
        assert loading.json()["status"] == "loading"
        assert int(loading.headers["retry-after"]) > 0
        early = complete(server.url, 4)
        assert early.status == 503
        assert "loading" in early.error
        unanswered = 0
        while (ready := answers(server.url, "/ready")) != 200:
            unanswered += ready is None
            assert server.exit_code is None
            time.sleep(0.1)
        assert unanswered == 0  # from loading to ready, nobody was refused a connection
        assert answers(server.url, "/health") == 200

        # SIGTERM while more is under way than runs at once: what waits is finished too, what comes later is refused.
        stand_still(server)
        load = Load(server.url, 2 * SEQUENCES, 2000)
        waiting = "vllm:num_requests_running", "vllm:num_requests_waiting"
        taken = *waiting, "vllm:request_success_total"
        stand_still_when(server, lambda: total(server, taken) == 2 * SEQUENCES)
        assert total(server, waiting) > 0
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: answers(server.url, "/ready") == 503)
        late = complete(server.url, 4)
        assert (late.status, late.tokens) == (503, 0)
        assert "shutting down" in late.error
        assert late.headers["connection"] == "close"
        assert answers(server.url, "/health") == 200  # the engine lives: a liveness probe must not kill it now
        go_on(server)
        endings = load.endings()
        assert [(ending.status, ending.tokens, ending.error) for ending in endings] == [(200, 2000, "")] * len(endings)
        assert server.wait(60) == 0
    finally:
        server.stop()
    log = server.log.read_text()
    assert "Traceback" not in log
    assert outcomes(log) == {"completed": len(endings), "rejected": 1}


def test_what_the_drain_cannot_finish_gets_an_error(tiny, tmp_path):
    model = with_tokenizer(tiny["packed"], tmp_path / "model")
    server = Server(["--model", str(model), *FLAGS, "--shutdown-timeout", "5"], tmp_path / "log", ONE_THREAD)
    with server:
        endless = Load(server.url, 2, 32000)
        stand_still_when(server, lambda: sample(server.get("/metrics"), "vllm:num_requests_running") == 2)
        server.send_signal(signal.SIGTERM)
        stream, whole = endless.endings()
        assert (stream.status, whole.status) == (200, 503), (stream, whole)
        assert "before the answer was complete" in stream.error
        assert "shutting down" in whole.error
        assert server.wait(60) == 0
    assert outcomes(server.log.read_text()) == {"failed": 1, "rejected": 1}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_while_loading_ends_it_and_its_engine(tiny, tmp_path, number):
    model = with_tokenizer(tiny["packed"], tmp_path / "model")
    server = Server(["--model", str(model), *FLAGS], tmp_path / "log", ONE_THREAD).start()
    try:
        wait_until(lambda: answers(server.url, "/ready") == 503, 120)
        wait_until(lambda: engine_processes(server), 120)
        engine = engine_processes(server)
        server.send_signal(number)
        assert server.wait(60) == (-number if number == signal.SIGKILL else 0)
        _, alive = psutil.wait_procs(engine, 10)
        assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
    finally:
        server.stop()
    assert "Traceback" not in server.log.read_text()
