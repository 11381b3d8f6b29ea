"""The operator ``torch.ops.maskpro.nm_linear``: schema, fake, CPU implementation, and its Python face."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from maskpro_kernels import _cpu
from maskpro_kernels.bits import bitmask_width
from maskpro_kernels.packing import NMWeight
from maskpro_kernels.pattern import NMPattern
from maskpro_kernels.reference import nm_linear_reference
from maskpro_kernels.support import select_backend

_library = torch.library.Library("maskpro", "DEF")
_library.define("nm_linear(Tensor x, Tensor values, Tensor bitmask, Tensor? bias, int n, int m) -> Tensor")


def nm_linear(x: Tensor, weight: NMWeight, bias: Tensor | None = None) -> Tensor:
    """Multiplies activations by an (N:M)-sparse weight: ``y = x @ W.T + bias``.

    Args:
        x: (..., in_features), float32, bfloat16 or float16.
        weight: packed weight, logically (out_features, in_features); N of every M consecutive inputs are kept.
        bias: (out_features,) or None.

    Returns:
        (..., out_features), dtype of x. Sums are float32; the error bound is tested, see tests/kernels.

    Raises:
        ValueError: in_features disagrees (the message gives both), or the bias does.
        UnsupportedKernelError: no backend covers (pattern, dtype, device); the message lists those that do.

    Cost: reads out * in * (N/M * dtype bytes + 1/8) bytes of weight; memory-bound for few tokens.
    Source: FORMAT.md for the layout; MaskPro (arXiv:2506.12876) for the pattern.
    """
    return torch.ops.maskpro.nm_linear(x, weight.values, weight.bitmask, bias, weight.pattern.n, weight.pattern.m)


# Called for every linear of every step: a microsecond here is one per cent of a small model's token.
_pattern = functools.cache(NMPattern)


def _check(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, pattern: NMPattern) -> None:
    if x.dim() < 1 or values.dim() != 2 or bitmask.dim() != 2:
        raise ValueError(
            f"nm_linear: expected x (..., in_features), values and bitmask of two dimensions, found {tuple(x.shape)}, "
            f"{tuple(values.shape)} and {tuple(bitmask.shape)}"
        )
    if bitmask.dtype != torch.uint8:
        raise ValueError(f"nm_linear: bitmask: expected torch.uint8, found {bitmask.dtype}")
    if not x.device == values.device == bitmask.device:
        raise ValueError(f"nm_linear: x on {x.device}, values on {values.device}, bitmask on {bitmask.device}")
    in_features = x.shape[-1]
    out_features = values.shape[0]
    weight_in = values.shape[1] // pattern.n * pattern.m
    if weight_in != in_features or values.shape[1] % pattern.n:
        raise ValueError(
            f"nm_linear: x has in_features = {in_features}, but a {pattern} weight with {values.shape[1]} kept "
            f"values per row has {weight_in}"
        )
    if tuple(bitmask.shape) != (out_features, bitmask_width(in_features)):
        raise ValueError(
            f"nm_linear: bitmask of shape {tuple(bitmask.shape)}, expected {(out_features, bitmask_width(in_features))}"
        )
    if bias is None:
        return
    if tuple(bias.shape) != (out_features,):
        raise ValueError(f"nm_linear: bias of shape {tuple(bias.shape)}, expected {(out_features,)}")
    if bias.device != x.device or not bias.is_floating_point() or (bias.itemsize > 4 and x.itemsize <= 4):
        raise ValueError(
            f"nm_linear: bias: expected a 16 or 32 bit float on {x.device}, found {bias.dtype} {bias.device}"
        )


def _forward(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    pattern = _pattern(n, m)
    _check(x, values, bitmask, bias, pattern)
    backend = select_backend(pattern, x.dtype, values.dtype, x.device.type)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if backend.isa is None:
        y = nm_linear_reference(rows, values, bitmask, bias)
    else:
        y = _cpu.nm_linear(
            rows.contiguous(),
            values.contiguous(),
            bitmask.contiguous(),
            None if bias is None else bias.contiguous(),
            n,
            m,
            backend.isa,
            torch.get_num_threads(),
        )
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], values.shape[0])


def _fake(x: Tensor, values: Tensor, bitmask: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


_library.impl("nm_linear", _forward, "CPU")
_library.impl("nm_linear", _forward, "CUDA")
torch.library.register_fake("maskpro::nm_linear", _fake, lib=_library)
