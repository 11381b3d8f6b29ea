"""What loading and compiling a model has freed goes back to the system."""

from __future__ import annotations

import ctypes


def return_freed_memory() -> None:
    """Gives freed pages of the heap back, of glibc or of a preloaded tcmalloc; does nothing under others.

    A model loads layer by layer and frees each layer's stored form, and compiling it takes what serving does not
    need; an allocator keeps such holes for later allocations, which never come.
    """
    process = ctypes.CDLL(None)
    if release := getattr(process, "MallocExtension_ReleaseFreeMemory", None):
        release()
    elif trim := getattr(process, "malloc_trim", None):
        trim(0)
