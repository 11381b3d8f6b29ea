"""Times one call in N of the CPU kernels, for whoever serves metrics; nothing is timed until somebody asks.

It sits beneath the operators, where torch.compile does not look: the same calls are seen in eager and compiled models.
Kernels of other devices run after their call returns, and under CUDA graphs without any; they are not timed here.
"""

from __future__ import annotations

import time
from typing import Protocol

from maskpro_kernels.pattern import NMPattern


class Observer(Protocol):
    """Takes one timed call."""

    def __call__(self, backend: str, pattern: NMPattern, tokens: int, weight_bytes: int, seconds: float) -> None:
        """``tokens`` is the number of rows multiplied, ``weight_bytes`` what the kernel read of its weight."""


_observer: Observer | None = None
_every = 1
_left = 1


def observe_calls(observer: Observer | None, every: int) -> None:
    """Hands one call in ``every`` to the observer, from the calling thread; None stops that.

    Cost: 0.1 microseconds a call, and the observer's own time for those that are sampled. A prime period that does not
    divide the calls of a forward pass visits every layer alike.

    Raises:
        ValueError: ``every`` is less than 1.
    """
    global _observer, _every, _left
    if every < 1:
        raise ValueError(f"observe_calls: expected every >= 1, found {every}")
    _observer, _every, _left = observer, every, every


def start() -> int:
    """A time stamp for :func:`stop` if this call is to be timed, else 0."""
    global _left
    if _observer is None:
        return 0
    _left -= 1
    if _left > 0:
        return 0
    _left = _every
    return time.perf_counter_ns()


def stop(started: int, backend: str, pattern: NMPattern, tokens: int, weight_bytes: int) -> None:
    """Reports a call that :func:`start` chose."""
    seconds = (time.perf_counter_ns() - started) / 1e9
    if _observer is not None:
        _observer(backend, pattern, tokens, weight_bytes, seconds)
