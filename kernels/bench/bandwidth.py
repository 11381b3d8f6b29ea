"""Read bandwidth of the memory: the fastest of a few reductions, over a buffer too large for the caches."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_ROW = 4096
_READ_BYTES = 64 << 20
_FEWEST_PARTS = 4
"""So that nothing of a part is left in a cache when it is its turn again, whatever else is read in between."""


@dataclass(frozen=True)
class Reader:
    """``read()`` reads the next ``bytes_read`` of a buffer with every thread torch has."""

    method: str
    bytes_read: int
    read: Callable[[], object]


def fastest_reader(buffer_bytes: int, rounds: int = 7) -> Reader:
    """Walks through ``buffer_bytes`` or 256 MiB, at most 64 MiB at a time, in the way that is fastest here.

    No single reduction is that on every machine: `sum` is torch's own loop, `dot` and `mv` are MKL's or OpenBLAS's,
    and which of them threads and prefetches well differs. The memory's pace changes while a benchmark runs, so what it
    is compared with has to be read in its turn.
    """
    rows = max(min(buffer_bytes, _READ_BYTES) // 4 // _ROW, 2) // 2 * 2
    count = max(-(-buffer_bytes // (rows * _ROW * 4)), _FEWEST_PARTS)
    parts = [torch.ones(rows, _ROW) for _ in range(count)]
    vector = torch.ones(_ROW)
    methods: dict[str, Callable[[Tensor], object]] = {
        "torch.sum": torch.sum,
        "torch.dot": lambda part: torch.dot(*part.view(2, -1)),
        "torch.mv": lambda part: torch.mv(part, vector),
    }
    following: Iterator[Tensor] = itertools.cycle(parts)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            start = time.perf_counter()
            method(next(following))
            seconds[name].append(time.perf_counter() - start)
    best = min(seconds, key=lambda name: statistics.median(seconds[name]))
    return Reader(best, parts[0].nbytes, lambda: methods[best](next(following)))
