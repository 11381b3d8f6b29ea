"""Times one call in N of the CPU kernels, for whoever serves metrics; nothing is timed until somebody asks.

It sits beneath the operator (csrc/call_samples.h), where torch.compile does not look: the same calls are seen in eager
and compiled models. Kernels of other devices run after their call returns; they are not timed here.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from threading import Lock

from maskpro_kernels import _cpu
from maskpro_kernels.errors import NativeLibraryError
from maskpro_kernels.pattern import NMPattern

MOST_WAITING = 4096
"""Calls that are kept until they are taken; those beyond are dropped."""
_pattern = functools.cache(NMPattern)
_buffer = (_cpu.Sample * MOST_WAITING)()
_lock = Lock()


@dataclass(frozen=True, slots=True)
class TimedCall:
    """One call of ``nm_linear``.

    Attributes:
        backend: what ran it.
        pattern: of its weight.
        tokens: rows multiplied.
        weight_bytes: what the kernel read of its weight.
        seconds: how long that took.
    """

    backend: str
    pattern: NMPattern
    tokens: int
    weight_bytes: int
    seconds: float


def time_calls(every: int) -> None:
    """Times one call in ``every`` from now on, in this process; 0 stops that. Without native kernels there are none.

    Cost: an atomic decrement a call, two clock readings for one that is timed. A prime period that does not divide the
    calls of a forward pass visits every layer alike.

    Raises:
        ValueError: ``every`` is negative.
    """
    if every < 0:
        raise ValueError(f"time_calls: expected every >= 0, found {every}")
    try:
        library = _cpu.library()
    except NativeLibraryError:
        return
    library.maskpro_sample_calls(min(every, 2**63 - 1))


def take_timed() -> list[TimedCall]:
    """The calls timed since the last time, oldest first; at most :data:`MOST_WAITING`."""
    try:
        library = _cpu.library()
    except NativeLibraryError:
        return []
    with _lock:
        count = library.maskpro_take_samples(ctypes.addressof(_buffer), MOST_WAITING)
        return [
            TimedCall(_cpu.BACKENDS[one.isa], _pattern(one.n, one.m), one.tokens, one.weight_bytes, one.seconds)
            for one in _buffer[:count]
        ]
