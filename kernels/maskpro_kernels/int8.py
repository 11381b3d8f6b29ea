"""Weights in 8 bits: symmetric, one scale for each output channel. Packed 2:4 takes 5 bits per weight."""

from __future__ import annotations

import torch
from torch import Tensor

from maskpro_kernels.packing import NMWeight

_ROWS = 4096  # rounded at a time
LEVELS = 127
"""The largest magnitude; -128 is not used, so that negating a weight is exact."""


def nearest_levels(values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Rounds float32 values to the nearest of 255 levels that span their vector along ``dim``.

    Returns:
        int8 levels, and the float32 scale of each vector, its largest magnitude / 127, with ``dim`` kept as 1. A scale
        is a normal number, however small the values: many processors take a subnormal one for zero.
    """
    smallest = torch.finfo(torch.float32).tiny
    largest = values.abs().amax(dim=dim, keepdim=True)
    # Not by a number: a GPU would multiply by its reciprocal, which is no number of float32.
    scale = (largest / torch.full_like(largest, LEVELS)).clamp_min(smallest)
    return (values / scale).round().to(torch.int8), scale


def rows_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds every row of a matrix, a dense weight or kept values, to the nearest of 255 levels that span it.

    Args:
        weight: (out_features, columns), bfloat16, float16 or float32.

    Returns:
        int8 levels, and the float32 scale of each row, its largest magnitude / 127 (1 for a row of zeros).

    Raises:
        ValueError: a weight is not finite.

    Memory: the levels, and some rows in float32.
    """
    levels, scale = torch.empty_like(weight, dtype=torch.int8), weight.new_empty(len(weight), dtype=torch.float32)
    for rows, into, scales in zip(*(each.split(_ROWS) for each in (weight, levels, scale)), strict=True):
        values = rows.float()
        if not torch.isfinite(values).all():
            raise ValueError("int8: expected finite values, found inf or NaN")
        rounded, scale_column = nearest_levels(values, 1)
        into.copy_(rounded)
        scales.copy_(torch.where(values.any(1), scale_column.squeeze(1), 1.0))
    return levels, scale


def to_int8(weight: NMWeight) -> NMWeight:
    """Rounds kept values to the nearest of 255 levels that span their row.

    Args:
        weight: packed, bfloat16, float16 or float32.

    Returns:
        The same weight with int8 values and a float32 scale, the row's largest magnitude / 127 (1 for a row of zeros).
        Every value is off by at most half its row's scale.

    Raises:
        ValueError: the values have a scale already, or one is not finite.
    """
    if weight.scale is not None:
        raise ValueError(f"int8: expected values without a scale, found {weight.values.dtype} with one")
    levels, scale = rows_to_int8(weight.values)
    return NMWeight(levels, weight.bitmask, weight.shape, weight.pattern, scale)
