"""What timing one kernel call in 127 costs a server: decoding with and without it, in turn, in one process.

    python kernels/bench/sampling_cost.py [--pairs 60] [--tokens 24] [--json FILE]

One vLLM engine on sparse-llama, eager, one sequence. Every pair times the same completion with sampling on and off, the
order changing from pair to pair, and gives a ratio; the tokens must be equal. Because a shared machine is noisier than
what is looked for, the parts are timed as well: on a call so small that it has nothing else to do, what a call costs
that is not sampled and one that is; and what recording a sample takes, in a thread of its own, once a second.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp()  # as in a server; read when prometheus_client is imported
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
from vllm import LLM, SamplingParams

from maskpro_kernels import NMPattern, nm_linear, pack
from maskpro_kernels.call_timer import TimedCall, take_timed, time_calls
from maskpro_kernels.interleaved import interleave
from maskpro_serve.metrics import SAMPLING_VARIABLE, record_kernel, record_kernels, sampling_period
from maskpro_serve.models import resolve_model

_CALLS = 2_000  # fewer than the native library keeps


def median_interval(values: list[float], draws: int = 2000) -> list[float]:
    """95% bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return [medians[int(draws * 0.025)], medians[int(draws * 0.975)]]


def call_seconds(function: Callable[[], object], periods: Sequence[int], rounds: int = 40) -> list[float]:
    """Seconds of one call at each sampling period, the best of many short runs that take turns."""
    best = [math.inf] * len(periods)
    for _ in range(rounds):
        for index, period in enumerate(periods):
            time_calls(period)
            best[index] = min(best[index], timeit.timeit(function, number=_CALLS) / _CALLS)
            take_timed()
    time_calls(0)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    os.environ[SAMPLING_VARIABLE] = "0"  # or loading starts the recorder, which takes the calls counted below
    llm = LLM(
        model=resolve_model("sparse-llama"), dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=1,
        kv_cache_memory_bytes=100 << 20, enable_prefix_caching=False,
    )  # fmt: skip
    sampling = SamplingParams(max_tokens=arguments.tokens, temperature=0, ignore_eos=True)
    del os.environ[SAMPLING_VARIABLE]
    period = sampling_period()

    def decode(sampled: bool) -> tuple[float, list[int]]:
        record_kernels(period if sampled else 0)
        begin = time.perf_counter()
        output = llm.generate(["The lighthouse"], sampling, use_tqdm=False)[0]
        return time.perf_counter() - begin, list(output.outputs[0].token_ids)

    time_calls(1)
    take_timed()
    llm.generate(["The lighthouse"], sampling, use_tqdm=False)
    calls = len(take_timed())
    record_kernels(period)  # starts the thread, for both sides
    expected = decode(False)[1]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for index in range(arguments.pairs):
        for sampled in (True, False) if index % 2 else (False, True):
            elapsed, tokens = decode(sampled)
            assert tokens == expected
            seconds[sampled].append(elapsed)
    ratios = [on / off for on, off in zip(seconds[True], seconds[False], strict=True)]

    tiny, x = interleave(pack(torch.ones(16, 4), NMPattern(2, 4))), torch.ones(1, 4)
    off, skipped, timed = call_seconds(lambda: nm_linear(x, tiny), (0, 1 << 60, 1))
    call = TimedCall("cpu-avx2", NMPattern(2, 4), 1, 1, 1e-4)
    recorded = min(timeit.repeat(lambda: record_kernel(call), number=_CALLS, repeat=5)) / _CALLS
    report = {
        "command": " ".join(sys.argv),
        "cores": len(os.sched_getaffinity(0)),
        "kernel_calls_per_completion": calls,
        "median_seconds": {
            "sampled": statistics.median(seconds[True]),
            "not sampled": statistics.median(seconds[False]),
        },
        "ratio_median": statistics.median(ratios),
        "ratio_median_95": median_interval(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4),
        "best_ratio": min(seconds[True]) / min(seconds[False]),
        "microseconds": {
            "call, off": off * 1e6,
            "not sampled, more": (skipped - off) * 1e6,
            "sampled, more": (timed - off) * 1e6,
            "recorded": recorded * 1e6,
        },
    }
    print(json.dumps(report, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
