"""The order in which the CPU kernels read a weight: sixteen rows side by side (csrc/interleaved.h).

A packed weight is brought into it once, when it is loaded. The order is private to a process and never in a file.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from maskpro_kernels import _cpu
from maskpro_kernels.packing import NMWeight
from maskpro_kernels.pattern import NMPattern

DENSE = NMPattern(4, 4)
"""The pattern of a weight that keeps everything: no index is stored, and any in_features that 4 divides will do."""


@dataclass(frozen=True, eq=False)
class InterleavedWeight:
    """A weight as the CPU kernels read it.

    Attributes:
        data: uint8, on the CPU.
        scale: float32 (out_features,) for kept values of int8, else None.
        shape: (out_features, in_features) of the dense weight.
        pattern: the (N:M) pattern.
        dtype: of the kept values.
    """

    data: Tensor
    scale: Tensor | None
    shape: tuple[int, int]
    pattern: NMPattern
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that one product reads."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)


def interleave(weight: NMWeight) -> InterleavedWeight:
    """Brings a packed weight on the CPU into the kernels' order.

    Cost: reads the weight and writes as much, on all threads; both are in memory until the caller drops the first.
    """
    pattern = weight.pattern
    data = _cpu.interleave(
        weight.values.contiguous(), weight.bitmask.contiguous(), weight.shape[1], pattern.n, pattern.m,
        torch.get_num_threads(),
    )  # fmt: skip
    return InterleavedWeight(data, weight.scale, weight.shape, pattern, weight.values.dtype)


def interleave_dense(weight: Tensor) -> InterleavedWeight:
    """The same for a dense (out_features, in_features) weight: it is read in its own dtype, whatever the activations'.

    Raises:
        ValueError: 4 does not divide in_features.
    """
    DENSE.kept(weight.shape[1])
    data = _cpu.interleave(weight.contiguous(), None, weight.shape[1], DENSE.n, DENSE.m, torch.get_num_threads())
    return InterleavedWeight(data, None, (weight.shape[0], weight.shape[1]), DENSE, weight.dtype)


# values to (what they were made of, data)
_known: MutableMapping[Tensor, tuple[object, Tensor]] = WeakTensorKeyDictionary()
_lock = Lock()


def remembered(values: Tensor, bitmask: Tensor, in_features: int, pattern: NMPattern) -> Tensor:
    """The data of :func:`interleave`, made once for as long as ``values`` lives and neither it nor the bitmask changes.

    Args:
        values: (out_features, kept), on the CPU.
        bitmask: uint8 (out_features, ceil(in_features / 8)).
        in_features: columns of the weight.
        pattern: the (N:M) pattern.
    """
    state = (_version(values), _version(bitmask), bitmask.data_ptr(), pattern)
    with _lock:
        found = _known.get(values)
        if found is None or found[0] != state:
            data = _cpu.interleave(
                values.contiguous(), bitmask.contiguous(), in_features, pattern.n, pattern.m, torch.get_num_threads()
            )
            _known[values] = found = (state, data)
        return found[1]


def _version(tensor: Tensor) -> int:
    """Raised by every write in place; an inference tensor keeps no count."""
    return 0 if tensor.is_inference() else tensor._version
