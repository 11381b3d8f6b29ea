"""The report's tables and sentences, from its numbers; markdown and HTML print the same ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from summary import THROUGHPUT

Summary = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table; its first ``text`` columns are words, the rest numbers."""

    title: str
    head: list[str]
    rows: list[list[str]]
    text: int = 2
    note: str = ""

    def markdown(self) -> str:
        rule = ["---"] * self.text + ["---:"] * (len(self.head) - self.text)
        lines = [
            f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
            for row in (self.head, rule, *self.rows)
        ]
        return "\n".join([f"## {self.title}", "", *([self.note, ""] if self.note else []), *lines])


def tables(summary: Summary) -> list[Table]:
    found = [measured(summary), ratios(summary), requests(summary), endpoints(summary)]
    if summary["calibration"]:
        found.append(calibration(summary))
    return [*found, machine(summary)]


def headline(summary: Summary) -> str:
    """One sentence: throughput where it was measured, else inter-token latency."""
    first, second = summary["first"], summary["second"]
    closed = [load for load in summary["loads"] if load["users"]]
    if closed:
        parts = [f"{load['ratios'][THROUGHPUT]['ratio']:.2f} with {load['label']}" for load in closed]
        return f"Output tokens per second, times those of {second}: {first} {', '.join(parts)}."
    parts = [f"{load['ratios']['ITL p50']['ratio']:.2f} at {load['label']}" for load in summary["loads"]]
    return f"Inter-token latency (p50), times better than {second}: {first} {', '.join(parts)}."


def measured(summary: Summary) -> Table:
    rows = []
    for load in summary["loads"]:
        for name, side in load["endpoints"].items():
            rows.append(
                [
                    f"{load['label']}, {load['workload']}",
                    name,
                    f"{side['tokens_per_second']:.1f}",
                    *(f"{side['ttft'][p] * 1000:.0f}" for p in ("p50", "p90", "p99")),
                    *(f"{side['itl'][p] * 1000:.1f}" for p in ("p50", "p90", "p99")),
                    f"{side['e2e']['p50']:.2f}",
                    f"{side['e2e']['p99']:.2f}",
                ]
            )
    head = ["load", "endpoint", "tokens/s", "TTFT p50", "p90", "p99", "ITL p50", "p90", "p99", "end to end p50", "p99"]
    return Table("Throughput and latency", head, rows, note="TTFT and ITL in ms, end to end in s; all rounds together.")


def ratios(summary: Summary) -> Table:
    names = list(dict.fromkeys(name for load in summary["loads"] for name in load["ratios"]))
    rows = [
        [f"{load['label']}, {load['workload']}", *(_interval(load["ratios"].get(name)) for name in names)]
        for load in summary["loads"]
    ]
    note = (
        f"How many times as good {summary['first']} is: more tokens per second, less latency. In brackets 95% "
        f"bootstrap intervals over {summary['rounds']} rounds and the requests in each."
    )
    return Table(f"{summary['first']} against {summary['second']}", ["load", *names], rows, text=1, note=note)


def _interval(ratio: dict[str, float] | None) -> str:
    return f"{ratio['ratio']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else ""


def requests(summary: Summary) -> Table:
    keys = ("requests", "ok", "failed", "timeouts", "aborted", "retries", "prompt_tokens", "completion_tokens")
    rows = [
        [
            f"{load['label']}, {load['workload']}",
            name,
            *(str(side[key]) for key in keys),
            f"{side['tokens_per_chunk']:.2f}",
            f"{side['late_seconds_max'] * 1000:.0f}",
            f"{side['generator_cpu_share']:.1%}",
        ]
        for load in summary["loads"]
        for name, side in load["endpoints"].items()
    ]
    note = (
        "Tokens as the server counts them. A retry is an attempt before the one that was answered, and no failure; "
        "an aborted stream was hung up on by the client. Late: the most that a request was sent after its planned "
        "arrival, in ms. Load generator: share of one core."
    )
    head = ["load", "endpoint", *(key.replace("_", " ") for key in keys), "tokens per chunk", "late", "load generator"]
    return Table("Requests", head, rows, note=note)


def endpoints(summary: Summary) -> Table:
    rows = [
        [
            each["name"],
            each["description"],
            each.get("version", ""),
            f"{each['seconds_to_ready']:.0f}" if "seconds_to_ready" in each else "",
            f"{each['memory_bytes'] / 2**30:.2f}" if "memory_bytes" in each else "",
        ]
        for each in summary["endpoints"]
    ]
    head = ["endpoint", "what", "version", "ready after, s", "memory, GiB"]
    note = "Memory: of all processes of the server after the last run, shared pages counted once."
    return Table("Endpoints", head, rows, text=3, note=note)


def calibration(summary: Summary) -> Table:
    rows = [
        [
            f"{each['users']} user{'s' if each['users'] > 1 else ''}",
            *(
                f"{each['measured'][key] * unit:.{digits}f} ({each['error'][key]:+.1%})"
                for key, unit, digits in (("tokens_per_second", 1, 1), ("ttft", 1000, 1), ("itl", 1000, 2))
            ),
            f"{each['known']['tokens_per_second']:.1f}",
            f"{each['known']['ttft'] * 1000:.0f}",
            f"{each['known']['itl'] * 1000:.0f}",
            str(each["failed"]),
            f"{each['generator_cpu_share']:.1%}",
        ]
        for each in summary["calibration"]
    ]
    head = ["load", "tokens/s (error)", "TTFT p50, ms (error)", "ITL mean, ms (error)", "known tokens/s", "known TTFT",
            "known ITL", "failed", "load generator"]  # fmt: skip
    note = "The same loads against loadtests/stub_server.py, which answers at a known pace: what is not the server's."
    return Table("The load generator itself", head, rows, text=1, note=note)


def machine(summary: Summary) -> Table:
    facts = dict(summary["machine"])
    if "memory_bytes" in facts:
        facts["memory"] = f"{facts.pop('memory_bytes') / 2**30:.1f} GiB"
    rows = [[str(key).replace("_", " "), str(value)] for key, value in [*facts.items(), *summary["versions"].items()]]
    return Table("Machine and versions", ["", ""], rows, text=2)


def method(summary: Summary) -> str:
    settings = summary["settings"]
    return (
        f"{summary['rounds']} rounds; in each, every load on {summary['first']}, then on {summary['second']} (A B A "
        "B), with a pause of idleness between. A run begins with one request of each user that is not counted, and "
        "measuring starts when all have theirs. Requests and arrivals follow from the seed, equal for both sides and "
        "new in every round, so that no prompt but a shared prefix is found in a cache. Answers are greedy and "
        + ("of a length drawn by the seed. " if settings["fixed_length"] else "end where the model ends them. ")
        + "Throughput is the tokens of all answers over the time from the first request to the last answer's end; "
        "inter-token latency is the time between chunks, which hold the tokens per chunk that the table tells."
    )
