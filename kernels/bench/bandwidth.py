"""Read bandwidth of the memory, as the fastest of a few reductions over a buffer too large for the caches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_ROW = 4096


@dataclass(frozen=True)
class Bandwidth:
    """``gb_per_s`` (10^9 bytes) reached by ``method`` over ``buffer_bytes``."""

    gb_per_s: float
    method: str
    buffer_bytes: int

    def __str__(self) -> str:
        return f"{self.gb_per_s:.1f} GB/s read by {self.method} over {self.buffer_bytes / 1e9:.2f} GB"


def read_bandwidth(buffer_bytes: int, rounds: int = 7) -> Bandwidth:
    """Reads ``buffer_bytes`` with every thread torch has, a few ways in turn, and keeps the best median.

    No single reduction is the fastest on every machine: `sum` is torch's own loop, `dot` and `mv` are
    MKL's or OpenBLAS's, and which of them threads and prefetches well differs.
    """
    rows = max(buffer_bytes // 4 // _ROW, 2) // 2 * 2
    buffer = torch.ones(rows, _ROW)
    flat, vector = buffer.view(-1), torch.ones(_ROW)
    half = flat.numel() // 2
    methods: dict[str, Callable[[], object]] = {
        "torch.sum": flat.sum,
        "torch.dot": lambda: torch.dot(flat[:half], flat[half:]),
        "torch.mv": lambda: torch.mv(buffer, vector),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            seconds[name].append(time.perf_counter() - start)
    best = min(seconds, key=lambda name: statistics.median(seconds[name]))
    return Bandwidth(buffer.nbytes / statistics.median(seconds[best]) / 1e9, best, buffer.nbytes)
