"""8-bit weights against dense ones: int8 against torch._int_mm, e4m3 against torch._scaled_mm, both with activations of
8 bits, rounded for each token as part of what is timed; and the bfloat16 product that a server would run instead.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from kernel_table import LEAST_BYTES, SHAPES, TOKENS, backend_of, captured, copy, timed
from rows import Rows
from torch import Tensor
from torch.nn import functional as F

from maskpro_kernels import NMPattern, NMWeight, nm_linear, pack, to_int8
from maskpro_kernels.activations import LARGEST, EightBitInputs
from maskpro_kernels.bits import unpack_bits
from maskpro_kernels.cuda import prepare
from maskpro_kernels.cuda.semi_structured import EightBitWeight
from maskpro_kernels.reference import nm_linear_reference, nm_linear_w8a8_reference
from maskpro_kernels.triton.round_inputs import round_inputs

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LEAST_CAPABILITY = {"int8": (8, 0), "fp8": (8, 9)}
_TOKENS = 32
"""Products have a multiple of this: torch._int_mm wants more than 16, cuSPARSELt a multiple of 16."""


def problems(everything: bool) -> Iterator[tuple[str, str, int]]:
    """Names of dtypes and shapes, and tokens."""
    shapes = list(SHAPES) if everything else ["8B down", "8B qkv"]
    for tokens, kind, name in itertools.product(TOKENS if everything else (1024, 16), DTYPES, shapes):
        yield kind, name, tokens


def w8a8_rows(rows: Rows, everything: bool) -> None:
    for kind, name, tokens in problems(everything):
        if torch.cuda.get_device_capability() < _LEAST_CAPABILITY[kind]:
            continue
        shape = SHAPES[name]
        key = f"{kind} {name} {shape[0]}x{shape[1]} {tokens}"
        rows.row(key, lambda s=shape, k=kind, t=tokens: compare(s, DTYPES[k], t), needs=20)


def compare(shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> dict[str, Any]:
    """One row. ``ratio`` is of whole layers; ``product ratio`` of cuSPARSELt's product and the dense one alone."""
    weight, inputs = eight_bit(torch.randn(shape, device="cuda") * shape[1] ** -0.5, dtype), EightBitInputs(dtype)
    dense = dense_levels(weight)
    x = torch.randn((tokens, shape[1]), device="cuda").bfloat16()
    levels, scale = round_inputs(x, inputs, _TOKENS)
    ours = [prepare(weight, torch.bfloat16, tokens, inputs)]
    while len(ours) * weight.nbytes < LEAST_BYTES:
        ours.append(prepare(copy(weight), torch.bfloat16, tokens, inputs))
    backend = backend_of(ours[0], x)
    check(x, ours[0].weight, dense, inputs, rounds=backend.startswith("cusparselt"))
    theirs = [dense] + [dense.clone() for _ in range(LEAST_BYTES // dense.nbytes)]
    wide = [dense.bfloat16() for _ in range(1 + LEAST_BYTES // (2 * dense.nbytes))]
    calls = {
        "ours": [lambda p=p: nm_linear(x, p.weight) for p in ours],
        "dense": [lambda w=w: dense_w8a8(x, w, weight.scale, inputs) for w in theirs],
        "dense product": [lambda w=w: product(levels, scale, w, weight.scale) for w in theirs],
        "bfloat16": [lambda w=w: F.linear(x, w) for w in wide],
    }
    if (sparse := ours[0].metadata.eight_bit) is not None:
        calls["product"] = [lambda p=p: sparse_product(levels, p.metadata.eight_bit) for p in ours]
    times = timed({name: (captured(of), len(of)) for name, of in calls.items()})
    us = {name: statistics.median(of) * 1e6 for name, of in times.items()}
    row = {
        "backend": backend, "us": us["ours"], "dense us": us["dense"], "ratio": us["dense"] / us["ours"],
        "bfloat16 us": us["bfloat16"], "to bfloat16": us["bfloat16"] / us["ours"],
        "dense product us": us["dense product"],
    }  # fmt: skip
    if sparse is not None:
        row |= {"product us": us["product"], "product ratio": us["dense product"] / us["product"]}
    return row


def eight_bit(dense: Tensor, dtype: torch.dtype) -> NMWeight:
    """A 2:4 weight of int8 or e4m3 values, with a scale for each row."""
    weight = pack(dense, NMPattern(2, 4))
    if dtype == torch.int8:
        return to_int8(weight)
    scale = weight.values.abs().amax(1) / LARGEST[dtype]
    return NMWeight((weight.values / scale[:, None]).to(dtype), weight.bitmask, weight.shape, weight.pattern, scale)


def dense_levels(weight: NMWeight) -> Tensor:
    """(out_features, in_features) of the values' dtype, zeros where nothing is kept."""
    dense = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.values.device)
    mask = unpack_bits(weight.bitmask, weight.shape[1])
    return dense.masked_scatter_(mask, weight.values.view(torch.uint8)).view(weight.values.dtype)


def dense_w8a8(x: Tensor, dense: Tensor, weight_scale: Tensor, inputs: EightBitInputs) -> Tensor:
    """The whole layer of dense 8-bit weights, bfloat16 in and out."""
    levels, scale = round_inputs(x, inputs, _TOKENS)
    y = product(levels, scale, dense, weight_scale)[: x.shape[0]]
    return y if y.dtype == x.dtype else (y * scale[: x.shape[0]] * weight_scale).to(x.dtype)


def product(levels: Tensor, scale: Tensor, dense: Tensor, weight_scale: Tensor) -> Tensor:
    """int32 without the scales, or bfloat16 with them: what torch's operators give."""
    if levels.dtype == torch.int8:
        return torch._int_mm(levels, dense.t())
    return torch._scaled_mm(levels, dense.t(), scale, weight_scale[None, :], out_dtype=torch.bfloat16)


def sparse_product(levels: Tensor, weight: EightBitWeight) -> Tensor:
    return torch._cslt_sparse_mm(
        weight.buffer, levels.t(), alpha=weight.alpha, out_dtype=torch.bfloat16, transpose_result=True
    )


def check(x: Tensor, weight: NMWeight, dense: Tensor, inputs: EightBitInputs, rounds: bool) -> None:
    """Both sides compute the same layer: the dense one of rounded activations, ours too if its backend ``rounds``.

    Raises:
        AssertionError: a result is off by more than rounding to bfloat16 explains.
    """
    some = x[:256]
    assert weight.scale is not None
    parts = (weight.values, weight.bitmask, weight.scale, None)
    rounded = nm_linear_w8a8_reference(some.float(), *parts, inputs)
    plain = nm_linear_reference(some.float(), *parts)
    for name, y, of in (
        ("ours", nm_linear(x, weight), rounded if rounds else plain),
        ("dense", dense_w8a8(x, dense, weight.scale, inputs), rounded),
    ):
        error = (y[:256].float() - of).norm() / of.norm()
        assert error <= 2**-7, f"{name}: error {error:.3g} of the norm"
