"""A server keeps no memory that only loading needed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from maskpro_kernels import NMPattern
from maskpro_kernels.packing import pack
from maskpro_serve.checkpoint import PackedFormat
from maskpro_serve.cpu_defaults import preloads
from maskpro_serve.quantization import linear
from maskpro_serve.quantization.config import MaskProConfig
from maskpro_serve.scheme import LinearScheme

PATTERN = NMPattern(2, 4)

# Frees 200 MB in pieces that no allocator maps one by one, between others that stay.
HOLES = """
import ctypes, psutil
from maskpro_serve.freed_memory import return_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
pieces = [libc.malloc(20_000 + 80_000 * (i % 2)) for i in range(4_000)]
for i, piece in enumerate(pieces):
    ctypes.memset(piece, 1, 20_000 + 80_000 * (i % 2))
for piece in pieces[1::2]:
    libc.free(piece)
memory = psutil.Process().memory_info
before = memory().rss
return_freed_memory()
print(before - memory().rss)
"""


@pytest.mark.parametrize("allocator", ["glibc", "tcmalloc"])
def test_freed_pages_go_back_to_the_system(allocator):
    preload = "".join(str(path) for path in preloads() if allocator in path.name)
    if allocator == "tcmalloc" and not preload:
        pytest.skip("tcmalloc is not installed")
    if allocator == "glibc" and platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")
    environment = {**os.environ, "LD_PRELOAD": preload}
    run = subprocess.run([sys.executable, "-c", HOLES], env=environment, capture_output=True, text=True, check=True)
    assert int(run.stdout) > 100e6


@pytest.mark.vllm
def test_the_last_layer_returns_what_loading_freed(monkeypatch):
    weight = pack(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).bfloat16(), PATTERN)
    settings = SimpleNamespace(
        load_config=SimpleNamespace(load_format="auto"), model_config=SimpleNamespace(dtype=torch.bfloat16)
    )
    monkeypatch.setattr(linear, "get_current_vllm_config", lambda: settings)
    monkeypatch.setattr(linear, "loaded_packed", lambda *args, **kwargs: weight)
    monkeypatch.setattr(linear, "loaded_inputs", lambda *args, **kwargs: None)
    waiting: list[int] = []
    config = MaskProConfig(PackedFormat(PATTERN, ()))
    monkeypatch.setattr(linear, "return_freed_memory", lambda: waiting.append(config.tally._waiting))
    layers = [torch.nn.Module() for _ in range(3)]
    for layer in layers:
        layer.maskpro_partitions = [32]
        config.tally.created()
    for layer in layers:
        linear.NMLinearMethod(config, "layer", LinearScheme(compressed=True)).process_weights_after_loading(layer)
    assert waiting == [0]


@pytest.mark.vllm
def test_what_compiling_freed_is_returned_before_the_cache_is_allocated(monkeypatch):
    from maskpro_serve import worker

    calls: list[str] = []
    monkeypatch.setattr(worker.CPUWorker, "determine_available_memory", lambda self: calls.append("compile") or 7)
    monkeypatch.setattr(worker, "return_freed_memory", lambda: calls.append("return"))
    assert object.__new__(worker.SeededCPUWorker).determine_available_memory() == 7
    assert calls == ["compile", "return"]
