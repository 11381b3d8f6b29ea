"""Locust's users against a real endpoint that streams, refuses, hangs and breaks. Latencies are bounds from below."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from records import RunFile
from workloads import arrivals, make_request


def counts(stub) -> dict[str, int]:
    return json.loads(stub.get("/counts"))


def test_a_closed_loop(locust, pace):
    code, run = locust("-u", 3, "-r", 3, "--workload", "mixed", "--requests", 9, "--warmup", 1, "--seed", 5)
    assert code == 0
    assert [record.status for record in run.records] == ["ok"] * 9
    assert run.warmup_failures == 0
    by_index = {record.index: record for record in run.records}
    assert sorted(by_index) == list(range(9))
    for index, record in by_index.items():
        request = make_request("mixed", 5, index)
        assert record.shape == request.shape
        assert record.completion_tokens == request.max_tokens == 1 + len(record.gaps)
        assert record.prompt_tokens == len(f"{request.system} {request.prompt}".split())
        assert record.first_token >= pace.first_token
        assert record.total >= record.first_token + sum(record.gaps)
        assert record.total >= pace.first_token + (request.max_tokens - 1) * pace.gap  # the first chunk may come late
        assert (record.retries, record.late, record.error) == (0, 0.0, "")
    assert run.wall >= max(record.begin + record.total for record in run.records)
    assert 0 < run.cpu < run.wall
    busy = sum(record.total for record in run.records)
    assert run.wall >= busy / 3  # never more than three at once


def test_an_open_loop_keeps_to_its_arrivals(locust):
    code, run = locust("-u", 1, "--rate", 20, "--requests", 12, "--seed", 2)
    assert code == 0
    assert len(run.records) == 12
    begins = sorted(record.begin for record in run.records)
    overlapping = sum(a.begin < b.begin < a.begin + a.total for a in run.records for b in run.records if a is not b)
    assert overlapping  # it does not wait for answers
    planned = [at for at, _ in zip(arrivals(20, 2), range(12), strict=False)]
    assert all(begin >= at for begin, at in zip(begins, planned, strict=True))
    assert all(record.late >= 0 for record in run.records)


def test_retries_are_counted_apart(locust):
    code, run = locust("-u", 1, "--model", "stub-busy", "--requests", 2)
    assert code == 0
    assert all(record.status == "ok" for record in run.records)
    assert sum(record.retries for record in run.records) == 2
    assert all(record.lost > 0 for record in run.records if record.retries)
    code, run = locust("-u", 1, "--model", "stub-busy", "--requests", 2, "--retries", 0)
    assert code == 1
    assert sorted(record.status for record in run.records) == ["failed", "ok"]
    assert "HTTP 503: busy as told" in {record.error for record in run.records}


def test_retries_end(locust):
    code, run = locust("-u", 1, "--model", "stub-broken", "--requests", 1, "--retries", 1)
    assert code == 1
    (record,) = run.records
    assert (record.status, record.error, record.retries) == ("failed", "HTTP 500: broken as told", 1)


def test_timeouts_are_failures_and_hang_up(locust, stub):
    before = counts(stub).get("hung up on", 0)
    code, run = locust("-u", 2, "-r", 2, "--model", "stub-hung", "--requests", 2, "--request-timeout", 0.5)
    assert code == 1
    assert [record.status for record in run.records] == ["timeout"] * 2
    assert all(record.error == "no end within 0.5 s" and record.total >= 0.5 for record in run.records)
    assert hung_up_on(stub, before + 2)


def test_aborted_streams_reach_the_server_and_are_no_failures(locust, stub):
    before = counts(stub).get("hung up on", 0)
    code, run = locust("-u", 2, "-r", 2, "--requests", 4, "--abort-share", 1)
    assert code == 0
    assert [record.status for record in run.records] == ["aborted"] * 4
    for record in run.records:
        request = make_request("chat", 0, record.index, abort_share=1)
        assert 1 + len(record.gaps) == request.abort_after
        assert record.completion_tokens == 0
    assert hung_up_on(stub, before + 4)


def hung_up_on(stub, times: int) -> bool:
    """Whether the stub has noticed; it does so a moment after the client."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if counts(stub).get("hung up on", 0) >= times:
            return counts(stub)["hung up on"] == times
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("stub-cut", "broken stream: Incomplete response."),
        ("stub-error", "error in the stream: failed as told"),
        ("stub-short", "tokens, found 2"),
        ("stub-uncounted", "no usage in the stream"),
        ("stub-miscounted", "an event or a usage of another form: KeyError('prompt_tokens')"),
        ("nothing", "HTTP 404: The model `nothing` does not exist."),
    ],
)
def test_broken_answers_are_failures_without_retries(locust, model, error):
    code, run = locust("-u", 1, "--model", model, "--requests", 1)
    assert code == 1
    (record,) = run.records
    assert (record.status, record.retries) == ("failed", 0)
    assert error in record.error


