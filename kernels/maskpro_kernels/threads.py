"""On which cores the CPU kernels run."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch

from maskpro_kernels import _cpu


def bind_threads(cores: Sequence[int]) -> None:
    """Binds the calling thread and the OpenMP threads that work for it, torch's too, to one core each, until they end.

    Unbound, both may find themselves on one core for a while, and what they share then takes twice its time.

    Args:
        cores: at least one; the calling thread gets the first, and torch as many threads as there are.

    Raises:
        ValueError: this process may not run on one of them.
        NativeLibraryError: the native library is not installed.
    """
    allowed = _allowed()
    if cores and allowed.issuperset(cores):
        torch.set_num_threads(len(cores))
        if _cpu.bind_threads(cores):
            return
    wanted, found = (", ".join(map(str, sorted(some))) for some in (cores, allowed))
    raise ValueError(f"threads cannot be bound to cores {wanted or '(none)'}: this process may run on {found}")


@functools.cache
def _allowed() -> frozenset[int]:
    """The cores of this process, before the calling thread was bound to one of them."""
    return frozenset(os.sched_getaffinity(0))
