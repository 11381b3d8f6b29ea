"""Activations rounded to 8 bits in Triton: the bits of the reference, under the interpreter, and on a GPU if any.

The interpreter must be chosen before Triton is imported, so this file starts itself as a program of its own for that.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from maskpro_kernels.activations import LARGEST, EightBitInputs

INT8, FP8 = torch.int8, torch.float8_e4m3fn
ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Case:
    """One rounding; tokens are padded to a multiple of 4."""

    dtype: torch.dtype
    activation: torch.dtype
    scale: float | None
    shape: tuple[int, int]

    def __str__(self) -> str:
        kinds = " to ".join(str(dtype).removeprefix("torch.") for dtype in (self.activation, self.dtype))
        return f"{kinds} {self.shape} {'dynamic' if self.scale is None else self.scale}"

    def operands(self, device: str = "cpu") -> tuple[torch.Tensor, EightBitInputs]:
        """Tokens of many sizes: of zeros, of ties between levels, of numbers that are nearly too small or too large."""
        tokens, columns = self.shape
        generator = torch.Generator().manual_seed(columns)
        x = torch.randn(self.shape, generator=generator) * 10.0 ** (torch.arange(tokens) % 5 - 2)[:, None]
        x[0] = 0
        if tokens > 3:
            halves = torch.arange(columns) % 255 - 127 + 0.5
            levels = torch.arange(columns).remainder(126).to(torch.uint8)
            between = (levels.view(FP8).float() + (levels + 1).view(FP8).float()) / 2
            x[1] = halves if self.dtype == INT8 else between
            x[1, 0] = LARGEST[self.dtype]  # a scale of 1: these are ties
            x[2] = torch.finfo(self.activation).tiny
            x[3, 1::2] = torch.finfo(self.activation).max
        x[4:, 7] = torch.nan
        if self.dtype == INT8:
            x[5:, 7] = torch.inf
        scale = None if self.scale is None else torch.tensor([self.scale], device=device)
        return x.to(self.activation).to(device), EightBitInputs(self.dtype, scale)


CASES = [
    Case(dtype, activation, scale, shape)
    for (dtype, scale, shape), activation in zip(
        itertools.product((INT8, FP8), (None, 1.0, 0.013), ((1, 32), (6, 96), (4, 4100))),
        itertools.cycle(ACTIVATIONS),
        strict=False,
    )
]


def run(case: Case, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    from maskpro_kernels.triton.round_inputs import round_inputs

    levels, scale = round_inputs(*case.operands(device), 4)
    return levels.cpu(), scale.cpu()


def check(case: Case, found: tuple[torch.Tensor, torch.Tensor]) -> None:
    levels, scale = found
    x, inputs = case.operands()
    tokens = x.shape[0]
    expected, expected_scale = inputs.rounded(x)
    assert levels.dtype == case.dtype
    assert levels.shape == (tokens + -tokens % 4, x.shape[1])
    assert not levels[tokens:].view(torch.uint8).any()
    assert scale.shape == (levels.shape[0], 1)
    outputs = levels[:tokens].float() * scale[:tokens]
    assert torch.equal(outputs.isnan().any(1), (expected.float() * expected_scale).isnan().any(1))
    numbers = ~outputs.isnan().any(1)
    assert torch.equal(scale[:tokens][numbers], expected_scale.expand(tokens, 1)[numbers])
    assert torch.equal(levels[:tokens].view(torch.uint8)[numbers], expected.view(torch.uint8)[numbers])
    if case.dtype == FP8:  # int8 has none: there only a scale says so
        assert torch.equal(torch.isnan(levels[:tokens].float()), torch.isnan(expected.float()))


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: str(CASES[index]))
def test_interpreted(interpreted: list[tuple[torch.Tensor, torch.Tensor]], index: int) -> None:
    check(CASES[index], interpreted[index])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu(case: Case) -> None:
    if case.dtype == FP8 and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    check(case, run(case, "cuda"))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from maskpro_kernels.triton.round_inputs import _round
types = {name: "constexpr" for name in _round.arg_names}
types |= {"levels": "*fp8e4nv", "scales": "*fp32", "x": "*bf16", "tokens": "i32", "in_features": "i32"}
constants = {"given": None, "LARGEST": 448.0, "SMALLEST": 1e-38, "INT8": False, "BLOCK": 4096}
names = list(types)
aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("levels", "scales", "x", "in_features")}
source = ASTSource(_round, types, constexprs=constants, attrs=aligned)
print(triton.compile(source, target=GPUTarget("cuda", 89, 32), options={"num_warps": 8}).asm["ptx"])
"""


@pytest.mark.timeout(600)
def test_compiles_to_wide_accesses_and_exact_divisions(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for wanted in ("div.rn.f32", "ld.global.v4", "st.global.v4", "cvt.rn.satfinite.e4m3x2.f32"):
        assert wanted in done.stdout, wanted
    for unwanted in ("div.full", ".ftz", "ld.local"):
        assert unwanted not in done.stdout, unwanted


if __name__ == "__main__":
    import triton_interpreter

    triton_interpreter.save(run, CASES, sys.argv[1])
