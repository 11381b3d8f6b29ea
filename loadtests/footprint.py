"""What servers take, one after the other: memory at most until ready and while serving, time to be ready and per token.

    python loadtests/footprint.py sparse-llama dense-llama "dense-llama --dtype float32" [--json FILE]

Each argument is a model, after variables of the environment and before flags of ``maskpro-serve``, if any, as a shell
would take them ("VLLM_WORKER_MULTIPROC_METHOD=spawn sparse-llama"). Memory is that of all processes of the server,
shared pages counted once (PSS), sampled twice a second until it is ready, and read once after it has answered; pages of
a checkpoint file that is being read count, though the system may drop them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
import statistics
import sys
import tempfile
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread

from machine import machine, versions
from server import Server, ServerError
from streaming import StreamingClient, first_model
from workloads import Request

PROMPT = "The lighthouse"
TOKENS = 33
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
FLAGS = "--max-model-len 2048 --kv-cache-memory-bytes 1G"


@dataclass(frozen=True)
class Footprint:
    """Of one server; bytes and seconds."""

    ready_s: float
    peak_bytes: int
    serving_bytes: int
    s_per_token: float


def footprint(server: Server, timeout: float) -> Footprint:
    """Starts a server, has it answer a few times, one at a time, and stops it.

    Args:
        server: not started yet.
        timeout: seconds it may take to be ready.

    Raises:
        ServerError: it did not become ready, or did not answer.
    """
    server.start()
    try:
        peak = _peak_until_ready(server, timeout)
        requests = [Request(index, "footprint", "completions", "", PROMPT, TOKENS) for index in range(4)]
        with closing(StreamingClient(server.url, first_model(server.url))) as client:
            records = [client.send(request) for request in requests]
        serving = server.memory()
    finally:
        server.stop()
    for record in records:
        if record.status != "ok":
            raise ServerError(f"no answer: {record.error}\n{server.log_tail()}")
    gaps = [gap for record in records[1:] for gap in record.gaps]  # first calls allocate
    return Footprint(server.seconds_to_ready, max(peak, serving), serving, statistics.median(gaps))


def _peak_until_ready(server: Server, timeout: float) -> int:
    """The most memory it takes while it loads; later, reading it would slow down the answers that are timed."""
    peak, ready = 0, Event()

    def sample() -> None:
        nonlocal peak
        while True:
            peak = max(peak, server.memory())
            if ready.wait(0.5):
                return

    sampling = Thread(target=sample, daemon=True)
    sampling.start()
    try:
        server.wait_ready(timeout)
    finally:
        ready.set()
        sampling.join()
    return peak


def command(words: str, flags: str) -> tuple[list[str], dict[str, str]]:
    """Of "NAME=VALUE MODEL FLAGS", the arguments of a server and what to add to its environment.

    Args:
        words: as given for one server; its own flags win over those for all.
        flags: for all servers.

    Raises:
        ValueError: there is no model.
    """
    split = shlex.split(words)
    variables = list(itertools.takewhile(_ASSIGNMENT.match, split))
    if len(variables) == len(split):
        raise ValueError(f"no model in {words!r} (one that looks like NAME=VALUE: ./NAME=VALUE)")
    model, *own = split[len(variables) :]
    environment = dict(variable.split("=", 1) for variable in variables)
    return ["--model", model, *shlex.split(flags), *own], environment  # of flags that are alike the last one wins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help='a model, or "NAME=VALUE MODEL FLAGS"')
    parser.add_argument("--flags", default=FLAGS, help=f"for all servers (default '{FLAGS}')")
    parser.add_argument("--timeout", type=float, default=900, help="seconds until a server must be ready (default 900)")
    parser.add_argument("--json", type=Path, help="where the result goes as well")
    arguments = parser.parse_args()
    try:
        commands = [command(model, arguments.flags) for model in arguments.models]
    except ValueError as error:
        parser.error(str(error))
    results = []
    print(f"{'peak GiB':>9} {'serving':>8} {'ready s':>8} {'ms/token':>9}")
    for model, (given, environment) in zip(arguments.models, commands, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            found = footprint(Server(given, Path(folder) / "server.log", environment), arguments.timeout)
        results.append({"model": model, "flags": arguments.flags} | asdict(found))
        memory = f"{found.peak_bytes / 2**30:9.2f} {found.serving_bytes / 2**30:8.2f}"
        print(f"{memory} {found.ready_s:8.0f} {found.s_per_token * 1e3:9.1f}  {model}", flush=True)
    if arguments.json:
        document = {"command": sys.argv, "machine": machine(), "versions": versions(), "results": results}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
