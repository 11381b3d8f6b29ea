"""The oracle: what every kernel must compute, in plain PyTorch. Never optimised."""

from __future__ import annotations

import torch
from torch import Tensor

from maskpro_kernels.bits import unpack_bits


def nm_linear_reference(
    x: Tensor, values: Tensor, bitmask: Tensor, scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """``(x @ unpack(values, bitmask).T) * scale + bias``, summed in float32 (float64 if ``x`` is).

    Args:
        x: (tokens, in_features).
        values: (out_features, kept), in column order.
        bitmask: uint8 (out_features, ceil(in_features / 8)).
        scale: (out_features,) or None for ones.
        bias: (out_features,) or None.

    Returns:
        (tokens, out_features), dtype of x.
    """
    accumulate = torch.promote_types(x.dtype, torch.float32)
    mask = unpack_bits(bitmask, x.shape[-1])
    dense = torch.zeros(mask.shape, dtype=accumulate, device=x.device)
    dense.masked_scatter_(mask, values.to(accumulate))
    y = x.to(accumulate) @ dense.T
    if scale is not None:
        y = y * scale.to(accumulate)
    if bias is not None:
        y = y + bias.to(accumulate)
    return y.to(x.dtype)
