"""Turns a layer's parameters, as they were loaded, into one packed weight; and drops them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maskpro_kernels import NMPattern, NMWeight
from maskpro_kernels.activations import EightBitInputs
from maskpro_kernels.bits import pack_bits
from maskpro_kernels.interleaved import DENSE
from maskpro_kernels.mask_sources import fill_up
from maskpro_kernels.packing import check_bitmask, group_counts
from maskpro_serve.checkpoint import CheckpointError
from maskpro_serve.scheme import LinearScheme

_CHECKED = ("weight", "compressed", "bitmask", "weight_scale", "input_scale", "input_zero_point")


def loaded_packed(layer: Any, pattern: NMPattern, prefix: str, *, dummy: bool) -> NMWeight:
    """The weight of a layer that is stored packed, checked.

    Raises:
        CheckpointError: a part is missing in the checkpoint, the bitmask is not strict, a scale is not finite, or an
            fp8 value is NaN.
    """
    _check_loaded(layer, prefix, dummy=dummy)
    scale = _scale(layer, prefix)
    values, bitmask = layer.compressed.data, layer.bitmask.data
    _drop(layer)
    values = _computable(values, f"{prefix}.compressed")
    weight = NMWeight(values, bitmask, (values.shape[0], layer.maskpro_in_features), pattern, scale)
    try:
        check_bitmask(weight)
    except ValueError as error:
        raise CheckpointError(f"{prefix}.bitmask: {error}") from error
    return weight


def loaded_dense(layer: Any, pattern: NMPattern, prefix: str, *, dummy: bool) -> NMWeight | None:
    """The weight of a layer that is stored dense, packed by its zeros.

    Where these do not satisfy the pattern, 8-bit values are packed all the same, as a weight that keeps everything;
    others stay in ``layer.weight``, and None is returned.

    Raises:
        CheckpointError: a part is missing in the checkpoint, a scale is not finite, or an fp8 value is NaN.
    """
    _check_loaded(layer, prefix, dummy=dummy)
    scale = _scale(layer, prefix)
    stored = layer.weight.data
    dense = stored.to(torch.bfloat16) if stored.dtype == torch.float8_e4m3fn else stored
    if dummy:
        dense.mul_(torch.arange(dense.shape[1], device=dense.device).remainder(pattern.m) < pattern.n)
    mask = zeros_mask(dense, pattern)
    if mask is None and scale is None:
        return None
    if mask is None:
        pattern, mask = DENSE, torch.ones_like(dense, dtype=torch.bool)
    _drop(layer)
    values = dense[mask].reshape(dense.shape[0], pattern.kept(dense.shape[1])).to(stored.dtype)
    return NMWeight(
        _computable(values, f"{prefix}.weight"), pack_bits(mask), (dense.shape[0], dense.shape[1]), pattern, scale
    )


def loaded_inputs(layer: Any, scheme: LinearScheme, prefix: str, *, dummy: bool) -> EightBitInputs | None:
    """How a layer's activations may be rounded to 8 bits, before its weight is taken; None if they may not.

    Matrices that vLLM fuses have the same activations: of their scales the largest holds, which clips none.

    Raises:
        CheckpointError: a static scale is missing in the checkpoint, or is not a positive number.
    """
    if scheme.inputs is None:
        return None
    parameter = getattr(layer, "input_scale", None)
    if parameter is None or dummy:
        return EightBitInputs(scheme.inputs)
    _check_loaded(layer, prefix, dummy=dummy)
    scale: Tensor = parameter.data.float()
    if not (torch.isfinite(scale) & (scale > 0)).all():
        raise CheckpointError(f"{prefix}.input_scale: expected positive numbers, found {scale.tolist()}")
    return EightBitInputs(scheme.inputs, scale.max().reshape(1))


def zeros_mask(dense: Tensor, pattern: NMPattern) -> Tensor | None:
    """A strict mask that keeps every weight but zeros, or None where a group has more than n others.

    Args:
        dense: (out_features, in_features), which m divides.
        pattern: the pattern.

    Returns:
        Boolean, the shape of ``dense``: what is not zero, and of groups with fewer than n the lowest zeros.
    """
    mask = dense != 0
    counts = group_counts(mask, pattern.m)
    return None if (counts > pattern.n).any() else fill_up(mask, counts, dense, pattern)


def _check_loaded(layer: Any, prefix: str, *, dummy: bool) -> None:
    if dummy:
        return
    for name in _CHECKED:
        parameter = getattr(layer, name, None)
        if parameter is not None and not parameter.complete:
            rows = getattr(parameter, "loaded_rows", 0)
            some = f" but for {rows} of {len(parameter.data)} rows: one of the matrices fused in it" if rows else ""
            raise CheckpointError(f"{prefix}.{name}: missing in the checkpoint{some}")


def _scale(layer: Any, prefix: str) -> Tensor | None:
    """(out_features,), whether the checkpoint has one number for each output or one for each matrix."""
    parameter = getattr(layer, "weight_scale", None)
    if parameter is None:
        return None
    scale: Tensor = parameter.data.flatten()
    if not torch.isfinite(scale).all():
        raise CheckpointError(f"{prefix}.weight_scale: expected finite scales, found inf or NaN")
    if parameter.dim() == 1:
        return scale.repeat_interleave(torch.tensor(layer.maskpro_partitions, device=scale.device))
    return scale


def _computable(values: Tensor, name: str) -> Tensor:
    """fp8 numbers on a CPU as bfloat16, which holds each of them exactly; others as they are."""
    if values.dtype != torch.float8_e4m3fn:
        return values
    if (values.view(torch.uint8) & 0x7F == 0x7F).any():  # the GPU's kernels would take it for 480
        raise CheckpointError(f"{name}: expected numbers, found NaN")
    return values if values.is_cuda else values.to(torch.bfloat16)


def _drop(layer: Any) -> None:
    for name in (*_CHECKED, "shape"):
        if hasattr(layer, name):
            delattr(layer, name)
