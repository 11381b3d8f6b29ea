"""Loads the native library, which registers its operator, and calls the rest of it.

The only module that knows the C ABI of csrc/maskpro_kernels.h.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from maskpro_kernels.errors import NativeLibraryError

ABI_VERSION = 9
LIBRARY_NAME = "libmaskpro_kernels.so"

ISA_CODES = {"portable": 0, "avx2": 1, "avx512": 2, "avx512-bf16": 3, "amx-bf16": 4, "avx512-vnni": 5}
BACKENDS = {code: f"cpu-{isa}" for isa, code in ISA_CODES.items()}
"""What :mod:`maskpro_kernels.support` calls them."""
ROUNDING_ISAS = ("avx512-vnni",)
"""Those whose kernels round activations to 8 bits."""
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_STATUS = {1: "bad argument", 2: "instruction set not available", 3: "out of memory"}


class Sample(ctypes.Structure):
    """A timed call of the operator; times are in seconds."""

    _fields_ = (
        ("tokens", ctypes.c_int64),
        ("weight_bytes", ctypes.c_int64),
        ("seconds", ctypes.c_double),
        ("isa", ctypes.c_int32),
        ("n", ctypes.c_int32),
        ("m", ctypes.c_int32),
    )


def _candidates() -> Iterator[Path]:
    """Where the library may lie: beside this file, on the package's path, in the installed distribution.

    An editable install puts the library in site-packages while the Python files stay in the checkout,
    and a wheel run from inside ``kernels/`` is shadowed by the sources.
    """
    package = sys.modules[__package__]
    for folder in dict.fromkeys([str(Path(__file__).parent), *package.__path__]):
        yield Path(folder) / LIBRARY_NAME
    try:
        distribution = importlib.metadata.distribution("maskpro-serve")
    except importlib.metadata.PackageNotFoundError:
        return
    yield Path(str(distribution.locate_file(f"{__package__}/{LIBRARY_NAME}")))


def _share_openmp() -> None:
    """Puts torch's OpenMP runtime where the library's symbols resolve to it.

    The library is linked against no OpenMP runtime: a second one in the process would mean a second
    pool of spinning threads. A preloaded libiomp5 or libgomp is already global and wins.
    """
    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return
    bundled = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    bundled += sorted(Path(torch.__file__).parent.parent.glob("torch.libs/libgomp*.so*"))
    ctypes.CDLL(str(bundled[0]) if bundled else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded native library; torch.ops.maskpro.nm_linear_interleaved has a CPU kernel from then on.

    Raises:
        NativeLibraryError: it is not installed, or was built from other sources.
    """
    path = next((p for p in _candidates() if p.is_file()), None)
    if path is None:
        looked = ", ".join(str(p.parent) for p in _candidates())
        raise NativeLibraryError(
            f"{LIBRARY_NAME} is not in {looked}: in a checkout run `make native`, elsewhere reinstall maskpro-serve"
        )
    try:
        _share_openmp()
        lib = ctypes.CDLL(str(path))
    except OSError as error:
        raise NativeLibraryError(f"{path} cannot be loaded: {error}") from error
    lib.maskpro_abi_version.restype = ctypes.c_int32
    found = lib.maskpro_abi_version()
    if found != ABI_VERSION:
        raise NativeLibraryError(f"{path}: expected ABI {ABI_VERSION}, found {found}; run `make native`")
    i32, i64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    lib.maskpro_isa_available.argtypes = [i32]
    lib.maskpro_isa_available.restype = i32
    lib.maskpro_fastest_isa.argtypes = []
    lib.maskpro_fastest_isa.restype = i32
    lib.maskpro_bind_threads.argtypes = [pointer, i32]
    lib.maskpro_bind_threads.restype = i32
    lib.maskpro_kept_values.argtypes = [pointer] * 3 + [i64, i64] + [i32] * 3
    lib.maskpro_kept_values.restype = i32
    lib.maskpro_interleaved_bytes.argtypes = [i64, i64, i32, i32, i32]
    lib.maskpro_interleaved_bytes.restype = i64
    lib.maskpro_interleave.argtypes = [pointer] * 3 + [i64, i64] + [i32] * 4
    lib.maskpro_interleave.restype = i32
    lib.maskpro_nm_linear.argtypes = [pointer] * 6 + [i64] * 3 + [i32] * 7
    lib.maskpro_nm_linear.restype = i32
    lib.maskpro_sample_calls.argtypes = [i64]
    lib.maskpro_sample_calls.restype = None
    lib.maskpro_take_samples.argtypes = [pointer, i64]
    lib.maskpro_take_samples.restype = i64
    lib.maskpro_register_torch_ops.argtypes = [pointer]
    lib.maskpro_register_torch_ops.restype = i32
    u32, u64 = ctypes.c_uint32, ctypes.c_uint64
    lib.maskpro_policy_step.argtypes = (
        [pointer] * 4 + [i64] + [i32] * 3 + [pointer] * 3 + [i32, u64, u64, u32, i32, i32]
    )
    lib.maskpro_policy_step.restype = i32
    if lib.maskpro_register_torch_ops(ctypes.CDLL(torch._C.__file__)._handle):
        raise NativeLibraryError(f"{path}: expected torch 2.11 or later, found {torch.__version__}")
    return lib


