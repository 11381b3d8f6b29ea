"""A running server as its operator sees it: metrics, request log, a real Prometheus, and the engine killed at last."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
import yaml
from operated import (
    FLAGS,
    MODEL,
    ONE_THREAD,
    SEQUENCES,
    Load,
    complete,
    engine_processes,
    go_on,
    programs,
    records,
    sample,
    stand_still_when,
    wait_until,
    with_tokenizer,
)
from server import Server, free_port

from maskpro_serve.metrics import sampling_period, token_range

pytestmark = [pytest.mark.alone, pytest.mark.vllm, pytest.mark.timeout(300)]

MONITORING = Path(__file__).parents[2] / "docs" / "monitoring"
KEY = "sk-key-that-must-not-be-logged"
MARKER = "prompt-that-must-not-be-logged"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
RULES = yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"][0]["rules"]


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    """A server that asks for a key and times every tenth kernel call; the module's last test kills its engine."""
    folder = tmp_path_factory.mktemp("operated")
    model = with_tokenizer(tiny["packed"], folder / "model")
    environment = {"MASKPRO_KERNEL_SAMPLING": "10", **ONE_THREAD}
    with Server(["--model", str(model), *FLAGS, "--api-key", KEY], folder / "log", environment) as running:
        yield running


def ask(server: Server, tokens: int, **options: Any):
    return complete(server.url, tokens, **options, **AUTHORIZED)


class Prometheus:
    """A Prometheus with our rules that scrapes one server every second."""

    def __init__(self, program: Path, folder: Path, target: str) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "2s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(MONITORING / "rules.yml")]
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._log = (folder / "prometheus.log").open("wb")
        flags = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        listen = f"--web.listen-address={self.url.removeprefix('http://')}"
        self._process = subprocess.Popen([program, *flags, listen], stdout=self._log, stderr=self._log)

    def query(self, expression: str) -> list[dict[str, Any]]:
        response = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=10).json()
        assert response["status"] == "success", (expression, response)
        return response["data"]["result"]

    def up(self) -> bool:
        try:
            ready = httpx.get(f"{self.url}/-/ready", timeout=10).status_code == 200  # it answers 503 before
        except httpx.TransportError:
            return False
        return ready and bool(self.query("maskpro:up == 1"))

    def active(self, alert: str) -> bool:
        """Whether the alert's condition holds; it fires when that has lasted, which promtool's tests prove."""
        alerts = httpx.get(f"{self.url}/api/v1/alerts", timeout=10).json()["data"]["alerts"]
        return alert in {one["labels"]["alertname"] for one in alerts}

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._log.close()


@pytest.fixture(scope="module")
def prometheus(server, tmp_path_factory, repository):
    found = programs(repository)
    if found is None:
        pytest.skip("no prometheus on the PATH; scripts/get_prometheus.sh fetches it")
    running = Prometheus(found[0], tmp_path_factory.mktemp("prometheus"), server.url.removeprefix("http://"))
    try:
        wait_until(running.up)
        yield running
    finally:
        running.stop()


