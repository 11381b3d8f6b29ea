"""Times ``nm_linear`` against dense torch, on weights that come from memory.

    python kernels/bench/nm_linear.py --tokens 1 8 64 --shapes 4096x4096 --patterns 2:4 4:8 --json result.json

Every way to multiply is first checked against the float64 reference, then timed in turn, each round in another order:
what ran before a call leaves it more or less of the caches. A ratio is one of medians of the same run. GB/s counts the
bytes of the weight as the kernel reads it, and "of read" is its share of what the fastest reduction reads, timed in the
same turns; it is near 1 where reading weights is what takes the time. "of peak" is the rate of a dense product of that
size as a share of the fastest torch float32 product here, and may pass 1: what is not kept is not multiplied. Dense
rivals round no activations: loadtests/random_llama.py writes a dense W8A8 model to compare servers with.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from bandwidth import Reader, fastest_reader
from machine import Machine, this_machine, with_large_pages
from rivals import OURS, OURS_DENSE, Rival, check, rivals

from maskpro_kernels import NMPattern
from maskpro_kernels.support import select_backend

DENSE_F32 = "torch float32"
READ = "read"
HOPELESS = 10.0
"""A rival that takes this many times the fastest one's time is not timed again: it cannot be the best."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one rival: the median of ``rounds``, and its quartiles."""

    median: float
    lower: float
    upper: float
    rounds: int


@dataclass(frozen=True)
class Row:
    """One shape at one number of tokens. ``timings`` holds the rivals that were not hopeless, and the reading."""

    shape: tuple[int, int]
    pattern: str
    weights: str
    activations: str
    tokens: int
    weight_bytes: int
    gb_per_s: float
    read_gb_per_s: float
    share_of_bandwidth: float
    share_of_peak: float
    speedup_over_torch_f32: float
    speedup_over_best_dense: float
    speedup_over_our_dense: float | None
    best_dense: str
    timings: dict[str, Timing]


def measure(found: list[Rival], x: torch.Tensor, reader: Reader, seconds: float) -> dict[str, Timing]:
    """Times every rival and the reader in turn, for about ``seconds`` in all and at least five rounds."""
    inputs = {rival.name: x.to(rival.dtype) for rival in found}
    runs = {rival.name: functools.partial(rival.run, inputs[rival.name]) for rival in found}
    first = {name: min(_time(run) for _ in range(2)) for name, run in runs.items()}
    limit = HOPELESS * min(first.values())
    timed = {name: run for name, run in runs.items() if first[name] <= limit or name in (OURS, DENSE_F32)}
    timed[READ] = reader.read
    first[READ] = _time(reader.read)
    rounds = max(5, min(101, int(seconds / sum(first[name] for name in timed))))
    samples: dict[str, list[float]] = {name: [] for name in timed}
    order = list(timed)
    shuffler = random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for name in order:
            samples[name].append(_time(timed[name]))
    return {name: _summary(times) for name, times in samples.items()}


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _summary(times: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(times, n=4)
    return Timing(median, lower, upper, len(times))


def peak_flops() -> float:
    """Floating-point operations a second of torch's float32 product of 2048 x 2048 matrices, the best of ten."""
    a, b = torch.randn(2, 2048, 2048)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 2048**3 / min(times)


def row(
    shape: tuple[int, int], pattern: NMPattern, weights: str, activations: str, tokens: int, nbytes: int,
    timings: dict[str, Timing], reader: Reader, peak: float,
) -> Row:  # fmt: skip
    ours = timings[OURS].median
    read = reader.bytes_read / timings[READ].median
    torchs = [name for name in timings if name not in (OURS, OURS_DENSE, READ)]
    best = min(torchs, key=lambda name: timings[name].median)
    return Row(
        shape=shape,
        pattern=str(pattern),
        weights=weights,
        activations=activations,
        tokens=tokens,
        weight_bytes=nbytes,
        gb_per_s=nbytes / ours / 1e9,
        read_gb_per_s=read / 1e9,
        share_of_bandwidth=nbytes / ours / read,
        share_of_peak=2 * tokens * shape[0] * shape[1] / ours / peak,
        speedup_over_torch_f32=timings[DENSE_F32].median / ours,
        speedup_over_best_dense=timings[best].median / ours,
        speedup_over_our_dense=timings[OURS_DENSE].median / ours if OURS_DENSE in timings else None,
        best_dense=best,
        timings=timings,
    )


HEADER = (
    f"{'out x in':>13} {'N:M':>5} {'tokens':>6} {'median':>10} {'quartiles':>17} {'GB/s':>6} {'of read':>7} "
    f"{'of peak':>7} {'x torch f32':>11} {'x best dense':>12}"
)


def line(result: Row) -> str:
    ours = result.timings[OURS]
    return (
        f"{result.shape[0]:>6} x {result.shape[1]:<5}{result.pattern:>5} {result.tokens:>6} "
        f"{ours.median * 1e3:>7.2f} ms {ours.lower * 1e3:>7.2f} .. {ours.upper * 1e3:<6.2f} "
        f"{result.gb_per_s:>6.1f} {result.share_of_bandwidth:>7.0%} {result.share_of_peak:>7.0%} "
        f"{result.speedup_over_torch_f32:>11.2f} {result.speedup_over_best_dense:>12.2f}  ({result.best_dense})"
    )


def shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def served_activations() -> str:
    """bfloat16 where the kernel chosen here has products of it: vLLM serves it there."""
    isa = select_backend(NMPattern(2, 4), torch.bfloat16, torch.bfloat16, "cpu").isa
    return "bfloat16" if isa in ("amx-bf16", "avx512-bf16") else "float32"


def chosen_kernel(patterns: list[NMPattern], activations: torch.dtype, weights: torch.dtype) -> str:
    """The name of what multiplies the first pattern.

    Raises:
        SystemExit: activations are to be rounded, and a pattern has no kernel here that does.
    """
    rounded = activations == torch.int8
    served = torch.bfloat16 if rounded else activations
    found = [select_backend(pattern, served, weights, "cpu", may_round=rounded) for pattern in patterns]
    for pattern, backend in zip(patterns, found, strict=True):
        if rounded and not backend.rounds:
            raise SystemExit(
                f"--activations int8: {backend.name} multiplies {pattern} {weights}, and rounds none; expected 2:4, "
                "--weights int8, and on a machine with AMX MASKPRO_KERNEL=cpu-avx512-vnni"
            )
    return found[0].name


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 512])
    parser.add_argument("--shapes", type=shape, nargs="+", default=[(4096, 4096), (11008, 4096), (4096, 11008)])
    parser.add_argument("--patterns", type=NMPattern.parse, nargs="+", default=[NMPattern(2, 4)])
    parser.add_argument("--weights", choices=["bfloat16", "float16", "float32", "int8"], default="bfloat16")
    parser.add_argument(
        "--activations", choices=["bfloat16", "float16", "float32", "int8"], default=served_activations(),
        help="ours (default: what is served here, %(default)s); int8: bfloat16, and each call rounds them to 8 bits",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="per shape and number of tokens (default: 4)")
    parser.add_argument("--json", type=Path, help="also write everything here")
    return parser.parse_args()


