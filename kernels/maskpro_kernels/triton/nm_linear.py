"""``y = x W^T + b`` on a GPU, straight from the stored bytes of an (N:M)-sparse ``W``.

One program multiplies BLOCK_O rows of the weight by BLOCK_T tokens: tiles of the weight are expanded in registers
(expand.py) and go into a tensor-core product with the weight as its left operand, so that a few tokens, padded to 16,
are the narrow side. Loads are as wide as the format allows and are pipelined by the compiler.

Roofline: N / M * bytes + 1/8 byte a weight, read once; at 2:4 of 16 bits 9/16 of dense, so at most 1.78 times the speed
of a dense product that is bound by its weight. The arithmetic of 16 tokens is 1% of an H100's; the expansion, 1.25 to
6 integer instructions a weight, has to hide behind the memory: 64 a clock and SM are 1.5e13 a second, 13 for each
weight of dense 16 bits that the memory delivers.

Split-K. A matrix of 4,096 rows is 64 programs, and an H100 has 132 processors: several programs share a row block, each
with its own part of the columns. They write float32 sums to a workspace, and a second kernel adds them in order, so a
result has the same bits in every run; atomic additions to y would not. (The last program to arrive could add them up
and save the second launch, but it needs counters that are zero at the start: another launch, or state that two streams
would share.)

Nothing depends on the data on the host, and the workspace comes from torch's allocator: CUDA graphs may capture it.
"""

# ruff: noqa: N803  (compile-time constants are in capitals, as everywhere in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped, import-not-found"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskpro_kernels.packing import EIGHT_BITS
from maskpro_kernels.pattern import NMPattern
from maskpro_kernels.triton.expand import GATHER, PERMUTE, QUAD, WORD, expand_tile
from maskpro_kernels.triton.tile import Tile

_ADD_BLOCK = 1024
_EXPAND_ROWS, _EXPAND_COLUMNS = 32, 128

_INTEGERS = {1: torch.uint8, 2: torch.uint16, 4: torch.int32, 8: torch.int64}
_MASKS = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}
_TRITON = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
}  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _nm_linear(
    y, x, values, bitmask, scale, bias, tokens, in_features, out_features, kept, stride,
    N: tl.constexpr, M: tl.constexpr, DTYPE: tl.constexpr, EXPAND: tl.constexpr, MASK: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """y is (tokens, out_features), or float32 (splits, tokens, out_features) of partial sums without scale and bias.

    x is of the dtype in which tiles are multiplied, contiguous; DTYPE is that of the kept values.
    """
    rows = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    token = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(2)
    weight_rows = tl.minimum(rows, out_features - 1).to(tl.int64)
    blocks = tl.cdiv(in_features, BLOCK_K)
    each = tl.cdiv(blocks, tl.num_programs(2))
    column = tl.arange(0, BLOCK_K)
    row_of_x = x + token.to(tl.int64)[None, :] * in_features
    total = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    for block in range(split * each, tl.minimum((split + 1) * each, blocks)):
        first = block * BLOCK_K
        here = first + column
        w = expand_tile(
            values, bitmask, weight_rows, kept, stride, first, in_features, N, M, DTYPE, EXPAND, MASK, BLOCK_O,
            BLOCK_K, EVEN,
        )  # fmt: skip
        inside = (token < tokens)[None, :]
        if not EVEN:
            inside = inside & (here < in_features)[:, None]
        activations = tl.load(row_of_x + here[:, None], mask=inside, other=0.0)
        total = tl.dot(w.to(x.dtype.element_ty), activations, total, input_precision="ieee")
    inside = (rows < out_features)[:, None] & (token < tokens)[None, :]
    place = token.to(tl.int64)[None, :] * out_features + rows[:, None]
    if SPLIT:
        tl.store(y + split.to(tl.int64) * tokens * out_features + place, total, mask=inside)
    else:
        if scale is not None:
            total *= tl.load(scale + rows, mask=rows < out_features, other=0.0)[:, None]
        if bias is not None:
            total += tl.load(bias + rows, mask=rows < out_features, other=0.0).to(tl.float32)[:, None]
        tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["size"])
