"""What servers take, one after the other: memory at most and while serving, time to be ready, time per token.

    python loadtests/footprint.py sparse-llama dense-llama "dense-llama --dtype float32" [--json FILE]

Each argument is a model, with flags of ``maskpro-serve`` if any. Memory is that of all processes of the server, shared
pages counted once (PSS), sampled twice a second from its start on; pages of a checkpoint file that is being read count,
though the system may drop them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread

from machine import machine, versions
from server import Server

FLAGS = "--max-model-len 2048 --kv-cache-memory-bytes 1G"
TOKENS = 32


@dataclass(frozen=True)
class Footprint:
    """Of one server; bytes and seconds."""

    arguments: str
    ready_s: float
    peak_bytes: int
    serving_bytes: int
    s_per_token: float


def footprint(arguments: str, log: Path, timeout: float) -> Footprint:
    """Starts a server, has it answer, and stops it.

    Args:
        arguments: model and flags, as a shell would read them.
        log: file that takes the server's output.
        timeout: seconds it may take to be ready.

    Raises:
        ServerError: it did not become ready.
    """
    model, *flags = shlex.split(arguments)
    server = Server(["--model", model, *flags], log)
    peak, done = 0, Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.5):
            peak = max(peak, server.memory())

    sampling = Thread(target=sample, daemon=True)
    server.start()
    try:
        sampling.start()
        server.wait_ready(timeout)
        served = json.loads(server.get("/v1/models"))["data"][0]["id"]
        complete(server.url, served, 1)  # not counted: first calls allocate
        first = min(complete(server.url, served, 1) for _ in range(3))
        whole = min(complete(server.url, served, 1 + TOKENS) for _ in range(3))
        serving = server.memory()
    finally:
        done.set()
        sampling.join()
        server.stop()
    return Footprint(arguments, server.seconds_to_ready, max(peak, serving), serving, (whole - first) / TOKENS)


def complete(url: str, model: str, tokens: int) -> float:
    """Seconds of one completion of this many tokens."""
    body = {"model": model, "prompt": "The lighthouse", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    begin = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as response:
        found = json.load(response)["usage"]["completion_tokens"]
    seconds = time.perf_counter() - begin
    if found != tokens:
        raise SystemExit(f"footprint.py: {model}: expected {tokens} tokens, found {found}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help='a model, or "MODEL FLAGS"')
    parser.add_argument("--flags", default=FLAGS, help=f"for all servers (default '{FLAGS}')")
    parser.add_argument("--timeout", type=float, default=900, help="seconds until a server must be ready (default 900)")
    parser.add_argument("--json", type=Path, help="where the result goes as well")
    arguments = parser.parse_args()
    results = []
    print(f"{'peak GiB':>9} {'serving':>8} {'ready s':>8} {'ms/token':>9}")
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            found = footprint(f"{model} {arguments.flags}", Path(folder) / "server.log", arguments.timeout)
        results.append(asdict(found))
        memory = f"{found.peak_bytes / 2**30:9.2f} {found.serving_bytes / 2**30:8.2f}"
        print(f"{memory} {found.ready_s:8.0f} {found.s_per_token * 1e3:9.1f}  {model}", flush=True)
    if arguments.json:
        document = {"command": sys.argv, "machine": machine(), "versions": versions(), "results": results}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
