"""The learning step in Triton against C++: the same masks bit for bit, the same logits to rounding.

Without a GPU, Triton's interpreter runs the kernel. It must be chosen before Triton is imported, so this file starts
itself as a program of its own for that, once for all cases.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from maskpro_kernels import NMPattern, UnsupportedKernelError, _cpu
from maskpro_kernels.policy_step import policy_step

SEED, STREAM, NEXT_DRAW = 2**64 - 5, 2**30 - 3, (7 << 32) + 1
UPDATES = ((0.5, 3), (-1.5, 2**63 + 9), (0.25, 4))
EVERY_PATTERN = [(n, m) for m in (4, 8, 16) for n in range(1, m + 1)]
SCORED = [(1, 4), (2, 4), (3, 4), (4, 4), (2, 8), (4, 8), (7, 8), (1, 16), (2, 16), (5, 16), (8, 16), (15, 16)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call; 37 groups are no multiple of any block of rows."""

    n: int
    m: int
    dtype: torch.dtype
    updates: tuple[tuple[float, int], ...]
    gains: bool = False
    scale: float = 3.0
    groups: int = 37

    def __str__(self) -> str:
        kind = f"{len(self.updates)} gains" if self.gains else f"{len(self.updates)} updates"
        return f"{self.n}:{self.m} {self.dtype} {kind} x{self.scale}"

    def inputs(self) -> dict[str, torch.Tensor | None]:
        generator = torch.Generator().manual_seed(1000 * self.n + self.m)
        logits = self.scale * torch.randn((1, self.groups * self.m), generator=generator).clamp(-2, 2)
        weight = torch.randn(logits.shape, generator=generator).to(self.dtype)
        gains = torch.randn(logits.shape, generator=generator) + 5 if self.gains else None
        return {"logits": logits, "weight": weight, "gains": gains, "masked": torch.full_like(weight, torch.nan)}


CASES = [
    *(Case(n, m, DTYPES[n % 3], ()) for n, m in EVERY_PATTERN),
    *(Case(n, m, DTYPES[n % 3], UPDATES[:2]) for n, m in SCORED),
    *(Case(n, m, torch.bfloat16, UPDATES, gains=True) for n, m in [(1, 4), (2, 4), (4, 8)]),
    *(Case(n, m, torch.float32, UPDATES[:1], scale=50.0) for n, m in [(1, 4), (2, 4), (3, 8)]),
    Case(2, 4, torch.float32, UPDATES[:1], scale=0.0),
]