def test_rules_by_promtool(repository):
    found = programs(repository)
    if found is None:
        pytest.skip("no promtool on the PATH; scripts/get_prometheus.sh fetches it")
    for command in (["check", "config", "prometheus.yml"], ["test", "rules", "rules_test.yml"]):
        run = subprocess.run([found[1], *command], cwd=MONITORING, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    tested = {
        case["alertname"]
        for test in yaml.safe_load((MONITORING / "rules_test.yml").read_text())["tests"]
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert tested == {rule["alert"] for rule in RULES if "alert" in rule}  # each alert is seen firing


def test_token_ranges():
    assert [token_range(tokens) for tokens in (1, 2, 8, 9, 32, 33, 128, 129)] == [
        "1", "2-8", "2-8", "9-32", "9-32", "33-128", "33-128", "129+",
    ]  # fmt: skip


def test_a_bad_sampling_period_is_named(monkeypatch):
    monkeypatch.setenv("MASKPRO_KERNEL_SAMPLING", "often")
    with pytest.raises(ValueError, match="MASKPRO_KERNEL_SAMPLING='often': expected a whole number"):
        sampling_period()


def decode_calls(metrics: str) -> dict[str, float]:
    """Timed kernel calls of one token, by pattern."""
    counts = re.findall(r'^maskpro_kernel_seconds_count\{.*pattern="(.+?)",tokens="1".*\} (.+)$', metrics, re.MULTILINE)
    return {pattern: float(count) for pattern, count in counts}


def test_metrics_say_what_runs(server):
    assert ask(server, 40).tokens == 40
    # 12 fused layers and the head a step, one call in ten: the engine's process counted them.
    wait_until(lambda: len(decode_calls(server.get("/metrics"))) == 2)
    wait_until(lambda: sum(decode_calls(server.get("/metrics")).values()) >= 45)
    metrics = server.get("/metrics")
    info = next(line for line in metrics.splitlines() if line.startswith("maskpro_model_info{"))
    assert f'model="{MODEL}",' in info
    for label in ('pattern="2:4"', 'values="bfloat16"', 'activations="float32"', 'vllm_version="', 'maskpro_version="'):
        assert label in info
    assert info.endswith(" 1.0")
    assert "/" not in info
    assert sample(metrics, "maskpro_linear_layers") == 21
    assert sample(metrics, "maskpro_kernel_threads") >= 1
    seconds, read = sample(metrics, "maskpro_kernel_seconds_sum"), sample(metrics, "maskpro_kernel_weight_bytes_total")
    assert 0 < seconds < 60
    assert read > 0
    assert "vllm:e2e_request_latency_seconds_bucket" in metrics


@pytest.mark.skipif(sys.platform != "linux", reason="spawned elsewhere")
def test_the_engine_shares_what_the_server_has_imported(server):
    (engine,) = engine_processes(server)
    memory = Path(f"/proc/{engine.pid}/smaps_rollup").read_text()
    shared = int(re.search(r"^Shared_Dirty: +(\d+) kB$", memory, re.MULTILINE)[1])
    assert shared > 50_000  # KiB; nothing, of an engine that imports for itself


def test_the_start_is_logged_in_two_lines(server):
    lines = [line for line in server.log.read_text().splitlines() if "maskpro: " in line]
    assert len(lines) == 2
    assert re.search(
        r"2:4 linear layers: 21 on cpu-\S+; 0.4 MB packed, 0.5625 of their dense bytes; \d thread", lines[0]
    )
    served = r"serving tiny: 2:4, bfloat16 values, float32 activations; KV cache [\d,]+ tokens, 0.10 GB; at most 4 seq"
    assert re.search(served, lines[1])


def test_every_request_is_one_line_and_nothing_of_it_is_told(server):
    marked = {"prompt": MARKER, "x_request_id": "mine-1"}
    started = time.monotonic()
    streamed = ask(server, 8, **marked)
    assert streamed.headers["x-request-id"] == "mine-1"
    assert ask(server, 9, stream=False, prompt=MARKER).status == 200
    assert ask(server, 40_000, prompt=MARKER).status == 400  # longer than the model takes
    wrong = complete(server.url, 8, prompt=MARKER, Authorization=f"Bearer {MARKER}", x_request_id=f"no {MARKER}")
    assert wrong.status == 401
    seen, leave = Event(), Event()

    def read_a_piece() -> None:
        with httpx.stream(
            "POST", f"{server.url}/v1/completions?key={KEY}", headers=AUTHORIZED, timeout=60,
            json={"model": MODEL, "prompt": MARKER, "max_tokens": 8000, "stream": True, "ignore_eos": True},
        ) as response:  # fmt: skip
            next(response.iter_raw())
            seen.set()
            leave.wait(60)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_a_piece)
        stand_still_when(server, lambda: seen.wait(1))  # or the front end has no time for a client that comes or leaves
        leave.set()
        reading.result()
    try:
        wait_until(lambda: "disconnected" in server.log.read_text())
    finally:
        go_on(server)
    assert httpx.get(f"{server.url}/ready").status_code == 200
    log = server.log.read_text()
    elapsed = time.monotonic() - started  # a request ends for its client before it does for the server
    assert KEY not in log
    assert MARKER not in log
    mine = next(record for record in records(log) if record["id"] == "mine-1")
    assert (mine["method"], mine["path"], mine["status"], mine["outcome"]) == (
        "POST",
        "/v1/completions",
        200,
        "completed",
    )
    assert (mine["prompt_tokens"], mine["completion_tokens"]) == (len(MARKER), 8)
    assert 0 < mine["first_byte_s"] <= mine["duration_s"] <= elapsed
    others = [(r["status"], r["outcome"], r["completion_tokens"]) for r in records(log)[records(log).index(mine) + 1 :]]
    assert others == [
        (200, "completed", 9), (400, "rejected", None), (401, "rejected", None), (200, "disconnected", None),
    ]  # fmt: skip
    assert all("ready" not in record["path"] for record in records(log))  # probes would drown the rest
    assert 'maskpro_requests_total{outcome="disconnected"} 1.0' in server.get("/metrics")


def panel_expressions() -> list[str]:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    variables = {"$__rate_interval": "10s", "$instance": ".*"}
    for name, value in variables.items():
        expressions = [expression.replace(name, value) for expression in expressions]
    assert not [expression for expression in expressions if "$" in expression]
    return expressions


def test_prometheus_has_data_for_every_panel_and_alert(server, prometheus):
    """A queue grows meanwhile, and its alert sees it."""
    load = Load(server.url, 2, 400, n=4 * SEQUENCES, **AUTHORIZED)
    stand_still_when(server, lambda: sample(server.get("/metrics"), "vllm:num_requests_waiting") > SEQUENCES)
    wait_until(lambda: prometheus.active("MaskproQueueGrowing"))
    go_on(server)
    assert {ending.tokens for ending in load.endings()} == {400 * 4 * SEQUENCES}
    wait_until(lambda: not prometheus.active("MaskproDown"))
    wait_until(lambda: prometheus.query("maskpro:tokens:rate5m > 0"))
    assert ask(server, 40).tokens == 40  # a first token that is not long ago
    time.sleep(3)  # the last scrape saw it end
    recorded = [rule["record"] for rule in RULES if "record" in rule]
    conditions = [part for rule in RULES if "alert" in rule for part in re.split(r" and | [<>=]+ ", rule["expr"])]
    quantities = {part for part in conditions if not part.replace(".", "").isdigit()}
    assert quantities <= set(recorded)  # an alert compares what is recorded, so that it can be looked at
    for expression in [*panel_expressions(), *recorded]:
        results = prometheus.query(expression)
        assert results, expression
        assert any(result["value"][1] != "NaN" for result in results), expression


def test_the_engine_is_killed_under_load(server, prometheus_or_none):
    endless = Load(server.url, 2, 32000, n=SEQUENCES, **AUTHORIZED)
    busy = "vllm:num_requests_running", "vllm:num_requests_waiting"
    stand_still_when(server, lambda: sum(sample(server.get("/metrics"), name) for name in busy) == 2 * SEQUENCES)
    killed = time.monotonic()
    for process in engine_processes(server):
        process.kill()
    endings = endless.endings()
    assert time.monotonic() - killed < 15
    assert all(ending.error for ending in endings)
    assert {ending.status for ending in endings} == {200, 500}  # streams had begun
    assert server.wait(30) == 1
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{server.url}/health")
    log = server.log.read_text()
    assert "maskpro-serve: the engine died" in log
    assert sum(record["outcome"] == "failed" for record in records(log)) == len(endings)
    if prometheus_or_none is not None:
        wait_until(lambda: prometheus_or_none.active("MaskproDown"))


@pytest.fixture
def prometheus_or_none(request, repository):
    return request.getfixturevalue("prometheus") if programs(repository) else None
