"""The oracle: what every kernel must compute, in plain PyTorch. Never optimised."""

from __future__ import annotations

import torch
from torch import Tensor

from maskpro_kernels.activations import EightBitInputs
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


def nm_linear_w8a8_reference(
    x: Tensor, values: Tensor, bitmask: Tensor, scale: Tensor, bias: Tensor | None, inputs: EightBitInputs
) -> Tensor:
    """``(rounded(x) @ unpack(values, bitmask).T) * input scale * scale + bias``: weights and activations of 8 bits.

    The sum is exact: float64 holds every sum of int8 products, as int32 does, and of e4m3 products. The rest is
    float32.

    Args:
        x: (tokens, in_features).
        values: int8 or float8_e4m3fn (out_features, kept), in column order.
        bitmask: uint8 (out_features, ceil(in_features / 8)).
        scale: float32 (out_features,), equal numbers for one of the whole tensor.
        bias: (out_features,) or None.
        inputs: how x is rounded.

    Returns:
        (tokens, out_features), dtype of x.
    """
    levels, input_scale = inputs.rounded(x)
    y = nm_linear_reference(levels.double(), values, bitmask, None, None).float() * input_scale * scale
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)
