"""A GPU that is only described: what it is given to multiply, and made-up times of every kernel."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch

from maskpro_kernels import NMPattern, NMWeight, pack, to_int8
from maskpro_kernels.activations import EightBitInputs
from maskpro_kernels.cuda import Device, dispatch
from maskpro_kernels.cuda.dispatch import Metadata, Operands
from maskpro_kernels.cuda.plans import Plan
from maskpro_kernels.cuda.semi_structured import EightBitWeight
from maskpro_kernels.reference import nm_linear_reference, nm_linear_w8a8_reference

HOPPER = Device("NVIDIA H100 80GB HBM3", (9, 0), 132)
AMPERE = Device("NVIDIA A100-SXM4-80GB", (8, 0), 108)
TURING = Device("NVIDIA T4", (7, 5), 40)
TWO_OF_FOUR = NMPattern(2, 4)
BF16, INT8, FP8 = torch.bfloat16, torch.int8, torch.float8_e4m3fn


def packed(pattern: NMPattern = TWO_OF_FOUR, dtype: torch.dtype = BF16, rows: int = 64) -> NMWeight:
    weight = pack(torch.randn(rows, 128).bfloat16(), pattern)
    if dtype == FP8:
        return NMWeight(weight.values.to(FP8), weight.bitmask, weight.shape, pattern, torch.rand(rows))
    return to_int8(weight) if dtype == INT8 else weight


def operands(tokens: int, pattern: NMPattern = TWO_OF_FOUR, dtype: torch.dtype = BF16, rows: int = 64) -> Operands:
    """A product of a weight whose metadata is there, if it has any."""
    weight = packed(pattern, dtype, rows)
    there = Metadata(torch.zeros(1), torch.zeros(1)) if pattern == TWO_OF_FOUR else Metadata()
    x = torch.empty((tokens, 128), dtype=BF16)
    return Operands(x, weight.values, weight.bitmask, weight.scale, None, pattern, there)


def w8a8(tokens: int, dtype: torch.dtype, scale: float | None = None, rows: int = 64) -> Operands:
    """The same of 8 bits, whose activations may be rounded too."""
    inputs = EightBitInputs(dtype, None if scale is None else torch.tensor([scale]))
    there = Metadata(eight_bit=EightBitWeight(torch.zeros(1), torch.zeros(1), inputs))
    return replace(operands(tokens, dtype=dtype, rows=rows), metadata=there)


class FakeGPU:
    """Runs every plan on the reference, and has its times from a table."""

    def __init__(self, monkeypatch, times: dict[str, float], faults: dict[str, object] | None = None) -> None:
        self.times, self.faults = times, faults or {}
        self.ran: Counter[str] = Counter()
        self.last = ""
        self.inputs: EightBitInputs | None = None
        monkeypatch.setattr(dispatch, "run", self.run)

    def run(self, plan: Plan, o: Operands) -> torch.Tensor:
        self.last = plan.backend
        self.ran[plan.backend] += 1
        fault = self.faults.get(plan.backend)
        if isinstance(fault, Exception):
            raise fault
        if plan.backend in EIGHT_BIT.values():
            self.inputs = o.metadata.eight_bit.inputs
            y = nm_linear_w8a8_reference(o.x, o.values, o.bitmask, o.scale, o.bias, self.inputs)
        else:
            y = nm_linear_reference(o.x, o.values, o.bitmask, o.scale, o.bias)
        return y.roll(1, 1) if fault == "wrong" else y

    def measure(self, run) -> float:
        run()
        return self.times[self.last]


EIGHT_BIT = {INT8: "cusparselt-int8", FP8: "cusparselt-fp8"}
TIMES = {"triton": 10.0, "expand": 30.0, "cutlass": 20.0, "cusparselt": 8.0, **dict.fromkeys(EIGHT_BIT.values(), 4.0)}


def rounded_and_padded(x: torch.Tensor, inputs: EightBitInputs, multiple: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the Triton kernel gives (test_round_inputs_triton.py)."""
    return inputs.rounded(torch.nn.functional.pad(x, (0, 0, 0, -x.shape[0] % multiple)))
