"""Activations to 8 bits in one kernel, to the bits of :meth:`maskpro_kernels.activations.EightBitInputs.rounded`.

A program rounds one token: a first pass finds its largest magnitude, unless the scale is given, a second one divides.
What the second reads is in the cache, so memory is read once and written once, 3 bytes an activation of 16 bits;
torch's own operators would pass 20 or so.
"""

# ruff: noqa: N803  (compile-time constants are in capitals, as everywhere in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped, import-not-found"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskpro_kernels.activations import LARGEST, EightBitInputs

_MOST_COLUMNS = 4096
_SMALLEST = torch.finfo(torch.float32).tiny


@triton.jit(do_not_specialize=["tokens"])
def _round(
    levels, scales, x, given, tokens, in_features,
    LARGEST: tl.constexpr, SMALLEST: tl.constexpr, INT8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x is (tokens, in_features), contiguous; levels and scales have more tokens, of zeros."""
    token = tl.program_id(0)
    row = token.to(tl.int64) * in_features
    column = tl.arange(0, BLOCK)
    width = tl.where(token < tokens, in_features, 0)
    if given is None:
        largest = tl.zeros([BLOCK], tl.float32)
        nan = tl.zeros([BLOCK], tl.int32)
        for first in range(0, in_features, BLOCK):
            value = tl.load(x + row + first + column, mask=first + column < width, other=0.0).to(tl.float32)
            magnitude = tl.abs(value)
            nan = nan | (magnitude != magnitude).to(tl.int32)
            largest = tl.maximum(largest, magnitude)
        peak = tl.max(largest)
        scale = tl.maximum(tl.div_rn(peak, LARGEST), SMALLEST)
        undefined = (tl.max(nan) > 0) | (INT8 & (peak == float("inf")))
        scale = tl.where(undefined, float("nan"), scale)  # as the outputs then are
    else:
        scale = tl.load(given)
        nan = tl.zeros([BLOCK], tl.int32)
    for first in range(0, in_features, BLOCK):
        value = tl.load(x + row + first + column, mask=first + column < width, other=0.0).to(tl.float32)
        level = tl.div_rn(value, tl.zeros([BLOCK], tl.float32) + scale)
        if given is not None:
            nan = nan | (value != value).to(tl.int32)
        if INT8:
            level = tl.minimum(tl.maximum(level, -LARGEST - 1), LARGEST)
            level = (level + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest integer, ties to even
        else:
            level = tl.maximum(level, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
            level = tl.minimum(level, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        tl.store(levels + row + first + column, level.to(levels.dtype.element_ty), mask=first + column < in_features)
    if given is not None:
        scale = tl.where(tl.max(nan) > 0, float("nan"), scale)
    tl.store(scales + token, scale)


def round_inputs(x: Tensor, inputs: EightBitInputs, multiple: int) -> tuple[Tensor, Tensor]:
    """Rounds (tokens, in_features), and adds tokens of zeros to a multiple.

    Returns:
        Levels (more tokens, in_features) of the inputs' dtype, and float32 (more tokens, 1), their scales.
    """
    tokens, in_features = x.shape
    more = triton.cdiv(tokens, multiple) * multiple
    levels = torch.empty((more, in_features), dtype=inputs.dtype, device=x.device)
    given = None if inputs.scale is None else inputs.scale.reshape(1, 1)
    scales = torch.empty((more, 1), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _round[(more,)](
            levels, scales, x.contiguous(), given, tokens, in_features, LARGEST=LARGEST[inputs.dtype],
            SMALLEST=_SMALLEST, INT8=inputs.dtype == torch.int8,
            BLOCK=min(_MOST_COLUMNS, triton.next_power_of_2(in_features)), num_warps=8,
        )  # fmt: skip
    return levels, scales
