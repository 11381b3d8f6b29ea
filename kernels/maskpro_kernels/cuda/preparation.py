"""Readies a weight that was loaded onto a GPU: measures what may run it, and makes what the fastest ways need of it.

Whether activations may be rounded to 8 bits is the caller's to say, as a W8A8 checkpoint does. Why a GPU, a library or
a shape does not allow it is logged once.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from maskpro_kernels.activations import EightBitInputs
from maskpro_kernels.cuda import semi_structured
from maskpro_kernels.cuda.device import Device, device_of
from maskpro_kernels.cuda.dispatch import Metadata, Operands, dispatcher, remember
from maskpro_kernels.cuda.plans import buckets
from maskpro_kernels.packing import NMWeight
from maskpro_kernels.pattern import NMPattern
from maskpro_kernels.support import BACKENDS, candidates

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A weight ready to be multiplied.

    Attributes:
        weight: the same weight; its values may have moved to a buffer they share with metadata.
        metadata: what the sparse tensor cores need, made for the choices that were measured.
        backends: names of those that will run it, the one for few tokens first.
        nbytes: of the weight and its metadata.
    """

    weight: NMWeight
    metadata: Metadata
    backends: tuple[str, ...]
    nbytes: int


def prepare(
    weight: NMWeight, activation: torch.dtype, most_tokens: int, inputs: EightBitInputs | None = None
) -> Prepared:
    """Chooses kernels for a weight on a GPU, for 1 to ``most_tokens`` tokens, and makes what they need.

    The choice is remembered for the weight's two tensors: neither may be written to afterwards.

    Args:
        weight: on a CUDA device.
        activation: dtype of the activations.
        most_tokens: of one call.
        inputs: how activations may be rounded, to the dtype of the weight's values, where that is faster; None if they
            may not. That it cannot be used here is logged.

    Raises:
        UnsupportedKernelError: no backend covers it.
        ValueError: ``inputs`` are of another dtype than the weight's values.

    Cost: measures what the table does not know of this shape, some seconds for a new one; metadata is 1 bit a weight.
    """
    if inputs is not None and inputs.dtype != weight.values.dtype:
        raise ValueError(f"prepare: inputs: expected {weight.values.dtype}, the weight's, found {inputs.dtype}")
    device = device_of(weight.values)
    choices = dispatcher(device)
    everything, values = _all_metadata(weight, activation, device, inputs)
    operands = Operands(
        weight.values.new_empty((1, weight.shape[1]), dtype=activation), values, weight.bitmask, weight.scale, None,
        weight.pattern, everything,
    )  # fmt: skip
    plans = []
    for tokens in buckets(most_tokens):
        plans.append(choices.plan(replace(operands, x=operands.x.expand(tokens, -1))))
    used = tuple(dict.fromkeys(plan.backend for plan in plans))
    needed = {backend.prepared for backend in BACKENDS if backend.name in used}
    metadata = Metadata(**{name: getattr(everything, name) for name in everything.parts if name in needed})
    if metadata.values is None:
        values = weight.values
    kept = replace(weight, values=values)
    remember(kept.values, kept.bitmask, metadata)
    extra = metadata.cutlass.nbytes if metadata.cutlass is not None else 0
    if metadata.values is not None:
        extra += metadata.values.nbytes - values.nbytes
    if metadata.eight_bit is not None:
        extra += metadata.eight_bit.alpha.nbytes
    return Prepared(kept, metadata, used, weight.nbytes + extra)


def _all_metadata(
    weight: NMWeight, activation: torch.dtype, device: Device, inputs: EightBitInputs | None
) -> tuple[Metadata, Tensor]:
    """What every candidate would need, and the values where cuSPARSELt wants them."""
    found: dict[str, Any] = {}
    values, refused = weight.values, False
    types = weight.pattern, activation, values.dtype, "cuda", device.capability
    for backend in candidates(*types):
        if backend.prepared is None or not backend.covers_shape(*weight.shape):
            continue
        try:
            if backend.prepared == "eight_bit":
                if inputs is not None and weight.scale is not None:
                    buffer = semi_structured.cusparselt_buffer(values, weight.bitmask, weight.shape[1])
                    found["eight_bit"] = semi_structured.eight_bit_weight(buffer, weight.scale, inputs)
                    values = semi_structured.values_of_buffer(buffer, values.shape)
            elif weight.scale is not None:
                continue  # the operators for 16 bits apply none
            elif backend.prepared == "cutlass":
                found["cutlass"] = semi_structured.cutlass_metadata(weight.bitmask)
            else:
                buffer = semi_structured.cusparselt_buffer(values, weight.bitmask, weight.shape[1])
                found["cusparselt"] = buffer
                values = semi_structured.values_of_buffer(buffer, values.shape)
        except RuntimeError as error:  # a library without kernels for this GPU
            refused = True
            logger.warning("%s cannot take a weight of %s: %s", backend.name, weight.shape, error)
    if inputs is not None and "eight_bit" not in found and not refused:
        _say_why_not(*types, *weight.shape)
    return Metadata(**found), values


@functools.cache
def _say_why_not(
    pattern: NMPattern, activation: torch.dtype, weight: torch.dtype, device: str, capability: tuple[int, int],
    out_features: int, in_features: int,
) -> None:  # fmt: skip
    """Logs, once, why activations are not rounded to 8 bits though they may be."""
    for backend in BACKENDS:
        if backend.prepared == "eight_bit" and weight in backend.weight_dtypes:
            reason = backend.refusal(pattern, activation, weight, device, capability)
            if reason is None and not backend.covers_shape(out_features, in_features):
                reason = f"takes multiples of {backend.multiples}"
            logger.warning(
                "%s %s weight of %s x %s: activations stay in %s bits: %s: %s", pattern,
                str(weight).removeprefix("torch."), out_features, in_features, 8 * activation.itemsize, backend.name,
                reason or "MASKPRO_KERNEL asks for another",
            )  # fmt: skip
