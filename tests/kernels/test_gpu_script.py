"""`make gpu`: what it says without a GPU, and that a run which was cut goes on where it was."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from fake_gpu import rounded_and_padded

from maskpro_kernels.activations import EightBitInputs
from maskpro_kernels.reference import nm_linear_w8a8_reference

MACHINE = {
    "gpu": "A GPU", "capability": "9.0", "memory": 1 << 36, "driver_cuda": "13.0", "torch": "2.11.0",
    "triton": "3.6.0", "python": "3.12.1", "code": "0123456789ab",
}  # fmt: skip


@pytest.fixture
def rows(repository: Path, monkeypatch: pytest.MonkeyPatch):
    """The module scripts/gpu/rows.py."""
    monkeypatch.syspath_prepend(repository / "scripts" / "gpu")
    import rows

    return rows


def test_without_a_gpu_one_sentence(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    script = repository / "scripts" / "gpu" / "run.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("There is no CUDA GPU that torch ")
    assert done.stdout.count("\n") == 1


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_the_dense_rival_of_8_bits_computes_the_same_layer(rows, kind: str, tokens: int, monkeypatch) -> None:
    """torch has both of its operators on a CPU, too."""
    import w8a8_table

    monkeypatch.setattr(w8a8_table, "round_inputs", rounded_and_padded)
    torch.manual_seed(1)
    dtype = w8a8_table.DTYPES[kind]
    weight = w8a8_table.eight_bit(torch.randn(64, 128), dtype)
    x, inputs = torch.randn(tokens, 128).bfloat16(), EightBitInputs(dtype)
    dense = w8a8_table.dense_levels(weight)
    assert dense.dtype == dtype
    y = w8a8_table.dense_w8a8(x, dense, weight.scale, inputs)
    expected = nm_linear_w8a8_reference(x, weight.values, weight.bitmask, weight.scale, None, inputs)
    assert y.shape == expected.shape
    assert (y.float() - expected.float()).norm() <= 2**-8 * expected.float().norm()


def test_a_cut_run_goes_on(rows, tmp_path: Path) -> None:
    machine, path = rows.Machine(**MACHINE), tmp_path / "gpu_kernels.json"
    late = time.monotonic() + 60
    first = rows.Rows(path, machine, late)
    first.row("a", lambda: {"us": 12.345, "backend": "triton"})
    with pytest.raises(rows.OutOfTimeError, match=r"gpu_kernels\.json: b"):
        first.row("b", dict, needs=61)
    with pytest.raises(ZeroDivisionError):
        first.row("b", lambda: {"us": 1 / 0})
    again = rows.Rows(path, machine, late)
    again.row("a", lambda: pytest.fail("measured twice"))
    again.row("b", lambda: {"us": 2.0, "backend": "expand"})
    assert list(json.loads(path.read_text())["rows"]) == ["a", "b"]
    assert rows.table(again.rows, "kernels").splitlines()[1:] == [
        "| kernels | us | backend |", "|---|---|---|", "| a | 12.3 | triton |", "| b | 2 | expand |"
    ]  # fmt: skip
    for change in {"gpu": "Another"}, {"code": "of another day"}:
        assert not rows.Rows(path, rows.Machine(**MACHINE | change), late).rows
