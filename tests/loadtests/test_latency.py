"""Statistics against known values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from calibration import Pace, expected_wall
from latency import Sample, bootstrap_ratios, percentile_of, percentiles, summarize, throughput
from records import Record, RunFile


def run_of(totals: list[float], *, tokens: int = 11, wall: float | None = None) -> RunFile:
    """One user, one request after the other; a fifth of each is the wait for the first token."""
    records = [
        Record(
            index=index, shape="chat", status="ok", first_token=total / 5, gaps=[total * 0.08] * (tokens - 1),
            total=total, prompt_tokens=3, completion_tokens=tokens,
        )
        for index, total in enumerate(totals)
    ]  # fmt: skip
    return RunFile(settings={}, wall=wall or sum(totals), cpu=0.1, warmup_failures=0, records=records)


def test_percentiles_are_numpys():
    values = np.random.default_rng(0).exponential(size=501)
    found = percentiles(values)
    assert found == {
        "p50": np.percentile(values, 50), "p90": np.percentile(values, 90), "p99": np.percentile(values, 99),
        "mean": values.mean(),
    }  # fmt: skip
    assert percentiles(np.arange(101.0))["p99"] == 99
    assert math.isnan(percentiles(np.array([]))["p50"])


def test_a_summary_counts():
    run = run_of([1.0, 3.0])
    run.warmup_failures = 1
    run.records += [
        Record(index=2, shape="chat", status="timeout", error="no end", total=9.0),
        Record(index=3, shape="chat", status="failed", error="HTTP 500", retries=2, total=0.1),
        Record(index=4, shape="chat", status="aborted", first_token=0.5, gaps=[0.1], total=0.7),
    ]
    side = summarize([run, run_of([2.0])])
    counts = {name: side[name] for name in ("requests", "ok", "failed", "timeouts", "aborted", "retries")}
    assert counts == {"requests": 6, "ok": 3, "failed": 3, "timeouts": 1, "aborted": 1, "retries": 2}
    assert side["tokens_per_second"] == pytest.approx(33 / 6)
    assert side["tokens_per_second_by_round"] == pytest.approx([22 / 4, 11 / 2])
    assert side["e2e"]["p50"] == 2.0  # of answered requests only
    assert side["ttft"]["p50"] == pytest.approx(0.4)
    assert side["itl"]["mean"] == pytest.approx(0.16)
    assert (side["completion_tokens"], side["prompt_tokens"], side["tokens_per_chunk"]) == (33, 9, 1.0)
    assert side["generator_cpu_share"] == pytest.approx(0.2 / 6)


def samples(seed: int, scale: float, rounds: int = 4, requests: int = 40) -> list[Sample]:
    """Rounds that differ by the machine's mood, which both sides share, and requests that differ by their length."""
    mood, length = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    return [
        Sample.of(run_of(list(scale * mood.uniform(0.8, 1.2) * length.uniform(0.5, 1.5, requests))))
        for _ in range(rounds)
    ]


def test_equal_questions_in_equal_moods_have_the_ratio_alone():
    found = bootstrap_ratios({"t": throughput, "p": percentile_of("e2e", 50)}, samples(0, 1.0), samples(0, 2.0))
    for name, ratio in (("t", 2.0), ("p", 0.5)):
        assert found[name] == pytest.approx({"ratio": ratio, "low": ratio, "high": ratio})


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Moods of their own for both sides; four rounds make a narrow interval, so the bound is well under 95%."""
    held = 0
    for seed in range(40):
        found = bootstrap_ratios({"t": throughput}, samples(seed, 1.0), samples(1000 + seed, 1.0), resamples=200)["t"]
        assert found["low"] <= found["ratio"] <= found["high"]
        held += found["low"] <= 1.0 <= found["high"]
    assert held >= 28


def test_bootstrap_is_seeded_and_checks_its_sides():
    sides = samples(0, 1.0), samples(5, 2.0)
    metrics = {"t": throughput}
    assert bootstrap_ratios(metrics, *sides, resamples=50) == bootstrap_ratios(metrics, *sides, resamples=50)
    assert bootstrap_ratios(metrics, *sides, resamples=50, seed=1) != bootstrap_ratios(metrics, *sides, resamples=50)
    with pytest.raises(ValueError, match="expected as many rounds on both sides, found 4 and 3"):
        bootstrap_ratios(metrics, sides[0], sides[1][:3])
    silent = [Sample.of(RunFile({}, 1.0, 0.1, 0, []))]
    with pytest.raises(ValueError, match="no answered request"):
        bootstrap_ratios(metrics, silent, silent)


def test_sides_that_answered_differently_can_be_compared():
    shorter = Sample.of(run_of([1.0, 1.0, 1.0]))
    longer = Sample.of(run_of([2.0] * 5))
    assert bootstrap_ratios({"t": throughput}, [shorter], [longer], resamples=20)["t"] == pytest.approx(
        {"ratio": 2.0, "low": 2.0, "high": 2.0}
    )


def test_the_stubs_pace_gives_the_wall_time():
    pace = Pace(first_token=1.0, gap=0.5)
    assert expected_wall(pace, [3, 3, 3], users=1) == 6.0
    assert expected_wall(pace, [3, 1, 1, 1], users=2) == 3.0  # 2 beside 1 + 1, then one more 1
