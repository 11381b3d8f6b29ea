"""The product against cuBLAS: weights that come from memory, calls in CUDA graphs, A B A B, medians."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from rows import Rows
from torch import Tensor
from torch.nn import functional as F

from maskpro_kernels import NMPattern, NMWeight, nm_linear, pack, unpack
from maskpro_kernels.cuda import Prepared, device_of, prepare
from maskpro_kernels.cuda.dispatch import Operands, dispatcher

SHAPES = {
    "8B down": (4096, 14336), "8B gate_up": (28672, 4096), "8B qkv": (6144, 4096), "8B o": (4096, 4096),
    "70B/8 down": (8192, 3584), "70B/8 gate_up": (7168, 8192), "70B/8 qkv": (1280, 8192), "70B/8 o": (8192, 1024),
}  # fmt: skip
"""(out_features, in_features) of Llama 3's layers as vLLM fuses them; of 70B, one of 8 tensor-parallel shards."""

TOKENS = (1, 16, 64, 256, 1024, 4096)
FEW_TOKENS = 64
LEAST_BYTES = 400 << 20
"""Of the copies of one weight: several times a last-level cache."""
_ROUNDS = 11


def problems(everything: bool) -> Iterator[tuple[str, NMPattern, int]]:
    """Names of shapes, patterns and tokens, the most telling first."""
    two_of_four = NMPattern(2, 4)
    for tokens, name in itertools.product(TOKENS, SHAPES):
        yield name, two_of_four, tokens
    others = [NMPattern(4, 8), NMPattern(2, 8)] + ([NMPattern(8, 16), NMPattern(1, 4)] if everything else [])
    shapes = list(SHAPES) if everything else ["8B down", "8B qkv"]
    for tokens, pattern, name in itertools.product(TOKENS if everything else (1, 16), others, shapes):
        yield name, pattern, tokens


def kernel_rows(rows: Rows, everything: bool) -> None:
    rows.row("copy bandwidth", copy_bandwidth)
    bandwidth = rows.rows["copy bandwidth"]["GB/s"]
    for name, pattern, tokens in problems(everything):
        shape = SHAPES[name]
        key = f"{name} {shape[0]}x{shape[1]} {pattern} {tokens}"
        rows.row(key, lambda s=shape, p=pattern, t=tokens: compare(s, p, t, bandwidth), needs=20)


def copy_bandwidth() -> dict[str, Any]:
    """Bytes read and written by a copy of 1 GiB, the best of ten."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    graph = captured([lambda: target.copy_(source)])
    return {"GB/s": 2 * source.nbytes / min(seconds(graph) for _ in range(10)) / 1e9}


def compare(shape: tuple[int, int], pattern: NMPattern, tokens: int, bandwidth: float) -> dict[str, Any]:
    """One row: ours as the table chooses it, and cuBLAS, both bfloat16."""
    dense = torch.randn(shape, device="cuda").mul_(shape[1] ** -0.5).bfloat16()
    prepared = prepare(pack(dense, pattern), torch.bfloat16, tokens)
    dense = unpack(prepared.weight)
    x = torch.randn((tokens, shape[1]), device="cuda").bfloat16()
    check(x, prepared.weight, dense)
    backend = backend_of(prepared, x)
    packed_bytes = prepared.weight.nbytes
    ours = [prepared.weight]
    while len(ours) * packed_bytes < LEAST_BYTES:
        ours.append(prepare(copy(prepared.weight), torch.bfloat16, tokens).weight)
    theirs = [dense] + [dense.clone() for _ in range(LEAST_BYTES // dense.nbytes)]
    times = timed({
        "ours": (captured([lambda w=w: nm_linear(x, w) for w in ours]), len(ours)),
        "cuBLAS": (captured([lambda w=w: F.linear(x, w) for w in theirs]), len(theirs)),
    })  # fmt: skip
    mine, cublas = (statistics.median(times[name]) for name in ("ours", "cuBLAS"))
    limit = dense.nbytes / packed_bytes if tokens <= FEW_TOKENS else 2.0 if pattern == NMPattern(2, 4) else 1.0
    low, _, high = statistics.quantiles(times["ours"], n=4)
    return {
        "backend": backend, "us": mine * 1e6, "us quartiles": f"{low * 1e6:.2f} .. {high * 1e6:.2f}",
        "cuBLAS us": cublas * 1e6, "ratio": cublas / mine, "limit": limit, "share of limit": cublas / mine / limit,
        "GB/s": packed_bytes / mine / 1e9, "of copy": packed_bytes / mine / 1e9 / bandwidth,
    }  # fmt: skip


def backend_of(prepared: Prepared, x: Tensor) -> str:
    """Which runs a product of these activations."""
    weight = prepared.weight
    product = Operands(x, weight.values, weight.bitmask, weight.scale, None, weight.pattern, prepared.metadata)
    return dispatcher(device_of(x)).plan(product).backend


def copy(weight: NMWeight) -> NMWeight:
    return replace(weight, values=weight.values.clone(), bitmask=weight.bitmask.clone())


def check(x: Tensor, weight: NMWeight, dense: Tensor) -> None:
    """Our error against float64 is at most twice cuBLAS's own.

    Raises:
        AssertionError: it is not.
    """
    some = slice(0, 256)
    exact = x[some].double() @ dense.double().T
    ours = (nm_linear(x, weight)[some].double() - exact).norm() / exact.norm()
    theirs = (F.linear(x, dense)[some].double() - exact).norm() / exact.norm()
    assert ours <= 2 * theirs, f"error {ours:.3g} of the norm, cuBLAS {theirs:.3g}"


def captured(calls: list[Callable[[], Tensor]]) -> torch.cuda.CUDAGraph:
    """One graph of all calls, after each has run once."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def timed(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]]) -> dict[str, list[float]]:
    """Seconds of one of a graph's calls, by name, A B A B: each graph with its number of calls."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(_ROUNDS):
        for name, (graph, calls) in graphs.items():
            times[name].append(seconds(graph) / calls)
    return times


def seconds(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
