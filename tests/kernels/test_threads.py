"""Threads run where they are bound; in a process of its own each time, since nothing unbinds them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BIND = """
import os, sys
import torch
from maskpro_kernels.threads import bind_threads
cores = [int(core) for core in sys.argv[1:]]
torch.set_num_threads(1)
before = set(os.listdir("/proc/self/task"))
bind_threads(cores)
torch.ones(1 << 22).add_(1)
started = sorted(set(os.listdir("/proc/self/task")) - before, key=int)
print(torch.get_num_threads(), *(sorted(os.sched_getaffinity(int(thread))) for thread in [os.getpid(), *started]))
"""


def bind(*cores: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BIND, *map(str, cores)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_each_thread_has_its_core():
    cores = sorted(os.sched_getaffinity(0))[:4]
    run = bind(*cores)
    assert run.stdout.strip() == " ".join([str(len(cores)), *(f"[{core}]" for core in cores)]), run.stderr


def test_a_second_time_and_no_core():
    cores = sorted(os.sched_getaffinity(0))[:2]
    program = f"""
import torch
from maskpro_kernels.threads import bind_threads
torch.set_num_threads(1)
try:
    bind_threads([])
except ValueError as error:
    print(error)
print(torch.get_num_threads())
bind_threads({cores})
bind_threads({cores})
print(torch.get_num_threads())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    refused, *threads = run.stdout.splitlines()
    assert refused.startswith("threads cannot be bound to cores (none): this process may run on "), run.stderr
    assert threads == ["1", str(len(cores))]


@pytest.mark.parametrize("core", [-1, 1 << 20])
def test_a_core_that_is_not_there(core):
    first = min(os.sched_getaffinity(0))
    run = bind(first, core)
    assert run.returncode
    assert "this process may run on " + ", ".join(map(str, sorted(os.sched_getaffinity(0)))) in run.stderr
    assert f"threads cannot be bound to cores {min(first, core)}, {max(first, core)}" in run.stderr