@functools.cache
def available_isas() -> tuple[str, ...]:
    """Instruction sets this build and this machine both have, the fastest first, but for those of ROUNDING_ISAS."""
    fastest = library().maskpro_fastest_isa()
    names = [isa for isa in ISA_CODES if isa not in ROUNDING_ISAS and isa_available(isa)]
    return tuple(sorted(names, key=lambda isa: (ISA_CODES[isa] == fastest, ISA_CODES[isa]), reverse=True))


def isa_available(isa: str) -> bool:
    """Whether this build and this machine both have it.

    Raises:
        NativeLibraryError: as :func:`library`.
    """
    return library().maskpro_isa_available(ISA_CODES[isa]) == 1


def bind_threads(cores: Sequence[int]) -> bool:
    """Binds the calling thread and its OpenMP threads to one core each.

    Args:
        cores: at least one.

    Returns:
        Whether all are bound.
    """
    bound: bool = library().maskpro_bind_threads((ctypes.c_int32 * len(cores))(*cores), len(cores)) == 0
    return bound


def kept_values(dense: Tensor, bitmask: Tensor, n: int, m: int) -> Tensor:
    """The kept values of a dense weight, bit for bit; one thread, which holds no lock of Python's meanwhile.

    Args:
        dense: (out_features, in_features), contiguous.
        bitmask: uint8 (out_features, ceil(in_features / 8)), contiguous, exactly n per group.
        n: kept weights per group.
        m: group size, which divides in_features.

    Returns:
        (out_features, in_features * n / m).
    """
    out_features, in_features = dense.shape
    values = dense.new_empty((out_features, in_features // m * n))  # on the CPU, whatever the default device
    status = library().maskpro_kept_values(
        values.data_ptr(), dense.data_ptr(), bitmask.data_ptr(), in_features, out_features, n, m,
        _DTYPE_CODES[dense.dtype],
    )  # fmt: skip
    if status:
        raise RuntimeError(
            f"native kept_values failed: {_STATUS.get(status, status)} (weight {out_features} x {in_features} "
            f"{dense.dtype}, {n}:{m})"
        )
    return values


def interleaved_bytes(in_features: int, out_features: int, n: int, m: int, dtype: torch.dtype) -> int:
    """Bytes of a weight of that dtype in the order of :func:`interleave`; -1 for an impossible one."""
    size: int = library().maskpro_interleaved_bytes(in_features, out_features, n, m, _DTYPE_CODES[dtype])
    return size


def interleave(values: Tensor, bitmask: Tensor | None, in_features: int, n: int, m: int, threads: int) -> Tensor:
    """Brings a packed weight into the order that nm_linear_interleaved reads (csrc/interleaved.h).

    Args:
        values: (out_features, in_features * n / m), contiguous.
        bitmask: uint8 (out_features, ceil(in_features / 8)), contiguous, exactly n per group; None where n is m.
        in_features: columns of the weight, which m divides.
        n: kept weights per group.
        m: group size.
        threads: OpenMP threads to use, at least 1.

    Returns:
        uint8, as many bytes as the order takes.
    """
    out_features, dtype = values.shape[0], _DTYPE_CODES[values.dtype]
    size = interleaved_bytes(in_features, out_features, n, m, values.dtype)
    status = 1
    if size >= 0:
        weight = values.new_empty(size, dtype=torch.uint8)  # on the CPU, whatever the default device
        status = library().maskpro_interleave(
            weight.data_ptr(), values.data_ptr(), None if bitmask is None else bitmask.data_ptr(), in_features,
            out_features, n, m, dtype, threads,
        )  # fmt: skip
    if status:
        raise RuntimeError(
            f"native interleave failed: {_STATUS.get(status, status)} (weight {out_features} x {in_features} "
            f"{values.dtype}, {n}:{m}, {threads} threads)"
        )
    return weight


def policy_step(
    logits: Tensor, weight: Tensor | None, masked: Tensor | None, gains: Tensor | None, flips: Tensor | None,
    n: int, m: int, updates: Sequence[tuple[float, int]], next_draw: int, seed: int, stream: int, isa: str,
    threads: int,
) -> None:  # fmt: skip
    """Calls the native kernel; arguments were checked by :mod:`maskpro_kernels.policy_step`.

    Args:
        logits: float32, contiguous, whose elements are groups of m; updated.
        weight: as many elements of 2 or 4 bytes, contiguous; None with masked.
        masked: the same, written; None to update only.
        gains: float32, as many elements, contiguous; or None.
        flips: one int64, added to; or None.
        n: kept weights per group.
        m: group size.
        updates: (coefficient, draw) of every update.
        next_draw: the draw that masked gets.
        seed: key of the generator, 64 bits.
        stream: which layer, below 2^30.
        isa: one of :func:`available_isas`.
        threads: OpenMP threads to use, at least 1.
    """
    count = len(updates)
    coefficients = (ctypes.c_float * count)(*(coefficient for coefficient, _ in updates))
    draws = (ctypes.c_uint64 * count)(*(draw for _, draw in updates))
    status = library().maskpro_policy_step(
        logits.data_ptr(),
        None if masked is None else masked.data_ptr(),
        None if weight is None else weight.data_ptr(),
        None if flips is None else flips.data_ptr(),
        logits.numel() // m,
        n,
        m,
        2 if weight is None else weight.element_size(),
        None if gains is None else gains.data_ptr(),
        coefficients,
        draws,
        count,
        next_draw,
        seed,
        stream,
        ISA_CODES[isa],
        threads,
    )
    if status:
        raise RuntimeError(
            f"native policy_step failed: {_STATUS.get(status, status)} ({n}:{m}, {isa}, {threads} threads)"
        )
