"""The (N:M) pattern: N of every M consecutive inputs of a weight row are kept."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

SUPPORTED_M = (4, 8, 16, 32)
"""Group sizes with a byte-aligned bitmask layout; every n from 1 to m is valid for each."""

_PATTERN = re.compile(r"(\d{1,2}):(\d{1,2})")


@dataclass(frozen=True, order=True)
class NMPattern:
    """Keeps ``n`` of every ``m`` consecutive weights along the input dimension.

    ``n`` counts *kept* weights, everywhere in this project: ``2:4`` keeps two of four. (The code
    of Wanda and SparseGPT counts the pruned ones.)

    Raises:
        ValueError: ``m`` is not one of 4, 8, 16, 32, or ``n`` is not in 1..m.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if self.m not in SUPPORTED_M:
            raise ValueError(f"pattern {self.n}:{self.m}: m must be one of {SUPPORTED_M}, found {self.m}")
        if not 1 <= self.n <= self.m:
            raise ValueError(f"pattern {self.n}:{self.m}: n must be between 1 and {self.m}, found {self.n}")

    @classmethod
    def parse(cls, text: str) -> NMPattern:
        """Parses ``"N:M"``.

        Raises:
            ValueError: the text is not two small integers with a colon between, or not a supported pattern.
        """
        match = _PATTERN.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"unknown sparsity pattern {text!r}: expected N:M, for example 2:4")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return self.n / self.m

    @property
    def states(self) -> int:
        """Number of distinct masks of one group, m choose n."""
        return math.comb(self.m, self.n)

    def bits_per_weight(self, dtype: torch.dtype) -> float:
        """Stored bits per original weight: the kept values and one bit of bitmask."""
        return self.density * dtype.itemsize * 8 + 1

    def divides(self, in_features: int) -> bool:
        """Whether rows of ``in_features`` split into whole groups; a layer where not stays dense."""
        return in_features > 0 and in_features % self.m == 0

    def kept(self, in_features: int) -> int:
        """Kept values per row.

        Raises:
            ValueError: m does not divide ``in_features``.
        """
        if not self.divides(in_features):
            raise ValueError(f"pattern {self}: {self.m} does not divide in_features = {in_features}")
        return in_features // self.m * self.n
