"""Triton's interpreter, which must be chosen before Triton is imported: test modules run in it as programs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from maskpro_kernels import support
from maskpro_kernels.cuda import preparation


@pytest.fixture(scope="module")
def interpreted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the test module, run as a program in the interpreter, saves of its CASES."""
    path = tmp_path_factory.mktemp("interpreter") / "results.pt"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, request.path, path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(path)


@pytest.fixture
def every_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has Triton and cuSPARSELt; and no kernel asked for."""
    monkeypatch.delenv("MASKPRO_KERNEL", raising=False)
    monkeypatch.setattr("maskpro_kernels.support.find_spec", lambda name: name)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 801)
    support._candidates.cache_clear()
    preparation._say_why_not.cache_clear()
