"""Times nm_linear against dense linears of the same shape, in one run.

    python kernels/bench/nm_linear.py [--tokens 1 2 4 ...] [--shapes 4096x4096 ...] [--pattern 2:4] [--json FILE]

Weights rotate among copies whose sizes add up to more than the last-level cache, so that every call reads its
weight from memory, as a model's layers do. The limit is printed first: read bandwidth, measured in this run
over a buffer as large. Rivals are timed in turn, A B A B, medians of their rounds. Correctness is asserted
against float64 before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskpro_kernels import NMPattern, NMWeight, nm_linear, pack, unpack
from maskpro_kernels.support import select_backend

SHAPES = ("4096x4096", "11008x4096", "4096x11008")
TOKENS = (1, 2, 4, 8, 16, 32)
CACHE_BYTES = 600 << 20
"""Bytes that a rotation covers: more than twice the largest last-level cache this was run on (260 MB)."""


def rotation(nbytes: int) -> int:
    """How many copies of a weight make a rotation."""
    return max(2, -(-CACHE_BYTES // nbytes))


def read_bandwidth() -> float:
    """Bytes per second of reading memory: the best of dot products of long float32 vectors (MKL, all threads)."""
    vectors = torch.ones((2, CACHE_BYTES // 8))
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        torch.dot(vectors[0], vectors[1])
        times.append(time.perf_counter() - begin)
    return vectors.nbytes / min(times)


def median_times(runs: dict[str, Callable[[int], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call of each run, in turn; every call takes the next copy of its weight."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        run(0)  # scratch, packing caches and threads are there before timing
        times[name] = []
    for step in range(1, rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run(step)
            times[name].append(time.perf_counter() - begin)
    return times


def check(x: Tensor, y: Tensor, dense: Tensor) -> None:
    """float32 sums: |error| <= gamma_k |x||W| (Higham 2002, 3.1), with k the longest sum."""
    exact = x.double() @ dense.double().T
    k = dense.shape[1] * torch.finfo(torch.float32).eps / 2
    bound = k / (1 - k) * (x.double().abs() @ dense.double().abs().T)
    assert ((y.double() - exact).abs() <= bound).all(), "nm_linear is wrong: not timed"


def measure(
    shape: str, tokens: Sequence[int], pattern: NMPattern, bandwidth: float, rounds: int
) -> Iterator[dict[str, Any]]:
    """The rows of one weight shape."""
    out_features, in_features = (int(size) for size in shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn((out_features, in_features), generator=generator).bfloat16()
    packed = pack(dense, pattern)
    x = torch.randn((4, in_features), generator=generator)
    check(x, nm_linear(x, packed), unpack(packed))

    sparse = [replace(packed, values=packed.values.clone()) for _ in range(rotation(packed.nbytes))]
    full = [dense.float() for _ in range(rotation(2 * dense.nbytes))]
    half = [dense.clone() for _ in range(rotation(dense.nbytes))]
    for count in tokens:
        x = torch.randn((count, in_features), generator=generator)
        yield _row(shape, x, packed.nbytes, median_times(_runs(x, sparse, full, half), rounds), bandwidth)


def _runs(
    x: Tensor, sparse: list[NMWeight], full: list[Tensor], half: list[Tensor]
) -> dict[str, Callable[[int], Tensor]]:
    """Each rival at its own dtype, on the copy of the weight whose turn it is."""
    x_half = x.bfloat16()
    return {
        "sparse": lambda i: nm_linear(x, sparse[i % len(sparse)]),
        "torch f32": lambda i: torch.nn.functional.linear(x, full[i % len(full)]),
        "torch bf16": lambda i: torch.nn.functional.linear(x_half, half[i % len(half)]),
    }


def _row(shape: str, x: Tensor, nbytes: int, times: dict[str, list[float]], bandwidth: float) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in times.items()}
    seconds = {name: {"median": medians[name], "min": min(t), "max": max(t)} for name, t in times.items()}
    rate = nbytes / medians["sparse"]
    return {
        "shape": shape,
        "tokens": len(x),
        "seconds": seconds,
        "gb_per_s": rate / 1e9,
        "share_of_bandwidth": rate / bandwidth,
        "vs_torch_f32": medians["torch f32"] / medians["sparse"],
        "vs_best_dense": min(medians["torch f32"], medians["torch bf16"]) / medians["sparse"],
    }


def machine() -> dict[str, object]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OUTxIN")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--pattern", type=NMPattern.parse, default=NMPattern(2, 4))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)

    backend = select_backend(arguments.pattern, torch.float32, torch.bfloat16, "cpu").name
    bandwidth = read_bandwidth()
    limit = 32 / arguments.pattern.bits_per_weight(torch.bfloat16)
    print(f"{machine()}; {backend}, {arguments.pattern} bfloat16 weights, float32 activations")
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s; limit by bytes: {limit:.2f}x f32, {limit / 2:.2f}x bf16\n")
    print("| weight | tokens | time ms | GB/s | of bandwidth | vs torch f32 | vs best dense |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for shape in arguments.shapes:
        for row in measure(shape, arguments.tokens, arguments.pattern, bandwidth, arguments.rounds):
            rows.append(row)
            milliseconds = 1e3 * row["seconds"]["sparse"]["median"]
            print(
                f"| {shape} | {row['tokens']} | {milliseconds:.2f} | {row['gb_per_s']:.1f} "
                f"| {row['share_of_bandwidth']:.0%} | {row['vs_torch_f32']:.2f} | {row['vs_best_dense']:.2f} |",
                flush=True,
            )
    if arguments.json:
        report = {"command": " ".join(sys.argv), "machine": machine(), "backend": backend,
                  "pattern": str(arguments.pattern), "read_bandwidth": bandwidth, "rows": rows}  # fmt: skip
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
