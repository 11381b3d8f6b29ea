"""``nm_linear`` on a GPU: the number of tokens and the measured table say which backend runs.

Few tokens are bound by the bytes of the weight, and the Triton kernel reads the stored ones. Many are bound by
arithmetic: the sparse tensor cores do 2:4 at up to twice the dense rate; for other patterns the dense weight is written
to a buffer first (``expand``), which costs N/M * 2 + 1/8 + 2 bytes a weight once, and cuBLAS multiplies. Where one
begins to win against the other is measured on the GPU at hand (cuda/tuning.py), for 16, 32, ... 8,192 tokens.

The choice is a Python branch on the number of tokens, which a CUDA graph fixes when it is captured. Nothing can be
measured during a capture: a problem that is not in the table by then runs on Triton with the likeliest tile, and a
warning says so. :func:`maskpro_kernels.cuda.prepare` measures everything beforehand.

A weight of 8 bits whose activations may be rounded to 8 bits too (W8A8), as its checkpoint says, has one way more: the
sparse tensor cores at the rate of 8 bits. The others take its activations as they are, which is closer to the model
that was rounded.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from maskpro_kernels.activations import LARGEST
from maskpro_kernels.cuda import semi_structured
from maskpro_kernels.cuda.device import Device, device_of
from maskpro_kernels.cuda.plans import Plan, PlanTable, Problem, bucket, default_folder
from maskpro_kernels.cuda.semi_structured import EightBitWeight
from maskpro_kernels.cuda.tuning import FAILED, Run, choose, measure_on_gpu, time_of
from maskpro_kernels.packing import EIGHT_BITS
from maskpro_kernels.pattern import NMPattern
from maskpro_kernels.reference import nm_linear_reference, nm_linear_w8a8_reference
from maskpro_kernels.support import BACKENDS, candidates, requested
from maskpro_kernels.triton.tile import Tile, tiles

logger = logging.getLogger(__name__)

_CHECKED_TOKENS = 16
_CHECKED_ROWS = 256
_LARGEST_SAMPLE = 5.0
"""A normal number is rarely larger."""


@dataclass(frozen=True, eq=False)
class Metadata:
    """What the sparse tensor cores need of a weight besides its values; what a backend does not need is None."""

    cutlass: Tensor | None = None
    cusparselt: Tensor | None = None
    eight_bit: EightBitWeight | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of what is there, as ``Backend.prepared`` has them."""
        return tuple(name for name in _PARTS if getattr(self, name) is not None)

    @property
    def values(self) -> Tensor | None:
        """The buffer that the kept values share with cuSPARSELt's metadata, if there is one."""
        return self.cusparselt if self.eight_bit is None else self.eight_bit.buffer


_PARTS = tuple(part.name for part in fields(Metadata))


_NONE = Metadata()


@dataclass(frozen=True)
class Operands:
    """One product: x (tokens, in_features), the rest as of the operator."""

    x: Tensor
    values: Tensor
    bitmask: Tensor
    scale: Tensor | None
    bias: Tensor | None
    pattern: NMPattern
    metadata: Metadata = _NONE

    @property
    def problem(self) -> Problem:
        tokens, in_features = self.x.shape
        return Problem(self.pattern, self.x.dtype, self.values.dtype, self.values.shape[0], in_features, bucket(tokens))


def run(plan: Plan, operands: Operands) -> Tensor:
    """Multiplies as a plan says."""
    o = operands
    match plan.backend:
        case "triton":
            from maskpro_kernels.triton.nm_linear import nm_linear as multiply

            assert plan.tile is not None
            return multiply(o.x, o.values, o.bitmask, o.scale, o.bias, o.pattern, plan.tile)
        case "expand":
            return _expanded_linear(o)
        case "cutlass":
            assert o.metadata.cutlass is not None
            return semi_structured.cutlass_linear(o.x, o.values, o.metadata.cutlass, o.bias)
        case "cusparselt":
            assert o.metadata.cusparselt is not None
            return semi_structured.cusparselt_linear(o.x, o.metadata.cusparselt, o.bias)
        case "cusparselt-int8" | "cusparselt-fp8":
            assert o.metadata.eight_bit is not None
            return semi_structured.w8a8_linear(o.x, o.metadata.eight_bit, o.bias)
        case _:
            return nm_linear_reference(o.x, o.values, o.bitmask, o.scale, o.bias)


