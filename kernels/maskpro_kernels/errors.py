"""Errors of the kernels package.

ValueError                    the caller's arguments disagree with each other
    UnsupportedKernelError    they agree, but no backend covers them here
ImportError
    NativeLibraryError        the compiled library is missing, foreign or too old
"""

from __future__ import annotations


class UnsupportedKernelError(ValueError):
    """No backend covers (pattern, dtype, device); the message lists those that do."""


class NativeLibraryError(ImportError):
    """The compiled library cannot be used; the message says what to run."""
