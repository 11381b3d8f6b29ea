"""Which backend covers what, in one table; and the choice among them, by MASKPRO_KERNEL or by order."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch

from maskpro_kernels import _cpu
from maskpro_kernels.errors import NativeLibraryError, UnsupportedKernelError
from maskpro_kernels.packing import WEIGHT_DTYPES
from maskpro_kernels.pattern import NMPattern

ENVIRONMENT_VARIABLE = "MASKPRO_KERNEL"


@dataclass(frozen=True)
class Backend:
    """One way to run ``nm_linear``.

    Attributes:
        name: the metric label and the value of MASKPRO_KERNEL.
        devices: torch device types it runs on.
        activation_dtypes: dtypes of x it takes.
        weight_dtypes: dtypes of the kept values it takes.
        isa: the native instruction set, or None for the reference.
    """

    name: str
    devices: tuple[str, ...]
    activation_dtypes: tuple[torch.dtype, ...]
    weight_dtypes: tuple[torch.dtype, ...]
    isa: str | None = None

    def covers(self, activation: torch.dtype, weight: torch.dtype, device: str) -> bool:
        return device in self.devices and activation in self.activation_dtypes and weight in self.weight_dtypes

    @property
    def unavailable(self) -> str | None:
        """Why this machine cannot run it, or None if it can."""
        if self.isa is None:
            return None
        try:
            return None if self.isa in _cpu.available_isas() else f"this machine has no {self.isa}"
        except NativeLibraryError as error:
            return str(error)


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_KEPT = (*WEIGHT_DTYPES, torch.int8)

# In order of preference. Every backend takes every NMPattern.
BACKENDS = (
    Backend("cpu-avx512", ("cpu",), _FLOATS, _KEPT, isa="avx512"),
    Backend("cpu-avx2", ("cpu",), _FLOATS, _KEPT, isa="avx2"),
    Backend("cpu-portable", ("cpu",), _FLOATS, _KEPT, isa="portable"),
    Backend("reference", ("cpu", "cuda"), (*_FLOATS, torch.float64), (*_KEPT, torch.float64)),
)
"""What runs where. The reference is chosen by name only: `auto` never falls back to it in silence."""

_FAMILIES = ("auto", "cpu")


def select_backend(pattern: NMPattern, activation: torch.dtype, weight: torch.dtype, device: str) -> Backend:
    """The backend that runs ``nm_linear`` for these types, as MASKPRO_KERNEL asks.

    Args:
        pattern: the (N:M) pattern of the weight.
        activation: dtype of x.
        weight: dtype of the kept values.
        device: torch device type, ``cpu`` or ``cuda``.

    Raises:
        UnsupportedKernelError: none covers them; the message says why for each candidate.
        ValueError: MASKPRO_KERNEL names no backend.
    """
    return _select(os.environ.get(ENVIRONMENT_VARIABLE, "auto"), pattern, activation, weight, device)


@functools.cache
def _select(request: str, pattern: NMPattern, activation: torch.dtype, weight: torch.dtype, device: str) -> Backend:
    known = (*_FAMILIES, *(b.name for b in BACKENDS))
    if request not in known:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={request!r} is unknown: expected one of {', '.join(known)}")
    if request == "auto":
        candidates = [b for b in BACKENDS if b.name != "reference"]
    elif request in _FAMILIES:
        candidates = [b for b in BACKENDS if b.name.startswith(f"{request}-")]
    else:
        candidates = [b for b in BACKENDS if b.name == request]
    reasons = []
    for backend in candidates:
        reason = backend.unavailable
        if not backend.covers(activation, weight, device):
            reason = f"covers {'/'.join(backend.devices)} only, or not these dtypes"
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise UnsupportedKernelError(
        f"no kernel for pattern {pattern}, activations {activation}, weights {weight} on {device} "
        f"({ENVIRONMENT_VARIABLE}={request}): {'; '.join(reasons)}"
    )