def _expanded_linear(o: Operands) -> Tensor:
    from maskpro_kernels.triton.nm_linear import expand, multiplied_in

    dtype = multiplied_in(o.x.dtype, o.values.dtype)
    dense = expand(o.values, o.bitmask, o.x.shape[1], o.pattern, dtype)
    if o.scale is not None:  # rounded into the weight: a sum of int8 or fp8 products could leave float16
        dense.mul_(o.scale.unsqueeze(1))
    bias = None if o.bias is None else o.bias.to(dtype)
    return F.linear(o.x.to(dtype), dense, bias).to(o.x.dtype)


def ways(backend: str, operands: Operands, device: Device) -> dict[Plan, Run]:
    """The plans a backend could follow for a product, and how to run each."""
    plans = [Plan(backend)]
    if backend == "triton":
        plans = [Plan(backend, tile) for tile in _tiles(operands.problem, device)]
    return {plan: functools.partial(run, plan, operands) for plan in plans}


def _tiles(problem: Problem, device: Device) -> list[Tile]:
    stored = 4 if problem.activation == torch.float32 or problem.weight not in (problem.activation, *EIGHT_BITS) else 2
    return tiles(problem.tokens, problem.out_features, problem.in_features, device.processors, stored)


class Dispatcher:
    """The choices of one kind of GPU.

    Args:
        device: the GPU.
        table: its measured times.
        measure: microseconds of a call.
    """

    def __init__(self, device: Device, table: PlanTable, measure: Callable[[Run], float] = measure_on_gpu) -> None:
        self.device = device
        self.table = table
        self.measure = measure
        self._chosen: dict[tuple[str, Problem, tuple[str, ...]], Plan] = {}
        self._warned: set[Problem] = set()

    def plan(self, operands: Operands) -> Plan:
        """The plan for a product; measured now if it has to be."""
        problem = operands.problem
        key = (requested(), problem, operands.metadata.parts)
        found = self._chosen.get(key)
        if found is not None:
            return found
        allowed = self._allowed(problem, operands.metadata)
        if allowed == ("reference",):
            return Plan("reference")
        if _capturing():
            return self._unmeasured(problem, allowed)
        found = self._chosen[key] = self._measured(operands, allowed)
        return found

    def _allowed(self, problem: Problem, metadata: Metadata) -> tuple[str, ...]:
        """Names of the backends that may run a problem, the preferred one first."""
        there = (None, *metadata.parts)
        types = problem.pattern, problem.activation, problem.weight, "cuda", self.device.capability
        found = tuple(
            backend.name
            for backend in candidates(*types)
            if backend.covers_shape(problem.out_features, problem.in_features) and backend.prepared in there
        )
        if not found:
            raise ValueError(
                f"nm_linear: {problem}: the kernels that MASKPRO_KERNEL asks for do not cover this shape, or need a "
                "weight that maskpro_kernels.cuda.prepare() was given"
            )
        return found

    def _unmeasured(self, problem: Problem, allowed: tuple[str, ...]) -> Plan:
        known = [plan for name, plan in self.table.of(problem).items() if name in allowed and time_of(plan) < FAILED]
        if known:
            return min(known, key=time_of)
        plan = Plan(allowed[0], _tiles(problem, self.device)[0] if allowed[0] == "triton" else None)
        if problem not in self._warned:
            self._warned.add(problem)
            logger.warning("%s: nothing was measured before this CUDA graph was captured; it runs on %s", problem, plan)
        return plan

    def _measured(self, operands: Operands, allowed: tuple[str, ...]) -> Plan:
        """Chooses for the bucket's number of tokens, with activations of its own."""
        problem = operands.problem
        x = torch.randn((problem.tokens, problem.in_features), device=operands.x.device, dtype=operands.x.dtype)
        sample = replace(operands, x=x, metadata=_calibrated(operands.metadata))
        expected = functools.cache(functools.partial(expected_output, sample))
        with torch.cuda.device_of(x):
            return choose(
                self.table, problem, allowed, lambda name: ways(name, sample, self.device),
                lambda plan, y: right(sample, expected(plan.backend in _EIGHT_BIT), y), self.measure,
            )  # fmt: skip


