"""The numbers of a comparison, from its runs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from latency import Metric, Sample, bootstrap_ratios, percentile_of, summarize, throughput
from plan import Load
from results import Results

THROUGHPUT = "tokens per second"
LATENCY_RATIOS: dict[str, Metric] = {
    "TTFT p50": percentile_of("ttft", 50),
    "TTFT p99": percentile_of("ttft", 99),
    "ITL p50": percentile_of("itl", 50),
    "ITL p99": percentile_of("itl", 99),
    "end to end p50": percentile_of("e2e", 50),
}


def summarize_comparison(results: Results) -> dict[str, Any]:
    """Everything that the report says: settings, machine, each load's statistics and ratios, calibration.

    Raises:
        ValueError: a run is missing, or has no answered request.
    """
    notes = results.notes()
    first, second = (endpoint.name for endpoint in results.endpoints)
    return {
        "first": first,
        "second": second,
        "command": notes.get("command", ""),
        "machine": notes.get("machine", {}),
        "versions": notes.get("versions", {}),
        "endpoints": [
            {
                "name": endpoint.name,
                "description": endpoint.description,
                **notes.get("facts", {}).get(endpoint.name, {}),
            }
            for endpoint in results.endpoints
        ],
        "rounds": results.plan.rounds,
        "settings": asdict(results.plan.base),
        "loads": [_load(results, load, first, second) for load in results.plan.loads],
        "calibration": notes.get("calibration", []),
    }


def _load(results: Results, load: Load, first: str, second: str) -> dict[str, Any]:
    runs = {name: results.runs(load, name) for name in (first, second)}
    return {
        "workload": load.workload,
        "label": load.label,
        "users": load.users,
        "rate": load.rate,
        "endpoints": {name: summarize(each) for name, each in runs.items()},
        "ratios": _ratios(load, [Sample.of(run) for run in runs[first]], [Sample.of(run) for run in runs[second]]),
    }


def _ratios(load: Load, first: list[Sample], second: list[Sample]) -> dict[str, dict[str, float]]:
    """How many times as good the first is: more tokens per second, less latency.

    An open loop's throughput is its arrivals', so it says nothing of the endpoint.
    """
    metrics = LATENCY_RATIOS if load.rate else {THROUGHPUT: throughput, **LATENCY_RATIOS}
    found = bootstrap_ratios(metrics, first, second)
    return {
        name: each
        if name == THROUGHPUT
        else {"ratio": 1 / each["ratio"], "low": 1 / each["high"], "high": 1 / each["low"]}
        for name, each in found.items()
    }