def test_the_end_of_a_chat_is_no_token(locust):
    code, run = locust("-u", 1, "--model", "stub-apart", "--requests", 3, "--workload", "chat")
    assert code == 0
    assert [1 + len(record.gaps) for record in run.records] == [record.completion_tokens for record in run.records]


def test_servers_behind_a_path_and_a_key(stub, repository, tmp_path):
    """Two servers at one address that differ in their path; the one that is asked wants a key."""
    seen = []

    class Gateway(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers["Authorization"]))
            body = stub.get("/v1/models").encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self):
            seen.append((self.path, self.headers["Authorization"]))
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_error(401)

    with ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as gateway:
        threading.Thread(target=gateway.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{gateway.server_port}/team-b/"
        locustfile = repository / "loadtests" / "locustfile.py"
        command = [sys.executable, "-m", "locust", "-f", str(locustfile), "--headless", "--host", url, "-u", "1"]
        environment = os.environ | {"VLLM_API_KEY": "secret"}
        done = subprocess.run(
            [*command, "--requests", "1", "--records", str(tmp_path / "records.json")],
            capture_output=True, text=True, timeout=60, env=environment,
        )  # fmt: skip
        gateway.shutdown()
    assert done.returncode == 1, done.stderr
    assert seen[0] == ("/team-b/v1/models", "Bearer secret")
    assert {(path.startswith("/team-b/v1/"), key) for path, key in seen} == {(True, "Bearer secret")}
    assert len(seen) == 2
    assert "HTTP 401" in RunFile.read(tmp_path / "records.json").records[0].error


def test_rates_of_workers_are_refused(repository, free_url):
    """A worker does not know how many users it will have."""
    locustfile = repository / "loadtests" / "locustfile.py"
    command = [sys.executable, "-m", "locust", "-f", str(locustfile), "--headless", "--processes", "2", "-t", "20s"]
    done = subprocess.run(
        [*command, "--host", free_url, "--rate", "2", "--model", "stub"], capture_output=True, text=True, timeout=60
    )
    assert "--rate and --warmup are for one process" in done.stderr
    assert done.returncode == 2


def test_locust_alone(stub, pace, repository):
    """As Locust's users run it: no flags of ours, for a time; TTFT and TPOT are in its tables."""
    locustfile = repository / "loadtests" / "locustfile.py"
    command = [sys.executable, "-m", "locust", "-f", str(locustfile), "--headless", "--host", stub.url]
    done = subprocess.run([*command, "-u", "2", "-t", "2s", "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = {row["method"]: row for row in json.loads(done.stdout)}
    assert set(rows) == {"POST", "TTFT", "TPOT"}
    assert rows["POST"]["num_requests"] == rows["TTFT"]["num_requests"] > 0
    assert rows["TTFT"]["min_response_time"] >= pace.first_token * 1000


def test_an_endpoint_that_is_not_there_is_one_sentence(repository, free_url):
    locustfile = repository / "loadtests" / "locustfile.py"
    command = [sys.executable, "-m", "locust", "-f", str(locustfile), "--headless", "--host", free_url, "-t", "20s"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "expected a list of models, found none; give --model" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def free_url() -> str:
    from server import free_port

    return f"http://127.0.0.1:{free_port()}"
