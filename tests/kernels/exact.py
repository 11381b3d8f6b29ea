"""What a packed weight says, without rounding."""

from __future__ import annotations

import torch

from maskpro_kernels import NMWeight, unpack


def exact_weight(weight: NMWeight) -> torch.Tensor:
    """The dense weight in float64; a value times its scale has more bits than float32."""
    if weight.scale is None:
        return unpack(weight).double()
    levels = NMWeight(weight.values.float(), weight.bitmask, weight.shape, weight.pattern)
    return unpack(levels).double() * weight.scale.double().unsqueeze(1)
