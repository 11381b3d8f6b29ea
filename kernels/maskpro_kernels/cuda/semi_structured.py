"""2:4 on sparse tensor cores, through torch's two operators: CUTLASS and cuSPARSELt.

Both take the kept values row-major, two of four, exactly as ``values`` are stored (FORMAT.md), and metadata of their
own: two 2-bit indices a group, 1 bit a weight, as many as the bitmask has, in an order that suits the hardware.

- CUTLASS takes the metadata as a tensor beside the values. Its order is public (CUTLASS, ``reorder_meta`` in
  host_reorder.h, and its PyTorch twin ``torch.sparse._semi_structured_conversions``): rows are dealt in eights within
  32, blocks of two by two are transposed, and pairs of columns are interleaved column-major.
- cuSPARSELt keeps the order of its metadata to itself and wants it behind the values, in one buffer. So the buffer is
  made by its own compression, of a weight that is 1 where ours is kept: a kept value may be zero, which compression
  would take for a dropped one. Our values are then written over the ones, and are from there on a view of the buffer:
  one copy in memory, which the Triton kernel reads too.

Weights and activations of 8 bits (W8A8) go to cuSPARSELt, whose sparse operand is the first: out^T = W @ x^T. The sum
is int32 for int8 and float32 for e4m3. It leaves the product times ``alpha``, a number a row, in 16 bits; a token's
scale is applied after it. So that float16 holds what is between, ``alpha`` is a row's scale / 127 (of e4m3: / 448), and
a token's is its scale * 127: the product is then that of activations whose largest is 1, at most the sum of a row's
magnitudes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from maskpro_kernels.activations import LARGEST, EightBitInputs
from maskpro_kernels.bits import unpack_bits

_TOKENS, _TOKENS_OF_8_BITS = 8, 16
"""Both operators want the dense side in multiples of this."""


def cutlass_metadata(bitmask: Tensor) -> Tensor:
    """The metadata of CUTLASS for 16-bit values.

    Args:
        bitmask: uint8 (out_features, in_features / 8) of a 2:4 weight; 32 divides out_features and in_features.

    Returns:
        int16 (out_features, in_features / 16), in CUTLASS's order.
    """
    rows, width = bitmask.shape
    codes = _codes(bitmask.device)[bitmask.int()]
    columns = width // 2
    meta = codes.view(torch.int16).reshape(rows // 32, 2, 2, 8, columns // 2, 2)
    # Of a row's number: (block of 32, a / 2, a % 2, b) for a * 8 + b; it becomes b * 4 + a. Of a column's: (pair, odd).
    # Transposing blocks of two by two exchanges a % 2 with the column's odd bit.
    return meta.permute(4, 0, 3, 1, 5, 2).reshape(rows, columns)


@functools.cache
def _codes(device: torch.device) -> Tensor:
    """uint8 (256,): for two groups' masks, lowest four bits first, the two indices of each, 4 bits a group."""
    codes = []
    for byte in range(256):
        code = 0
        for shift in (0, 4):
            kept = [k for k in range(4) if byte >> shift & 1 << k]
            if len(kept) == 2:
                code |= (kept[0] | kept[1] << 2) << shift
        codes.append(code)
    return torch.tensor(codes, dtype=torch.uint8, device=device)


def cutlass_linear(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` for x (tokens, in_features) of the values' dtype, by ``torch._sparse_semi_structured_mm``."""
    padded = _padded(x).t()
    if bias is None:
        y = torch._sparse_semi_structured_mm(values, metadata, padded)
    else:
        y = torch._sparse_semi_structured_addmm(bias.to(x.dtype), values, metadata, padded)
    return y.t()[: x.shape[0]].contiguous()


def cusparselt_buffer(values: Tensor, bitmask: Tensor, in_features: int) -> Tensor:
    """The values with cuSPARSELt's metadata behind them, of the values' dtype and as torch's compression shapes it.

    Values of 16 bits, int8 or e4m3; those of 8 bits have 32 rows and columns, or a multiple.
    """
    mask = unpack_bits(bitmask, in_features).to(values.dtype)
    buffer = torch._cslt_compress(mask)
    values_of_buffer(buffer, values.shape).copy_(values)
    return buffer


def values_of_buffer(buffer: Tensor, shape: torch.Size) -> Tensor:
    """The kept values, a view."""
    return buffer.view(-1)[: shape.numel()].view(shape)


def cusparselt_linear(x: Tensor, buffer: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ W.T + bias`` for x (tokens, in_features) of the buffer's dtype, by ``torch._cslt_sparse_mm``."""
    bias = None if bias is None else bias.to(x.dtype)
    return torch._cslt_sparse_mm(buffer, _padded(x).t(), bias=bias, transpose_result=True)[: x.shape[0]]


@dataclass(frozen=True, eq=False)
class EightBitWeight:
    """A weight of 8 bits that is multiplied by activations of 8 bits.

    Attributes:
        buffer: as :func:`cusparselt_buffer` makes it, int8 or e4m3.
        alpha: float32 (out_features,), the weight's scale / the largest input level.
        inputs: how activations are rounded, to the buffer's dtype.
    """

    buffer: Tensor
    alpha: Tensor
    inputs: EightBitInputs


def eight_bit_weight(buffer: Tensor, scale: Tensor, inputs: EightBitInputs) -> EightBitWeight:
    """Of a buffer and the weight's scale, float32 (out_features,)."""
    return EightBitWeight(buffer, scale / LARGEST[inputs.dtype], inputs)


def w8a8_linear(x: Tensor, weight: EightBitWeight, bias: Tensor | None) -> Tensor:
    """``rounded(x) @ W.T + bias`` for x (tokens, in_features) of 16 bits, by ``torch._cslt_sparse_mm``."""
    from maskpro_kernels.triton.round_inputs import round_inputs

    tokens = x.shape[0]
    levels, scale = round_inputs(x, weight.inputs, _TOKENS_OF_8_BITS)
    y = torch._cslt_sparse_mm(
        weight.buffer, levels.t(), alpha=weight.alpha, out_dtype=x.dtype, transpose_result=True
    )[:tokens]  # fmt: skip
    span = scale[:tokens] * LARGEST[weight.inputs.dtype]
    return y.mul_(span) if bias is None else torch.addcmul(bias.float(), y, span, out=y)


def _padded(x: Tensor) -> Tensor:
    spare = -x.shape[0] % _TOKENS
    return F.pad(x, (0, 0, 0, spare)) if spare else x.contiguous()