def set_bytes(machine: Machine) -> int:
    """Twice the last-level cache, unless the rivals' copies and what is read would then take over half the memory."""
    return min(2 * machine.last_level_cache, machine.memory_available // 14)


def main() -> None:
    arguments = parse_arguments()
    with_large_pages()
    torch.set_num_threads(arguments.threads)
    machine = this_machine()
    weights: torch.dtype = getattr(torch, arguments.weights)
    activations: torch.dtype = getattr(torch, arguments.activations)
    kernel = chosen_kernel(arguments.patterns, activations, weights)
    size = set_bytes(machine)
    reader = fastest_reader(size)
    peak = peak_flops()
    print(machine, f"torch float32 product: {peak / 1e9:.0f} GFLOP/s", sep="\n")
    print(
        f"{kernel}, {arguments.weights}, {arguments.activations} activations; every rival walks through copies of its "
        f"weight that fill {size / 1e9:.2f} GB, {size / machine.last_level_cache:.1f} x the cache; "
        f"{reader.method} is the fastest to read\n"
    )
    print(HEADER)
    generator = torch.Generator().manual_seed(0)
    results = []
    for (rows, columns), pattern in itertools.product(arguments.shapes, arguments.patterns):
        weight, found = rivals(rows, columns, pattern, weights, activations, size, generator)
        for tokens in arguments.tokens:
            x = torch.randn((tokens, columns), generator=generator)
            for rival in found:
                check(rival, x[:8], weight)
            check(found[0], x, weight)
            timings = measure(found, x, reader, arguments.seconds)
            nbytes = found[0].weight_bytes
            kind = (rows, columns), pattern, arguments.weights, arguments.activations
            results.append(row(*kind, tokens, nbytes, timings, reader, peak))
            print(line(results[-1]), flush=True)
    if arguments.json:
        report = {
            "command": sys.argv,
            "machine": asdict(machine),
            "read_method": reader.method,
            "peak_flops": peak,
            "kernel": kernel,
            "set_bytes": size,
            "results": [asdict(result) for result in results],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
