"""Which backend covers what, in one table; and the choice among them, by MASKPRO_KERNEL or by order."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from maskpro_kernels import _cpu
from maskpro_kernels.errors import NativeLibraryError, UnsupportedKernelError
from maskpro_kernels.packing import EIGHT_BITS, WEIGHT_DTYPES
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
        isa: the native instruction set of a CPU, or None.
        patterns: those it takes; empty for every one.
        same_dtype: activations and kept values must be of one dtype.
        capability: the least compute capability of a GPU.
        before: the first one that it does not run on any more, or None.
        multiples: what out_features and in_features must be multiples of.
        prepared: what it needs that :func:`maskpro_kernels.cuda.prepare` makes: the name of a part of
            :class:`maskpro_kernels.cuda.dispatch.Metadata`, or None.
        rounds: it rounds activations to 8 bits, which a checkpoint must allow.
        missing: says why this process cannot run it, or None if it can.
    """

    name: str
    devices: tuple[str, ...]
    activation_dtypes: tuple[torch.dtype, ...]
    weight_dtypes: tuple[torch.dtype, ...]
    isa: str | None = None
    patterns: tuple[NMPattern, ...] = ()
    same_dtype: bool = False
    capability: tuple[int, int] = (0, 0)
    before: tuple[int, int] | None = None
    multiples: tuple[int, int] = (1, 1)
    prepared: str | None = None
    rounds: bool = False
    missing: Callable[[], str | None] | None = None

    def uncovered(self, pattern: NMPattern, activation: torch.dtype, weight: torch.dtype, device: str) -> str | None:
        """Why it cannot run these types, or None if it can."""
        if device not in self.devices:
            return f"covers {'/'.join(self.devices)} only"
        if activation not in self.activation_dtypes or weight not in self.weight_dtypes:
            return "does not cover these dtypes"
        if self.same_dtype and activation != weight:
            return "activations and weights must be of one dtype"
        if self.patterns and pattern not in self.patterns:
            return f"covers {', '.join(map(str, self.patterns))} only"
        return None

    def covers_shape(self, out_features: int, in_features: int) -> bool:
        return out_features % self.multiples[0] == 0 and in_features % self.multiples[1] == 0

    def refusal(
        self, pattern: NMPattern, activation: torch.dtype, weight: torch.dtype, device: str,
        capability: tuple[int, int] | None,
    ) -> str | None:  # fmt: skip
        """Why it cannot run these types on this machine, or on a GPU of this capability; None if it can."""
        reason = self.uncovered(pattern, activation, weight, device) or self.unavailable
        if reason is None and capability is not None and capability < self.capability:
            needed, found = (".".join(map(str, version)) for version in (self.capability, capability))
            return f"needs compute capability {needed}, found {found}"
        if reason is None and capability is not None and self.before is not None and capability >= self.before:
            first, found = (".".join(map(str, version)) for version in (self.before, capability))
            return f"runs below compute capability {first}, found {found}"
        return reason

    @property
    def isa_code(self) -> int:
        """Its instruction set, as ``nm_linear_interleaved`` takes it.

        Raises:
            ValueError: it is no native CPU backend.
        """
        if self.isa is None:
            raise ValueError(f"{self.name} has no native instruction set")
        return _cpu.ISA_CODES[self.isa]

    @property
    def unavailable(self) -> str | None:
        """Why this machine cannot run it, or None if it can."""
        if self.missing is not None:
            return self.missing()
        if self.isa is None:
            return None
        try:
            return None if _cpu.isa_available(self.isa) else f"this machine has no {self.isa}"
        except NativeLibraryError as error:
            return str(error)


def _no_triton() -> str | None:
    return None if find_spec("triton") else "Triton cannot be imported"


def _no_cusparselt() -> str | None:
    return None if torch.backends.cusparselt.is_available() else "this torch is built without cuSPARSELt"


def _no_cusparselt_int8() -> str | None:
    return _no_cusparselt() or _no_triton()  # which rounds activations


def _no_cusparselt_fp8() -> str | None:
    if reason := _no_cusparselt_int8():
        return reason
    version = torch.backends.cusparselt.version()
    return None if version is None or version >= 602 else f"needs cuSPARSELt 0.6.2 for fp8, found {version}"


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)
_KEPT = (*WEIGHT_DTYPES, torch.int8)
_KEPT_ON_GPU = (*WEIGHT_DTYPES, *EIGHT_BITS)
_TWO_OF_FOUR = (NMPattern(2, 4),)

