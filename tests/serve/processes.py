"""Runs Python in a process of its own, as a user or vLLM would."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from maskpro_kernels import NativeLibraryError
from maskpro_kernels._cpu import isa_available

GREEDY = Path(__file__).parent / "greedy.py"
ONE_SCALE = Path(__file__).parent.parent / "fixtures" / "legacy" / "bitmask-int8-tensor-static"
"""A checkpoint of compressed-tensors with one scale for each matrix."""


def _has_vnni() -> bool:
    try:
        return isa_available("avx512-vnni")
    except NativeLibraryError:
        return False


needs_vnni = pytest.mark.skipif(not _has_vnni(), reason="this machine has no avx512-vnni")


def run_python(*arguments: object, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=timeout)


@torch.no_grad()
def greedy_tokens(model: PreTrainedModel, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """The ``count`` tokens that transformers finds for every prompt."""
    rows = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        rows.append(ids[len(prompt) :])
    return rows


def serve_greedily(folders: Sequence[Path], scratch: Path, **llm: Any) -> tuple[list[dict[str, Any]], str]:
    """What greedy.py says of every model folder, one after another in one process; and its log.

    Args:
        folders: the models.
        scratch: where the process may write.
        llm: more arguments of vllm.LLM.
    """
    output = scratch / "greedy.json"
    finished = run_python(GREEDY, output, json.dumps(llm), *folders, timeout=600)
    log = finished.stdout + finished.stderr
    assert finished.returncode == 0, log[-3000:]
    found = json.loads(output.read_text())
    return [found[str(folder)] for folder in folders], log
