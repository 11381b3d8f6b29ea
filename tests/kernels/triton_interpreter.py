"""What Triton's interpreter lacks of a GPU for our kernels; used by programs that chose it before importing Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


@triton.jit
def byte_permute(low, high, selector):
    """The PRMT instruction (PTX ISA, prmt.b32, default mode), which the interpreter cannot call."""
    result = tl.zeros(selector.shape, tl.uint32)
    for i in tl.static_range(4):
        byte = (selector.to(tl.uint32) >> (4 * i)) & 7
        word = tl.where(byte < 4, low.to(tl.uint32), high.to(tl.uint32))
        result |= ((word >> (8 * (byte & 3))) & 0xFF) << (8 * i)
    return result.to(tl.int32)


def _as_float(handle: TensorHandle) -> np.ndarray:
    if handle.dtype.scalar == tl.bfloat16:  # the interpreter keeps its bits in uint16
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    return handle.data.astype(np.float32)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """A product in float32; the interpreter's own takes the bits of bfloat16 for integers."""
    return TensorHandle(_as_float(a) @ _as_float(b) + d.data, d.dtype.scalar)


def _signed_to_float(self, source, to):
    """By way of float32; the interpreter's own makes integers the bits of a bfloat16."""
    if to.scalar != tl.bfloat16:
        return self.cast_impl(source, to)
    return self.cast_impl(self.cast_impl(source, tl.float32), tl.bfloat16)


def _float_to_float(self, source, to, rounding_mode):
    """To e4m3 by torch: the interpreter's own rounds ties up, and loses a carry into the exponent."""
    if to.scalar != tl.float8e4nv or source.dtype.scalar != tl.float32:
        return _interpreted_float_to_float(self, source, to, rounding_mode)
    rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.float8_e4m3fn)
    return TensorHandle(rounded.view(torch.uint8).numpy(), to.scalar)


_interpreted_float_to_float = InterpreterBuilder.create_fp_to_fp


def save(run: Callable[[Any], Any], cases: Iterable[Any], path: str) -> None:
    """What a test module does as a program: saves the result of every case, run in the completed interpreter."""
    _complete()
    torch.save([run(case) for case in cases], path)


def _complete() -> None:
    """Completes the interpreter, and gives it our byte permutation."""
    from maskpro_kernels.triton import permute

    InterpreterBuilder.create_dot = _dot
    InterpreterBuilder.create_si_to_fp = _signed_to_float
    InterpreterBuilder.create_fp_to_fp = _float_to_float
    permute._byte_permute = byte_permute
