"""Decode speed through the server, one client: sparse against dense, A B A B, in one run.

    python loadtests/decode_speed.py [--rounds 8] [--tokens 96] [--json FILE]

All servers are up at once, so that a drift of the machine meets them alike. They are asked in turn, each
after vLLM's processes have gone from busy-waiting to sleep. Tokens per second are counted from the first
streamed token to the last, so prefill is not in them. Before timing, every server must give the same tokens
twice.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import openai
from server import Server

PROMPT = "The history of the lighthouse begins"
DENSE_DTYPES = ("float32", "bfloat16")
IDLE_SECONDS = 2.0
"""vLLM's engine spins for a second after its last message; two servers spinning would share two cores with a third."""


def ask(server: Server, model: str, tokens: int) -> tuple[str, float]:
    """One streamed completion: its text, and decode tokens per second."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(
        model=model,
        prompt=PROMPT,
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    text, stamps, made = [], [], 0
    for chunk in stream:
        if chunk.usage is not None:
            made = chunk.usage.completion_tokens
        if chunk.choices:
            text.append(chunk.choices[0].text)
            stamps.append(time.perf_counter())
    if made != tokens or len(stamps) != tokens:
        raise SystemExit(f"{model}: expected {tokens} tokens, one to a chunk; found {made} in {len(stamps)} chunks")
    return "".join(text), (tokens - 1) / (stamps[-1] - stamps[0])


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": model,
        "cores": sum(line.startswith("processor") for line in lines),
        "python": sys.version.split()[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--dense-dtypes", nargs="+", default=DENSE_DTYPES)
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="flags for every server; must be last")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    runs = {"sparse": ["--model", "sparse-llama"]}
    runs |= {f"dense {dtype}": ["--model", "dense-llama", "--dtype", dtype] for dtype in arguments.dense_dtypes}
    common = ["--max-model-len", "1024", "--kv-cache-memory-bytes", "500M", *arguments.extra]
    logs = Path(tempfile.mkdtemp(prefix="decode-speed-"))
    servers: dict[str, Server] = {}
    try:
        for name, flags in runs.items():  # one after the other: two starts at once would fight for two cores
            servers[name] = Server([*flags, *common], logs / f"{name}.log").start()
            servers[name].wait_ready(600)
            print(f"{name}: ready after {servers[name].seconds_to_ready:.0f} s", file=sys.stderr)
        speeds: dict[str, list[float]] = {name: [] for name in servers}
        for name, server in servers.items():
            model = runs[name][1]
            if ask(server, model, arguments.tokens)[0] != ask(server, model, arguments.tokens)[0]:
                raise SystemExit(f"{name}: greedy decoding gave two different answers")
        for _ in range(arguments.rounds):
            for name, server in servers.items():
                time.sleep(IDLE_SECONDS)
                speeds[name].append(ask(server, runs[name][1], arguments.tokens)[1])
    finally:
        for server in servers.values():
            server.stop()

    best_dense = max((name for name in speeds if name != "sparse"), key=lambda name: statistics.median(speeds[name]))
    ratios = [s / d for s, d in zip(speeds["sparse"], speeds[best_dense], strict=True)]
    report = {
        "command": " ".join(sys.argv),
        "machine": machine(),
        "seconds_to_ready": {name: round(server.seconds_to_ready, 1) for name, server in servers.items()},
        "tokens_per_second": {name: spread(values) for name, values in speeds.items()},
        "best_dense": best_dense,
        "sparse_over_best_dense": spread(ratios),
    }
    print(f"{'':16} {'median':>8} {'min':>8} {'max':>8}  tokens per second, 1 client")
    for name, values in speeds.items():
        print(f"{name:16} " + " ".join(f"{value:8.1f}" for value in spread(values).values()))
    print(
        f"{'sparse / dense':16} " + " ".join(f"{value:8.2f}" for value in spread(ratios).values()) + f"  ({best_dense})"
    )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
