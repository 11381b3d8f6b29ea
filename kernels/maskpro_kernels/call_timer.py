"""Times one call in N of the CPU kernels, for whoever serves metrics; nothing is timed until somebody asks.

It sits beneath the operator (csrc/torch_ops.cpp), where torch.compile does not look: the same calls are seen in eager
and compiled models. Kernels of other devices run after their call returns, and under CUDA graphs without any; they are
not timed here.
"""

from __future__ import annotations

import functools
from typing import Protocol

from maskpro_kernels import _cpu
from maskpro_kernels.pattern import NMPattern


class Observer(Protocol):
    """Takes one timed call."""

    def __call__(self, backend: str, pattern: NMPattern, tokens: int, weight_bytes: int, seconds: float) -> None:
        """``tokens`` is the number of rows multiplied, ``weight_bytes`` what the kernel read of its weight."""


_observer: Observer | None = None
_pattern = functools.cache(NMPattern)
_BACKENDS = {code: f"cpu-{isa}" for isa, code in _cpu.ISA_CODES.items()}


def _report(isa: int, n: int, m: int, tokens: int, weight_bytes: int, seconds: float) -> None:
    if (observer := _observer) is not None:
        observer(_BACKENDS[isa], _pattern(n, m), tokens, weight_bytes, seconds)


_REPORT = _cpu.OBSERVER(_report)  # one for ever: a call under way in another thread may still hold it
_NOBODY = _cpu.OBSERVER()


def observe_calls(observer: Observer | None, every: int) -> None:
    """Hands one call in ``every`` to the observer, from the calling thread; None stops that.

    Cost: some nanoseconds a call, and the observer's own time for those that are sampled. A prime period that does not
    divide the calls of a forward pass visits every layer alike.

    Raises:
        ValueError: ``every`` is less than 1.
        NativeLibraryError: there are no native kernels to observe.
    """
    global _observer
    if every < 1:
        raise ValueError(f"observe_calls: expected every >= 1, found {every}")
    _observer = observer
    _cpu.library().maskpro_observe_calls(_NOBODY if observer is None else _REPORT, every)