# In order of preference, but that the fastest instruction set of this CPU comes first (_cpu.available_isas). On a GPU
# they compete instead (cuda/tuning.py), and the first is what needs no measurement.
BACKENDS = (
    # Activations or weights that one has no products of are the next one's that does not round, under its name.
    Backend("cpu-amx-bf16", ("cpu",), _FLOATS, _KEPT, isa="amx-bf16"),
    Backend(
        "cpu-avx512-vnni", ("cpu",), _FLOATS, (torch.int8,), isa="avx512-vnni", patterns=_TWO_OF_FOUR, rounds=True
    ),
    Backend("cpu-avx512-bf16", ("cpu",), _FLOATS, _KEPT, isa="avx512-bf16"),
    Backend("cpu-avx512", ("cpu",), _FLOATS, _KEPT, isa="avx512"),
    Backend("cpu-avx2", ("cpu",), _FLOATS, _KEPT, isa="avx2"),
    Backend("cpu-portable", ("cpu",), _FLOATS, _KEPT, isa="portable"),
    Backend("triton", ("cuda",), _FLOATS, _KEPT_ON_GPU, capability=(8, 0), missing=_no_triton),
    Backend("expand", ("cuda",), _FLOATS, _KEPT_ON_GPU, capability=(8, 0), missing=_no_triton),
    Backend(  # torch has these kernels for Ampere and Ada only (its _sparse_semi_structured_mm checks)
        "cutlass", ("cuda",), _HALVES, _HALVES, patterns=_TWO_OF_FOUR, same_dtype=True, capability=(8, 0),
        before=(9, 0), multiples=(32, 64), prepared="cutlass",
    ),
    Backend(
        "cusparselt", ("cuda",), _HALVES, _HALVES, patterns=_TWO_OF_FOUR, same_dtype=True, capability=(8, 0),
        multiples=(16, 16), prepared="cusparselt", missing=_no_cusparselt,
    ),
    # Activations of 8 bits as well. The multiples are torch's (torch.sparse.SparseSemiStructuredTensorCUSPARSELT).
    Backend(
        "cusparselt-int8", ("cuda",), _HALVES, (torch.int8,), patterns=_TWO_OF_FOUR, capability=(8, 0),
        multiples=(32, 32), prepared="eight_bit", rounds=True, missing=_no_cusparselt_int8,
    ),
    Backend(
        "cusparselt-fp8", ("cuda",), _HALVES, (torch.float8_e4m3fn,), patterns=_TWO_OF_FOUR, capability=(8, 9),
        multiples=(32, 32), prepared="eight_bit", rounds=True, missing=_no_cusparselt_fp8,
    ),
    Backend("reference", ("cpu", "cuda"), (*_FLOATS, torch.float64), (*_KEPT_ON_GPU, torch.float64)),
)  # fmt: skip
"""What runs where. The reference is chosen by name only: `auto` never falls back to it in silence."""

_FAMILIES = ("auto", "cpu")


def has_rounding_kernel(pattern: NMPattern) -> bool:
    """Whether any machine's kernels round activations to 8 bits beside int8 weights of this pattern."""
    return any(b.rounds and torch.int8 in b.weight_dtypes and pattern in b.patterns for b in BACKENDS)


def select_backend(
    pattern: NMPattern, activation: torch.dtype, weight: torch.dtype, device: str, *, may_round: bool = False
) -> Backend:
    """The backend that runs ``nm_linear`` for these types, as MASKPRO_KERNEL asks; the first of :func:`candidates`.

    Args:
        pattern: the (N:M) pattern of the weight.
        activation: dtype of x.
        weight: dtype of the kept values.
        device: torch device type, ``cpu`` or ``cuda``.
        may_round: whether activations may be rounded to 8 bits. (On a GPU that is asked later: cuda/preparation.py.)

    Raises:
        UnsupportedKernelError, ValueError: as :func:`candidates`.
    """
    found = candidates(pattern, activation, weight, device)
    return next(backend for backend in found if may_round or not backend.rounds or device != "cpu")


def candidates(
    pattern: NMPattern, activation: torch.dtype, weight: torch.dtype, device: str,
    capability: tuple[int, int] | None = None,
) -> tuple[Backend, ...]:  # fmt: skip
    """The backends that can run ``nm_linear`` for these types and that MASKPRO_KERNEL allows, at least one.

    Where it names one of a CPU that rounds activations, what may not be rounded has the others of the CPU.

    Args:
        pattern: the (N:M) pattern of the weight.
        activation: dtype of x.
        weight: dtype of the kept values.
        device: torch device type, ``cpu`` or ``cuda``.
        capability: compute capability of the GPU; None takes any for able.

    Raises:
        UnsupportedKernelError: none covers them; the message says why for each that was asked for.
        ValueError: MASKPRO_KERNEL names no backend.
    """
    return _candidates(requested(), pattern, activation, weight, device, capability)


def requested() -> str:
    """What MASKPRO_KERNEL asks for."""
    return os.environ.get(ENVIRONMENT_VARIABLE, "auto")


@functools.cache
def _candidates(
    request: str, pattern: NMPattern, activation: torch.dtype, weight: torch.dtype, device: str,
    capability: tuple[int, int] | None,
) -> tuple[Backend, ...]:  # fmt: skip
    known = (*_FAMILIES, *(b.name for b in BACKENDS))
    if request not in known:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={request!r} is unknown: expected one of {', '.join(known)}")
    if request == "auto":
        asked = [b for b in BACKENDS if b.name != "reference"]
    elif request in _FAMILIES:
        asked = [b for b in BACKENDS if b.name.startswith(f"{request}-")]
    else:
        asked = [b for b in BACKENDS if b.name == request]
        if device in asked[0].devices and asked[0].isa in _cpu.ROUNDING_ISAS and asked[0].unavailable is None:
            asked += [b for b in BACKENDS if b.name.startswith("cpu-") and not b.rounds]
    found, reasons = [], []
    for backend in asked:
        reason = backend.refusal(pattern, activation, weight, device, capability)
        if reason is None:
            found.append(backend)
        reasons.append(f"{backend.name}: {reason}")
    if not found:
        raise UnsupportedKernelError(
            f"no kernel for pattern {pattern}, activations {activation}, weights {weight} on {device} "
            f"({ENVIRONMENT_VARIABLE}={request}): {'; '.join(reasons)}"
        )
    return tuple(sorted(found, key=lambda backend: backend.name != request and _is_slower_isa(backend)))


def _is_slower_isa(backend: Backend) -> bool:
    if backend.isa is None:
        return False
    fastest = _cpu.available_isas()[0]
    if backend.rounds:
        return fastest == "amx-bf16"  # not compared with its tiles yet
    return backend.isa != fastest
