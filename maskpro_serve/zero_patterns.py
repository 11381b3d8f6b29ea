"""Finds the N:M that the zeros of a dense weight satisfy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from maskpro_kernels import NMPattern
from maskpro_kernels.model_folder import TensorInfo, blocks, read_block
from maskpro_kernels.packing import group_counts
from maskpro_kernels.pattern import SUPPORTED_M


@dataclass(frozen=True)
class Zeros:
    """Where the zeros of one weight are.

    Attributes:
        in_features: columns of the weight.
        most: group size to the most nonzeros that a group holds, for every supported size that divides in_features.
    """

    in_features: int
    most: Mapping[int, int]

    @property
    def tightest(self) -> NMPattern | None:
        """The pattern of least density that the zeros satisfy, of the smallest groups; None where none has N < M."""
        patterns = [NMPattern(max(1, n), m) for m, n in self.most.items() if n < m]
        return min(patterns, key=lambda pattern: (pattern.density, pattern.m), default=None)

    def satisfies(self, pattern: NMPattern) -> bool:
        """Whether every group holds at most n nonzeros."""
        return self.most.get(pattern.m, pattern.m + 1) <= pattern.n

    def why_not(self, pattern: NMPattern) -> str:
        """Why the weight stays dense under a pattern that it does not satisfy."""
        if pattern.m not in self.most:
            return f"{pattern.m} does not divide in_features = {self.in_features}"
        return f"its zeros do not satisfy {pattern}: a group keeps {self.most[pattern.m]} of {pattern.m}"


def find_zeros(info: TensorInfo) -> Zeros:
    """Reads one weight and counts.

    Raises:
        CheckpointError: its file cannot be read.
    """
    return count_zeros(info.shape[1], (read_block(info, rows) for rows in blocks(info)))


def count_zeros(in_features: int, parts: Iterable[Tensor]) -> Zeros:
    """Counts in some rows of a weight, (rows, in_features) each."""
    most = {m: 0 for m in SUPPORTED_M if in_features % m == 0}
    for rows in parts:
        if not most or not rows.numel():
            continue
        nonzero = rows != 0
        for m in most:
            most[m] = max(most[m], int(group_counts(nonzero, m).max()))
    return Zeros(in_features, most)


def choose_pattern(zeros: Mapping[str, Zeros], headers: Mapping[str, TensorInfo]) -> NMPattern | None:
    """The pattern that makes a checkpoint smallest, of those that some of its weights satisfy.

    A weight that does not satisfy it stays dense and counts as such, so one layer of many zeros does not decide for
    all. None where no pattern makes the checkpoint smaller. Of equal ones the smaller groups win: 2:4 over 4:8.
    """

    def saved(pattern: NMPattern) -> float:
        bits = 0.0
        for name, found in zeros.items():
            dtype = headers[name].dtype
            if dtype is not None and found.satisfies(pattern):
                weights = headers[name].nbytes // dtype.itemsize
                bits += weights * (8 * dtype.itemsize - pattern.bits_per_weight(dtype))
        return bits

    candidates = {NMPattern(max(1, n), m) for found in zeros.values() for m, n in found.most.items() if max(1, n) < m}
    best = max(candidates, key=lambda pattern: (saved(pattern), -pattern.m), default=None)
    return best if best is not None and saved(best) > 0 else None
