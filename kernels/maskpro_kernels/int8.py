"""Kept values in 8 bits: symmetric, one scale for each output channel. 2:4 takes 5 bits per weight."""

from __future__ import annotations

import torch

from maskpro_kernels.packing import NMWeight

LEVELS = 127
"""The largest magnitude; -128 is not used, so that negating a weight is exact."""


def to_int8(weight: NMWeight) -> NMWeight:
    """Rounds kept values to the nearest of 255 levels that span their row.

    Args:
        weight: packed, bfloat16, float16 or float32.

    Returns:
        The same weight with int8 values and a float32 scale, the row's largest magnitude / 127 (1 for a row of zeros).
        Every value is off by at most half its row's scale.

    Raises:
        ValueError: the values are int8 already, or one is not finite.
    """
    if weight.scale is not None:
        raise ValueError("int8: expected values of a floating-point dtype, found torch.int8")
    values = weight.values.float()
    if not torch.isfinite(values).all():
        raise ValueError("int8: expected finite values, found inf or NaN")
    largest = values.abs().amax(1) if values.numel() else values.new_zeros(len(values))
    # A normal number: many processors take a subnormal one for zero.
    smallest = torch.finfo(torch.float32).tiny
    scale = torch.where(largest > 0, (largest / LEVELS).clamp_min(smallest), 1.0)
    levels = (values / scale.unsqueeze(1)).round()
    return NMWeight(levels.to(torch.int8), weight.bitmask, weight.shape, weight.pattern, scale)