_EIGHT_BIT = tuple(backend.name for backend in BACKENDS if backend.prepared == "eight_bit")


def _calibrated(metadata: Metadata) -> Metadata:
    """The same for a sample's activations: a stored scale was calibrated for others."""
    weight = metadata.eight_bit
    if weight is None or weight.inputs.scale is None:
        return metadata
    scale = torch.full_like(weight.inputs.scale, _LARGEST_SAMPLE / LARGEST[weight.inputs.dtype])
    return replace(metadata, eight_bit=replace(weight, inputs=replace(weight.inputs, scale=scale)))


def _checked_rows(weight: Tensor) -> Tensor:
    """Numbers of the weight's rows whose outputs are compared: all of a large weight in float64 takes gigabytes."""
    count = len(weight)
    return torch.linspace(0, count - 1, min(count, _CHECKED_ROWS), device=weight.device).round().long()


def _some(of_tokens: Tensor) -> Tensor:
    """The first and the last tokens: the last tile may be cut short."""
    return torch.cat([of_tokens[:_CHECKED_TOKENS], of_tokens[-_CHECKED_TOKENS:]]).float()


def expected_output(operands: Operands, eight_bit: bool = False) -> Tensor:
    """Some outputs; of activations that are rounded to 8 bits if ``eight_bit``.

    In float64: a product of float32 may be one of TF32 numbers, if the process allows them.
    """
    o = operands
    rows = _checked_rows(o.values)
    values = o.values.view(torch.uint8)[rows].view(o.values.dtype)  # as bytes: not every dtype can be picked from
    scale, bias = (None if part is None else part[rows] for part in (o.scale, o.bias))
    if not eight_bit:
        return nm_linear_reference(_some(o.x).double(), values, o.bitmask[rows], scale, bias)
    assert o.metadata.eight_bit is not None
    assert scale is not None
    return nm_linear_w8a8_reference(_some(o.x), values, o.bitmask[rows], scale, bias, o.metadata.eight_bit.inputs)


def right(operands: Operands, expected: Tensor, y: Tensor) -> bool:
    """Whether some outputs are the expected ones, to the rounding of the dtype.

    Rounding every weight and every output once, in random directions, moves the outputs by a part of eps of their
    norm. 8 eps are no chance: of bfloat16, one weight in 500 at a wrong place makes as much. Float32 sums round, too.
    A weight may hold infinities or NaN: what they reach is not compared.
    """
    eps = max(torch.finfo(operands.x.dtype).eps, 2**-18)
    there = torch.isfinite(expected)
    error = (_some(y[:, _checked_rows(operands.values)]) - expected)[there].norm()
    return bool(error <= 8 * eps * expected[there].norm())


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@functools.cache
def dispatcher(device: Device) -> Dispatcher:
    """The process's dispatcher for a kind of GPU."""
    return Dispatcher(device, PlanTable(device, default_folder()))


@dataclass(frozen=True)
class _Kept:
    bitmask: weakref.ref[Tensor]
    metadata: Metadata


_prepared: MutableMapping[Tensor, _Kept] = WeakTensorKeyDictionary()


def remember(values: Tensor, bitmask: Tensor, metadata: Metadata) -> None:
    """Gives the metadata to every later product with these two tensors, for as long as they live.

    They are the weight's own, or others of the same memory: a Parameter is another tensor than what it was made of.
    """
    _prepared[values] = _Kept(weakref.ref(bitmask), metadata)


def nm_linear(
    x: Tensor, values: Tensor, bitmask: Tensor, scale: Tensor | None, bias: Tensor | None, pattern: NMPattern
) -> Tensor:
    """The operator's implementation for x (tokens, in_features) on a GPU; arguments were checked."""
    if x.shape[0] == 0:
        return x.new_empty((0, values.shape[0]))
    kept = _prepared.get(values)
    metadata = kept.metadata if kept is not None and kept.bitmask() is bitmask else _NONE
    operands = Operands(x, values, bitmask, scale, bias, pattern, metadata)
    return run(dispatcher(device_of(x)).plan(operands), operands)
