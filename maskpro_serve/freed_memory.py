"""What loading a model has freed goes back to the system."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Gives freed pages of glibc's heap back; does nothing under another C library or allocator.

    A model loads layer by layer and frees each layer's stored form; glibc keeps such holes for later allocations, which
    never come.
    """
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