def run(case: Case, step, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Logits, masked weight and flips after a call of a policy_step with native arguments."""
    tensors = {name: None if t is None else t.to(device) for name, t in case.inputs().items()}
    tensors["flips"] = torch.zeros(1, dtype=torch.int64, device=device)
    step(
        *(tensors[name] for name in ("logits", "weight", "masked", "gains", "flips")),
        case.n, case.m, case.updates, NEXT_DRAW, SEED, STREAM,
    )  # fmt: skip
    return {name: tensors[name].cpu() for name in ("logits", "masked", "flips")}


def native(*arguments) -> None:
    _cpu.policy_step(*arguments, _cpu.available_isas()[0], 1)


def check(case: Case, found: dict[str, torch.Tensor]) -> None:
    """The mask's bits, the logits to rounding, and the flips."""
    expected = run(case, native)
    logits = case.inputs()["logits"]
    # A float32 logit of size L has an ulp of L * 2^-23, and a score sums a few exponentials of their differences.
    tolerance = 2e-6 * (1 + float(logits.abs().max())) * sum(abs(c) for c, _ in case.updates)
    if case.gains:
        tolerance *= 10  # a sum of n gains of 5 or so, less those of the others
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=tolerance)
    if not case.updates:
        assert torch.equal(found["logits"], logits)
    # Logits that differ in their last place may part two columns whose keys nearly tie: none of these cases does.
    assert torch.equal(found["masked"], expected["masked"])
    assert torch.equal(found["flips"], expected["flips"])


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: str(CASES[index]))
def test_interpreted(interpreted: list[dict[str, torch.Tensor]], index: int) -> None:
    check(CASES[index], interpreted[index])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu(case: Case) -> None:
    from maskpro_kernels.triton.policy_step import policy_step as step

    check(case, run(case, step, "cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (8, 16)])
def test_a_large_layer_on_a_gpu(n: int, m: int) -> None:
    """A million groups: many programs, none skipped, and draws alike wherever keys do not tie."""
    check(
        Case(n, m, torch.bfloat16, (), groups=1 << 20), run_dispatched(Case(n, m, torch.bfloat16, (), groups=1 << 20))
    )


def run_dispatched(case: Case) -> dict[str, torch.Tensor]:
    """The public function, on the GPU."""

    def step(logits, weight, masked, gains, flips, n, m, updates, next_draw, seed, stream):
        policy_step(
            logits, NMPattern(n, m), seed=seed, stream=stream, updates=updates, gains=gains, weight=weight,
            masked=masked, next_draw=next_draw, flips=flips,
        )  # fmt: skip

    return run(case, step, "cuda")


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from maskpro_kernels.triton.policy_step import BLOCK_WEIGHTS, _policy_step
n, m, capability, gains = map(int, sys.argv[1:])
types = {name: "constexpr" for name in _policy_step.arg_names}
types |= {"logits": "*fp32", "masked": "*i16", "weight": "*i16", "flips": "*i64", "numbers": "*i64"}
types |= {"groups": "i32", "updates": "i32", "stream": "i32"} | ({"gains": "*fp32"} if gains else {})
constants = {"N": n, "M": m, "ROWS": BLOCK_WEIGHTS // m} | ({} if gains else {"gains": None})
source = ASTSource(_policy_step, types, constexprs=constants)
kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": True})
print(kernel.asm["ptx"])
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("n", "m", "capability", "gains"), [(2, 4, 80, 1), (4, 8, 90, 0)])
def test_compiles_for_gpus_without_one(n: int, m: int, capability: int, gains: int, tmp_path: Path) -> None:
    """To machine code, spilling nothing, and with the exact division and fma that bit-identical draws need."""
    command = [sys.executable, "-c", COMPILE, *map(str, (n, m, capability, gains))]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "div.rn.f32" in done.stdout
    assert "fma.rn.f32" in done.stdout
    assert "ld.local" not in done.stdout
    assert f"sm_{capability}" in done.stdout


def test_other_devices_are_refused() -> None:
    logits = torch.zeros((2, 16), device="meta")
    with pytest.raises(UnsupportedKernelError, match="no kernel for meta: expected the CPU or a CUDA device"):
        policy_step(logits, NMPattern(2, 4), seed=0, stream=0)
    with pytest.raises(ValueError, match="logits on cpu, gains on meta"):
        policy_step(torch.zeros(2, 16), NMPattern(2, 4), seed=0, stream=0, updates=UPDATES, gains=logits)


def test_without_triton_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from maskpro_kernels.policy_step import _triton_policy_step

    monkeypatch.setitem(sys.modules, "maskpro_kernels.triton.policy_step", None)
    _triton_policy_step.cache_clear()
    with pytest.raises(UnsupportedKernelError, match="a CUDA device needs Triton, which cannot be imported"):
        _triton_policy_step()


def interpret(path: str) -> None:
    """Runs every case in this process, which has the interpreter, and saves the results."""
    import numpy as np
    from triton.runtime.interpreter import ReduceOps

    from maskpro_kernels.triton import policy_step as kernel

    general = ReduceOps.apply_impl

    def apply(self, values):
        """The interpreter's own way, but for products, for which it calls Python for every element."""
        if self.combine_fn is not kernel._multiply:
            return general(self, values)
        product = np.prod(values[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(product, values[0].dtype)

    ReduceOps.apply_impl = apply
    kernel.BLOCK_WEIGHTS = 128  # several programs even for a few groups, the last one partly empty
    torch.save([run(case, kernel.policy_step) for case in CASES], path)


if __name__ == "__main__":
    interpret(sys.argv[1])
