"""The operators of torch.ops.maskpro, their fakes and implementations, and their Python face.

``nm_linear`` takes a weight as it is stored; on a CUDA GPU it chooses its kernel by the number of tokens, see
cuda/dispatch.py. ``nm_linear_interleaved`` takes it as the CPU kernels read it, is written in C++ (csrc/torch_ops.cpp),
and runs on the instruction set that its caller chose: see :attr:`Backend.isa_code`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from maskpro_kernels import _cpu
from maskpro_kernels.bits import bitmask_width
from maskpro_kernels.errors import NativeLibraryError
from maskpro_kernels.interleaved import InterleavedWeight, remembered
from maskpro_kernels.packing import EIGHT_BITS, NMWeight
from maskpro_kernels.pattern import NMPattern
from maskpro_kernels.reference import nm_linear_reference
from maskpro_kernels.support import select_backend

_library = torch.library.Library("maskpro", "DEF")
_library.define(
    "nm_linear(Tensor x, Tensor values, Tensor bitmask, Tensor? scale, Tensor? bias, int n, int m) -> Tensor"
)
_library.define(
    "nm_linear_interleaved(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, int out_features, int in_features, "
    "int n, int m, ScalarType dtype, int isa, Tensor? x_scale=None) -> Tensor"
)


def nm_linear(x: Tensor, weight: NMWeight | InterleavedWeight, bias: Tensor | None = None) -> Tensor:
    """Multiplies activations by an (N:M)-sparse weight: ``y = x @ W.T + bias``.

    Args:
        x: (..., in_features), float32, bfloat16 or float16.
        weight: packed weight, logically (out_features, in_features); N of every M consecutive inputs are kept. The CPU
            kernels need it interleaved: a packed one is, at its first use, and takes its memory twice from then on.
        bias: (out_features,) or None.

    Returns:
        (..., out_features), dtype of x. Sums are float32; the error bound is tested, see tests/kernels.

    Raises:
        ValueError: in_features disagrees (the message gives both), or the bias does.
        UnsupportedKernelError: no backend covers (pattern, dtype, device); the message lists those that do.

    Cost: on the CPU reads N/M * (dtype bits + 2 for M = 4, 3.2 for 8, 4 for 16, 5.3 for 32) bits a weight; memory-bound
        for few tokens.
    Source: FORMAT.md for the layout; MaskPro (arXiv:2506.12876) for the pattern.
    """
    n, m = weight.pattern.n, weight.pattern.m
    if isinstance(weight, NMWeight):
        return torch.ops.maskpro.nm_linear(x, weight.values, weight.bitmask, weight.scale, bias, n, m)
    return torch.ops.maskpro.nm_linear_interleaved(
        x, weight.data, weight.scale, bias, *weight.shape, n, m, weight.dtype, weight.isa, weight.x_scale
    )


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
    _check_bias(x, bias, out_features)


def _check_bias(x: Tensor, bias: Tensor | None, out_features: int) -> None:
    if bias is None:
        return
    if tuple(bias.shape) != (out_features,):
        raise ValueError(f"nm_linear: bias of shape {tuple(bias.shape)}, expected {(out_features,)}")
    if bias.device != x.device or not bias.is_floating_point() or (bias.itemsize > 4 and x.itemsize <= 4):
        raise ValueError(
            f"nm_linear: bias: expected a 16 or 32 bit float on {x.device}, found {bias.dtype} {bias.device}"
        )


def _check_scale(x: Tensor, scale: Tensor | None, dtype: torch.dtype, out_features: int) -> None:
    if scale is None:
        if dtype in EIGHT_BITS:
            raise ValueError(f"nm_linear: expected a scale with {dtype} weights, found none")
        return
    fits = scale.dtype == torch.float32 and tuple(scale.shape) == (out_features,) and scale.is_contiguous()
    if not fits or scale.device != x.device:
        raise ValueError(
            f"nm_linear: scale: expected contiguous torch.float32 {(out_features,)} on {x.device}, found {scale.dtype} "
            f"{tuple(scale.shape)} on {scale.device}"
        )


def _forward(
    x: Tensor, values: Tensor, bitmask: Tensor, scale: Tensor | None, bias: Tensor | None, n: int, m: int
) -> Tensor:
    pattern = _pattern(n, m)
    _check(x, values, bitmask, bias, pattern)
    _check_scale(x, scale, values.dtype, values.shape[0])
    rows = x.reshape(-1, x.shape[-1])
    if x.device.type == "cuda":
        return _on_cuda()(rows, values, bitmask, scale, bias, pattern).reshape(*x.shape[:-1], values.shape[0])
    backend = select_backend(pattern, x.dtype, values.dtype, "cpu")
    if backend.isa is None:
        return nm_linear_reference(rows, values, bitmask, scale, bias).reshape(*x.shape[:-1], values.shape[0])
    weight = remembered(values, bitmask, x.shape[-1], pattern)
    return torch.ops.maskpro.nm_linear_interleaved(
        x, weight, scale, bias, values.shape[0], x.shape[-1], n, m, values.dtype, backend.isa_code
    )


@functools.cache
def _on_cuda() -> Callable[..., Tensor]:
    """The dispatch among GPU kernels: imported where a GPU is used."""
    from maskpro_kernels.cuda.dispatch import nm_linear as on_cuda

    return on_cuda


def _fake(
    x: Tensor, values: Tensor, bitmask: Tensor, scale: Tensor | None, bias: Tensor | None, n: int, m: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _fake_interleaved(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, out_features: int, in_features: int, n: int,
    m: int, dtype: torch.dtype, isa: int, x_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], out_features))


_library.impl("nm_linear", _forward, "CPU")
_library.impl("nm_linear", _forward, "CUDA")
torch.library.register_fake("maskpro::nm_linear", _fake, lib=_library)
torch.library.register_fake("maskpro::nm_linear_interleaved", _fake_interleaved, lib=_library)
# Where there is no library, select_backend says so when a CPU kernel is asked for.
with contextlib.suppress(NativeLibraryError):
    _cpu.library()