def _add_splits(y, partial, scale, bias, size, out_features, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds partial sums in the order of their splits, then scale and bias."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    total = tl.load(partial + place, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partial + split * size.to(tl.int64) + place, mask=inside, other=0.0)
    row = place % out_features
    if scale is not None:
        total *= tl.load(scale + row, mask=inside, other=0.0)
    if bias is not None:
        total += tl.load(bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _expand(
    dense, values, bitmask, in_features, out_features, kept, stride,
    N: tl.constexpr, M: tl.constexpr, DTYPE: tl.constexpr, EXPAND: tl.constexpr, MASK: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Writes one dense tile."""
    rows = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    first = tl.program_id(0) * BLOCK_K
    w = expand_tile(
        values, bitmask, tl.minimum(rows, out_features - 1).to(tl.int64), kept, stride, first, in_features, N, M, DTYPE,
        EXPAND, MASK, BLOCK_O, BLOCK_K, EVEN,
    )  # fmt: skip
    column = first + tl.arange(0, BLOCK_K)
    inside = (rows < out_features)[:, None] & (column < in_features)[None, :]
    place = rows.to(tl.int64)[:, None] * in_features + column[None, :]
    tl.store(dense + place, w.to(dense.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class _Stored:
    """A weight as the kernels are given it: the same bytes, as integers as wide as fits."""

    values: Tensor
    bitmask: Tensor
    sizes: dict[str, int]
    constants: dict[str, Any]


def _stored(values: Tensor, bitmask: Tensor, in_features: int, pattern: NMPattern) -> _Stored:
    """Chooses how the values of a group are fetched (expand.py), and how wide its mask is read."""
    n, m = pattern.n, pattern.m
    dtype, kept = values.dtype, values.shape[1]
    values, bitmask = values.contiguous(), bitmask.contiguous()
    mask = next(bits for bits in (32, 16, 8) if in_features % bits == 0 or bits == 8)  # at least m, which divides it
    if bitmask.data_ptr() % (mask // 8):
        bitmask = bitmask.clone()  # torch aligns it
    group = n * dtype.itemsize
    word = min(group, 8)
    if values.data_ptr() % word or (group not in _INTEGERS and (group, dtype.itemsize) != (16, 2)):
        expand = GATHER
    elif dtype.itemsize == 2:
        expand = PERMUTE if (n, m) == (2, 4) and mask > 8 else QUAD
    else:
        expand = WORD
    if expand is not GATHER:
        values = values.view(_INTEGERS[word])
    elif dtype == torch.float8_e4m3fn:
        values = values.view(torch.uint8)
    return _Stored(
        values,
        bitmask if mask == 8 else bitmask.view(_MASKS[mask]),
        {"in_features": in_features, "out_features": values.shape[0], "kept": kept, "stride": bitmask.shape[1]},
        {"N": n, "M": m, "DTYPE": _TRITON[dtype], "EXPAND": expand.value, "MASK": mask},
    )


def multiplied_in(activation: torch.dtype, weight: torch.dtype) -> torch.dtype:
    """The dtype of the products: the activations' where it holds every kept value exactly, else float32."""
    return activation if weight in (activation, *EIGHT_BITS) else torch.float32


def nm_linear(
    x: Tensor, values: Tensor, bitmask: Tensor, scale: Tensor | None, bias: Tensor | None, pattern: NMPattern,
    tile: Tile,
) -> Tensor:  # fmt: skip
    """Multiplies (tokens, in_features) by a packed weight, in programs of ``tile``; arguments as of the operator."""
    tokens, in_features = x.shape
    out_features = values.shape[0]
    y = x.new_empty((tokens, out_features))
    if y.numel() == 0:
        return y
    stored = _stored(values, bitmask, in_features, pattern)
    x = x.to(multiplied_in(x.dtype, values.dtype)).contiguous()
    bias = None if bias is None else bias.contiguous()
    split = tile.splits > 1
    partial = x.new_empty((tile.splits, tokens, out_features), dtype=torch.float32) if split else y
    grid = (triton.cdiv(out_features, tile.rows), triton.cdiv(tokens, tile.tokens), tile.splits)
    with torch.cuda.device_of(x):
        _nm_linear[grid](
            partial, x, stored.values, stored.bitmask, None if split else scale, None if split else bias, tokens,
            **stored.sizes, **stored.constants, BLOCK_O=tile.rows, BLOCK_K=tile.columns, BLOCK_T=tile.tokens,
            SPLIT=split, EVEN=in_features % tile.columns == 0, num_warps=tile.warps, num_stages=tile.stages,
            enable_fp_fusion=True,
        )  # fmt: skip
        if split:
            _add_splits[(triton.cdiv(y.numel(), _ADD_BLOCK),)](
                y,
                partial,
                scale,
                bias,
                y.numel(),
                out_features,
                SPLITS=tile.splits,
                BLOCK=_ADD_BLOCK,
                enable_fp_fusion=True,
            )
    return y


def expand(values: Tensor, bitmask: Tensor, in_features: int, pattern: NMPattern, dtype: torch.dtype) -> Tensor:
    """The dense (out_features, in_features) weight in ``dtype``; values of 8 bits without their scale.

    Cost: reads the packed weight and writes the dense one.
    """
    dense = values.new_empty((values.shape[0], in_features), dtype=dtype)
    if dense.numel() == 0:
        return dense
    stored = _stored(values, bitmask, in_features, pattern)
    grid = (triton.cdiv(in_features, _EXPAND_COLUMNS), triton.cdiv(values.shape[0], _EXPAND_ROWS))
    with torch.cuda.device_of(values):
        _expand[grid](
            dense, stored.values, stored.bitmask, **stored.sizes, **stored.constants, BLOCK_O=_EXPAND_ROWS,
            BLOCK_K=_EXPAND_COLUMNS, EVEN=in_features % _EXPAND_COLUMNS == 0, enable_fp_fusion=True,
        )  # fmt: skip
    return dense
