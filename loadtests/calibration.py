"""Whether the load generator is the bottleneck: the same loads against an endpoint of known latency."""

from __future__ import annotations

import heapq
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cell import run_cell
from latency import summarize
from load_settings import LoadSettings
from server import Server

STUB = Path(__file__).with_name("stub_server.py")


@dataclass(frozen=True)
class Pace:
    """What the stub is told, in seconds: until the first token, and between tokens."""

    first_token: float = 0.2
    gap: float = 0.02

    def duration(self, tokens: int) -> float:
        return self.first_token + (tokens - 1) * self.gap


def expected_wall(pace: Pace, tokens: list[int], users: int) -> float:
    """Seconds that so many users need for answers of these lengths, each taking the next as it becomes free."""
    free = [0.0] * users
    for count in tokens:
        heapq.heapreplace(free, free[0] + pace.duration(count))
    return max(free)


def calibrate(settings: LoadSettings, pace: Pace, folder: Path) -> dict[str, Any]:
    """Runs a closed loop against the stub and compares what was measured with what is known.

    Args:
        settings: of the run, a closed loop.
        pace: of the stub.
        folder: for the stub's log and the run's records; an earlier result of the same settings is taken from there.

    Returns:
        The settings, and for throughput, time to first token (p50) and inter-token latency (mean): measured, known and
        the relative error; and the generator's share of one core. Times in seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    program = (sys.executable, str(STUB))
    arguments = ["--first-token", str(pace.first_token), "--gap", str(pace.gap)]
    with Server(arguments, folder / "stub.log", program=program) as stub:
        run = run_cell(stub.url, "stub", settings, folder / f"stub-users{settings.users}.json")
    summary = summarize([run])
    tokens = [record.completion_tokens for record in sorted(run.records, key=lambda record: record.index)]
    known = {
        "tokens_per_second": sum(tokens) / expected_wall(pace, tokens, settings.users),
        "ttft": pace.first_token,
        "itl": pace.gap,
    }
    measured = {
        "tokens_per_second": summary["tokens_per_second"],
        "ttft": summary["ttft"]["p50"],
        "itl": summary["itl"]["mean"],
    }
    return {
        "users": settings.users,
        "pace": asdict(pace),
        "requests": summary["requests"],
        "failed": summary["failed"],
        "measured": measured,
        "known": known,
        "error": {name: measured[name] / known[name] - 1 for name in known},
        "generator_cpu_share": summary["generator_cpu_share"],
    }
