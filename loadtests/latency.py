"""Statistics of runs: throughput, percentiles of latencies, and ratios with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from records import RunFile

Values = NDArray[np.float64]
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Sample:
    """The answered requests of one run in the order of their indices, as arrays with one entry for each.

    Attributes:
        wall: seconds of the run.
        index: of the request in its run.
        tokens: of the answers.
        total: seconds, end to end.
        first_token: seconds.
        gaps: seconds between chunks, one array for each request.
    """

    wall: float
    index: Values
    tokens: Values
    total: Values
    first_token: Values
    gaps: tuple[Values, ...]

    @classmethod
    def of(cls, run: RunFile) -> Sample:
        answered = sorted((record for record in run.records if record.status == "ok"), key=lambda record: record.index)
        return cls(
            wall=run.wall,
            index=np.array([record.index for record in answered], dtype=np.float64),
            tokens=np.array([record.completion_tokens for record in answered], dtype=np.float64),
            total=np.array([record.total for record in answered]),
            first_token=np.array([record.first_token for record in answered], dtype=np.float64),
            gaps=tuple(np.array(record.gaps, dtype=np.float64) for record in answered),
        )

    def picked(self, picks: NDArray[np.intp]) -> Sample:
        """These requests; the wall time follows the time that they take.

        In a closed loop the users are always busy, so seconds of requests are seconds of wall times users.
        """
        total = self.total[picks]
        return Sample(
            wall=self.wall * float(total.sum() / self.total.sum()),
            index=self.index[picks],
            tokens=self.tokens[picks],
            total=total,
            first_token=self.first_token[picks],
            gaps=tuple(self.gaps[pick] for pick in picks),
        )


def _resampled(rng: np.random.Generator, above: Sample, below: Sample) -> tuple[Sample, Sample]:
    """As many requests, drawn with replacement: the same of both sides, where both answered the same."""
    picks = rng.integers(0, len(above.total), len(above.total))
    if np.array_equal(above.index, below.index):
        return above.picked(picks), below.picked(picks)
    return above.picked(picks), below.picked(rng.integers(0, len(below.total), len(below.total)))


Metric = Callable[[Sequence[Sample]], float]


def throughput(samples: Sequence[Sample]) -> float:
    """Tokens of answers per second of wall time."""
    return float(sum(sample.tokens.sum() for sample in samples) / sum(sample.wall for sample in samples))


def first_tokens(samples: Sequence[Sample]) -> Values:
    return np.concatenate([sample.first_token for sample in samples])


def gaps(samples: Sequence[Sample]) -> Values:
    return np.concatenate([gap for sample in samples for gap in sample.gaps])


def totals(samples: Sequence[Sample]) -> Values:
    return np.concatenate([sample.total for sample in samples])


LATENCIES: dict[str, Callable[[Sequence[Sample]], Values]] = {
    "ttft": first_tokens,
    "itl": gaps,
    "e2e": totals,
}
"""Time to first token, inter-token latency, end to end."""


def percentiles(values: Values) -> dict[str, float]:
    """p50, p90, p99 (linear between order statistics) and the mean; NaN where there are no values."""
    if not len(values):
        return {**{f"p{p}": float("nan") for p in PERCENTILES}, "mean": float("nan")}
    found = np.percentile(values, PERCENTILES)
    return {**{f"p{p}": float(v) for p, v in zip(PERCENTILES, found, strict=True)}, "mean": float(values.mean())}


def percentile_of(latency: str, percent: int) -> Metric:
    """That percentile as a function of runs."""
    return lambda samples: float(np.percentile(LATENCIES[latency](samples), percent))


def summarize(runs: Sequence[RunFile]) -> dict[str, Any]:
    """What an operator asks about the runs of one endpoint under one load, all rounds together; times in seconds."""
    samples = [Sample.of(run) for run in runs]
    records = [record for run in runs for record in run.records]
    answered = [record for record in records if record.status == "ok"]
    chunks = sum(1 + len(record.gaps) for record in answered)
    wall = sum(run.wall for run in runs)
    return {
        "requests": len(records),
        "ok": len(answered),
        "failed": sum(record.failed for record in records) + sum(run.warmup_failures for run in runs),
        "timeouts": sum(record.status == "timeout" for record in records),
        "aborted": sum(record.status == "aborted" for record in records),
        "retries": sum(record.retries for record in records),
        "prompt_tokens": sum(record.prompt_tokens for record in answered),
        "completion_tokens": sum(record.completion_tokens for record in answered),
        "tokens_per_chunk": sum(record.completion_tokens for record in answered) / chunks if chunks else float("nan"),
        "wall_seconds": wall,
        "tokens_per_second": throughput(samples),
        "requests_per_second": len(answered) / wall,
        "tokens_per_second_by_round": [throughput([sample]) for sample in samples],
        **{name: percentiles(values(samples) if answered else np.array([])) for name, values in LATENCIES.items()},
        "late_seconds_max": max((record.late for record in records), default=0.0),
        "generator_cpu_share": sum(run.cpu for run in runs) / wall,
    }


def bootstrap_ratios(
    metrics: Mapping[str, Metric],
    above: Sequence[Sample],
    below: Sequence[Sample],
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """``metric(above) / metric(below)`` of each metric, with a percentile bootstrap interval.

    Requests of one round share the machine's mood, so rounds are drawn first and then the requests within each
    (Davison & Hinkley 1997, 3.8); both are pairs, of runs side by side and of answers to one question, so both sides
    get the same draws. With one round only the requests vary, and the interval is too narrow.

    Args:
        metrics: functions of a list of runs, by name.
        above: the numerator's runs, one a round.
        below: the denominator's, in the same order.
        resamples: how often to draw.
        confidence: of the interval.
        seed: of the draws.

    Returns:
        ``ratio``, ``low`` and ``high`` by metric.

    Raises:
        ValueError: the sides have different numbers of rounds, or a run has no answered request.
    """
    if len(above) != len(below):
        raise ValueError(f"expected as many rounds on both sides, found {len(above)} and {len(below)}")
    if not all(len(sample.total) for sample in (*above, *below)):
        raise ValueError("a run has no answered request, so there is nothing to compare")
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in metrics}
    for _ in range(resamples):
        rounds = rng.integers(0, len(above), len(above))
        upper, lower = zip(*(_resampled(rng, above[i], below[i]) for i in rounds), strict=True)
        for name, metric in metrics.items():
            drawn[name].append(metric(upper) / metric(lower))
    tail = (1 - confidence) / 2 * 100
    bounds = {name: np.percentile(values, [tail, 100 - tail]) for name, values in drawn.items()}
    return {
        name: {"ratio": metric(above) / metric(below), "low": float(bounds[name][0]), "high": float(bounds[name][1])}
        for name, metric in metrics.items()
    }
