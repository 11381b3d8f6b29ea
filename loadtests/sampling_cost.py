"""What timing one kernel call in 127 costs: decode speed with and without (MASKPRO_KERNEL_SAMPLING), A B A B.

    python loadtests/sampling_cost.py [--rounds 12] [--tokens 96] [--json FILE] [--extra FLAGS ...]

Both servers are up at once and asked in turn, in the order A B, B A, so that a drift of the machine meets both alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from decode_speed import IDLE_SECONDS, ask, machine, spread
from server import Server

PERIODS = {"sampled": "127", "not sampled": "0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--extra", nargs=argparse.REMAINDER, default=[], help="flags for both servers; must be last")
    arguments = parser.parse_args()

    flags = ["--model", "sparse-llama", "--max-model-len", "1024", "--kv-cache-memory-bytes", "500M", *arguments.extra]
    logs = Path(tempfile.mkdtemp(prefix="sampling-cost-"))
    servers: dict[str, Server] = {}
    speeds: dict[str, list[float]] = {name: [] for name in PERIODS}
    try:
        for name, period in PERIODS.items():  # one after the other: two starts at once would fight for the cores
            environment = {"MASKPRO_KERNEL_SAMPLING": period}
            servers[name] = Server(flags, logs / f"{name.replace(' ', '-')}.log", environment).start()
            servers[name].wait_ready(600)
            ask(servers[name], "sparse-llama", arguments.tokens)
        for index in range(arguments.rounds):
            for name in list(PERIODS)[:: 1 if index % 2 else -1]:
                time.sleep(IDLE_SECONDS)
                speeds[name].append(ask(servers[name], "sparse-llama", arguments.tokens)[1])
        samples = next(
            line for line in servers["sampled"].get("/metrics").splitlines() if "maskpro_kernel_seconds_count" in line
        )
    finally:
        for server in servers.values():
            server.stop()

    ratios = [a / b for a, b in zip(speeds["sampled"], speeds["not sampled"], strict=True)]
    report = {
        "command": " ".join(sys.argv),
        "machine": machine(),
        "tokens_per_second": {name: spread(values) for name, values in speeds.items()},
        "sampled_over_not_sampled": spread(ratios),
        "standard_error_of_the_mean_ratio": statistics.stdev(ratios) / len(ratios) ** 0.5,
        "a_metric": samples,
    }
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
