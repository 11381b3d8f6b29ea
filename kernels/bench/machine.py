"""What a benchmark ran on: printed above every table, stored in every JSON file."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from maskpro_kernels import _cpu

_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
_TUNABLES = "GLIBC_TUNABLES"
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_HELD_BY = ("MASKPRO_KERNEL", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
"""Variables that hold our kernels, PyTorch, oneDNN and MKL to fewer instructions than the processor has."""


@dataclass(frozen=True)
class Machine:
    """Attributes are what their names say; sizes are bytes, ``isas`` best first, ``large_pages`` the system's,
    ``held`` the variables by which this run does without some of the processor's instructions."""

    cpu: str
    isas: tuple[str, ...]
    cores: int
    threads: int
    last_level_cache: int
    memory_available: int
    torch: str
    dense_isa: str
    glibc_tunables: str
    large_pages: str
    held: dict[str, str]

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.cores} cores, {self.threads} threads, last-level cache "
            f"{self.last_level_cache / 2**20:.0f} MiB; our ISAs: {', '.join(self.isas)}; "
            f"torch {self.torch} ({self.dense_isa})" + "".join(f"; {name}={value}" for name, value in self.held.items())
        )


def with_large_pages() -> None:
    """Starts this program anew under the setting ``maskpro-serve`` makes: every rival's weights then lie in large
    pages, where ours ask for them anyhow."""
    tunables = os.environ.get(_TUNABLES, "")
    if "glibc.malloc.hugetlb" not in tunables:
        tunables = ":".join(filter(None, (tunables, "glibc.malloc.hugetlb=1")))
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {_TUNABLES: tunables})


def this_machine() -> Machine:
    return Machine(
        cpu=_processor(),
        isas=_cpu.available_isas(),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        last_level_cache=_last_level_cache(),
        memory_available=int(_field("/proc/meminfo", "MemAvailable").split()[0]) * 1024,
        torch=torch.__version__,
        dense_isa=torch.backends.cpu.get_cpu_capability(),
        glibc_tunables=os.environ.get(_TUNABLES, ""),
        large_pages=_chosen(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        held={name: os.environ[name] for name in _HELD_BY if name in os.environ},
    )


def _processor() -> str:
    """Its name; on x86 with family and model, since names as "AMD EPYC" say neither."""
    name, family, model = (_field("/proc/cpuinfo", field) for field in ("model name", "cpu family", "model"))
    return (name or platform.processor() or platform.machine()) + (
        f", family {family}, model {model}" if family else ""
    )


def _field(file: str, name: str) -> str:
    for line in Path(file).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _chosen(file: Path) -> str:
    """The word in brackets: "always [madvise] never"."""
    return file.read_text().partition("[")[2].partition("]")[0] if file.exists() else ""


def _last_level_cache() -> int:
    """Bytes of the largest cache the kernel reports, 32 MiB where it reports none."""
    sizes = [file.read_text().strip() for file in _CACHE.glob("index*/size")]
    return max((int(size[:-1]) * _UNITS[size[-1]] for size in sizes), default=32 << 20)
