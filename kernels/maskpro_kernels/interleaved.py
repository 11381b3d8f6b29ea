"""The order in which the CPU kernels read a weight: sixteen rows side by side (csrc/interleaved.h).

A packed weight is brought into it once, when it is loaded. The order is private to a process and never in a file.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from maskpro_kernels import _cpu
from maskpro_kernels.activations import EightBitInputs
from maskpro_kernels.bits import pack_bits
from maskpro_kernels.packing import WEIGHT_DTYPES, NMWeight
from maskpro_kernels.pattern import NMPattern
from maskpro_kernels.support import Backend, select_backend

_ROWS = 16
MOST_ROUNDED = (1 << 18) - 4
"""The largest in_features for which sums of 8-bit products of 2:4 fit 32 bits."""
DENSE = NMPattern(4, 4)
"""The pattern of a weight that keeps everything: no index is stored, and any in_features that 4 divides will do."""


@dataclass(frozen=True, eq=False)
class InterleavedWeight:
    """A weight as the CPU kernels read it.

    Attributes:
        data: uint8, on the CPU.
        scale: float32 (out_features,), what a row's values are multiples of; or None, but not for int8.
        shape: (out_features, in_features) of the dense weight.
        pattern: the (N:M) pattern.
        dtype: of the kept values.
        isa: the instruction set that MASKPRO_KERNEL or the machine chose for it, :attr:`Backend.isa_code`.
        x_scale: float32, one number: what activations are rounded to multiples of, if the backend rounds them; None
            gives every token its own.
    """

    data: Tensor
    scale: Tensor | None
    shape: tuple[int, int]
    pattern: NMPattern
    dtype: torch.dtype
    isa: int
    x_scale: Tensor | None = None

    @property
    def backend(self) -> str:
        """The name of what multiplies it."""
        return _cpu.BACKENDS[self.isa]

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)


def interleave(weight: NMWeight, inputs: EightBitInputs | None = None) -> InterleavedWeight:
    """Brings a packed weight on the CPU into the kernels' order.

    Args:
        weight: packed.
        inputs: how activations may be rounded, where that is faster; None if they may not.

    Raises:
        UnsupportedKernelError: no backend covers it.
        ValueError: the weight is on another device, or MASKPRO_KERNEL asks for a backend that reads stored weights.

    Cost: reads the weight and writes as much, on all threads; both are in memory until the caller drops the first.
    """
    _on_cpu(weight.values)
    dtype, columns = weight.values.dtype, weight.shape[1]
    may_round = inputs is not None and inputs.dtype == dtype and columns <= MOST_ROUNDED
    backend = _backend(weight.pattern, dtype, may_round=may_round)
    data = _interleaved(weight.values, weight.bitmask, columns, weight.pattern)
    scale = None if weight.scale is None else weight.scale.contiguous()
    x_scale = inputs.scale if inputs is not None and backend.rounds else None
    return InterleavedWeight(data, scale, weight.shape, weight.pattern, dtype, backend.isa_code, x_scale)


def interleave_dense(weight: Tensor, scale: Tensor | None = None) -> InterleavedWeight:
    """The same for a dense (out_features, in_features) weight: it is read in its own dtype, whatever the activations'.

    Args:
        weight: of 16 or 32 bit floats; or int8, in units of the scale.
        scale: float32 (out_features,), with int8 only.

    Raises:
        ValueError: 4 does not divide in_features, another dtype, a scale beside floats or none beside int8, or the
            weight is on another device.
    """
    _on_cpu(weight)
    if weight.dtype not in (*WEIGHT_DTYPES, torch.int8):
        raise ValueError(f"interleave: expected one of {(*WEIGHT_DTYPES, torch.int8)}, found {weight.dtype}")
    if (scale is not None) != (weight.dtype == torch.int8):
        raise ValueError(f"interleave: expected a scale with int8 and with nothing else, found {weight.dtype}")
    DENSE.kept(weight.shape[1])
    backend = _backend(DENSE, weight.dtype)
    data = _cpu.interleave(weight.contiguous(), None, weight.shape[1], DENSE.n, DENSE.m, torch.get_num_threads())
    return InterleavedWeight(data, scale, (weight.shape[0], weight.shape[1]), DENSE, weight.dtype, backend.isa_code)


def packed_again(weight: InterleavedWeight) -> NMWeight:
    """The inverse of :func:`interleave`, to the bit: what a checkpoint stores.

    Cost: a few passes over the weight, with 8 bytes of temporaries for each kept value. Not for a hot path.
    """
    (rows, columns), pattern = weight.shape, weight.pattern
    index_bits = 0 if pattern.n == pattern.m else {4: 2, 8: 3, 16: 4, 32: 5}[pattern.m]
    slots, index_bytes = (32 // index_bits, 4 * _ROWS) if index_bits else (_ROWS, 0)
    kept = pattern.kept(columns)
    chunks = (kept + slots - 1) // slots
    stored = weight.data.reshape(-1, chunks, index_bytes + slots * _ROWS * weight.dtype.itemsize)
    pair = 2 if weight.dtype == torch.bfloat16 else 1
    dealt = stored[:, :, index_bytes:].contiguous().view(weight.dtype).reshape(-1, chunks, slots // pair, _ROWS, pair)
    values = dealt.permute(0, 3, 1, 2, 4).reshape(-1, chunks * slots)[:rows, :kept].contiguous()
    mask = torch.ones if index_bits == 0 else torch.zeros
    bits = mask((rows, columns), dtype=torch.bool, device=stored.device)
    if index_bits:
        words = stored[:, :, :index_bytes].contiguous().view(torch.int32)
        shifts = torch.arange(slots, dtype=torch.int32, device=stored.device) * index_bits
        index = (words.unsqueeze(-1) >> shifts) & ((1 << index_bits) - 1)
        index = index.permute(0, 2, 1, 3).reshape(-1, chunks * slots)[:rows, :kept]
        groups = torch.arange(kept, device=stored.device) // pattern.n * pattern.m
        bits.scatter_(1, index + groups, True)
    return NMWeight(values, pack_bits(bits), weight.shape, pattern, weight.scale)


def _backend(pattern: NMPattern, dtype: torch.dtype, *, may_round: bool = False) -> Backend:
    # One that takes float32 takes 16 bits as well.
    backend = select_backend(pattern, torch.float32, dtype, "cpu", may_round=may_round)
    if backend.isa is None:
        raise ValueError(f"interleave: {backend.name} reads weights as they are stored, not interleaved ones")
    return backend


def _on_cpu(weight: Tensor) -> None:
    if weight.device.type != "cpu":
        raise ValueError(f"interleave: expected a weight on the CPU, found one on {weight.device}")


@dataclass(frozen=True)
class _Remembered:
    """What an interleaved weight was made of, and it."""

    state: tuple[object, ...]
    bitmask: weakref.ref[Tensor]
    data: Tensor


_known: MutableMapping[Tensor, _Remembered] = WeakTensorKeyDictionary()
_lock = Lock()


def remembered(values: Tensor, bitmask: Tensor, in_features: int, pattern: NMPattern) -> Tensor:
    """The data of :func:`interleave`, made once for as long as the same two tensors are given.

    Made anew where PyTorch counts a write to one of them, or either has other storage, dtype or shape. Writes through
    ``.data`` are not counted; nor are any to inference tensors, for which it is made every time.

    Args:
        values: (out_features, kept), on the CPU.
        bitmask: uint8 (out_features, ceil(in_features / 8)).
        in_features: columns of the weight.
        pattern: the (N:M) pattern.
    """
    if values.is_inference() or bitmask.is_inference():
        return _interleaved(values, bitmask, in_features, pattern)
    state = (*_identity(values), *_identity(bitmask), pattern)
    with _lock:
        found = _known.get(values)
    if found is None or found.state != state or found.bitmask() is not bitmask:
        found = _Remembered(state, weakref.ref(bitmask), _interleaved(values, bitmask, in_features, pattern))
        with _lock:
            _known[values] = found
    return found.data


def _identity(tensor: Tensor) -> tuple[object, ...]:
    return tensor._version, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _interleaved(values: Tensor, bitmask: Tensor, in_features: int, pattern: NMPattern) -> Tensor:
    return _cpu.interleave(
        values.contiguous(), bitmask.contiguous(), in_features, pattern.n, pattern.m, torch.get_num_threads()
    )
