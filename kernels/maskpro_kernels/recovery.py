"""Recovery files: a low-rank update of the kept weights, merged under the mask. FORMAT.md is the specification.

Pruning changes what the kept weights should be. W' = m * (W + B A) moves them all with rank * (out + in) numbers, at
no cost at inference: W' is packed like any other weight. The factors are stored in 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from maskpro_kernels.files import file_sha256, read_safetensors, write_safetensors
from maskpro_kernels.int8 import nearest_levels

FORMAT_VERSION = 1
_SUFFIXES = (".b", ".b_scale", ".a", ".a_scale")


class RecoveryFileError(ValueError):
    """A recovery file that cannot be used; names the file, the tensor, what was expected and found."""


@dataclass(frozen=True)
class LowRank:
    """The update B A of one weight.

    Attributes:
        b: float32 (out_features, rank).
        a: float32 (rank, in_features).
    """

    b: Tensor
    a: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        return self.b.shape[0], self.a.shape[1]

    def rounded(self) -> LowRank:
        """What a recovery file gives back of it: 8 bits for each number, one scale for each of the rank's vectors."""
        return _dequantize(_quantize(self))


@dataclass(frozen=True)
class RecoveryFile:
    """What a recovery file holds.

    Attributes:
        updates: weight name (``model.layers.0.mlp.up_proj.weight``) to its update.
        provenance: how it was made: base_model, base_model_sha256, mask_sha256, method, ... (all optional).
    """

    updates: dict[str, LowRank]
    provenance: dict[str, str]


def recovered(weight: Tensor, mask: Tensor, update: LowRank) -> Tensor:
    """``mask * (weight + b @ a)``, in the weight's dtype and on its device.

    The sum is float64, so that every machine rounds to the same weights.

    Args:
        weight: (out_features, in_features), the dense weight.
        mask: boolean of the same shape.
        update: of the same shape.

    Raises:
        ValueError: the shapes disagree.
    """
    if tuple(weight.shape) != update.shape or mask.shape != weight.shape:
        raise ValueError(
            f"recovery: expected an update of shape {tuple(weight.shape)}, found {update.shape} (mask "
            f"{tuple(mask.shape)})"
        )
    change = update.b.to(weight.device).double() @ update.a.to(weight.device).double()
    return torch.where(mask.to(weight.device), weight.double() + change, 0).to(weight.dtype)


def write_recovery(path: Path, updates: Mapping[str, LowRank], *, provenance: Mapping[str, str] | None = None) -> None:
    """Writes a recovery file: to a temporary name, synced, then renamed.

    Args:
        path: the file to write; its folder must exist.
        updates: weight name to update; the factors are rounded to 8 bits.
        provenance: metadata to keep, text to text.

    Raises:
        ValueError: a factor is not finite; names the weight.
        OSError: the file cannot be written; what was there is intact.
    """
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        try:
            parts = _quantize(update)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        tensors |= {name + suffix: part.contiguous() for suffix, part in zip(_SUFFIXES, parts, strict=True)}
    metadata = {**(provenance or {}), "format": "maskpro-recovery", "format_version": str(FORMAT_VERSION)}
    write_safetensors(path, tensors, metadata)


def read_recovery(path: Path, mask: Path | None = None) -> RecoveryFile:
    """Reads a recovery file and checks all of it.

    Args:
        path: the file.
        mask: the mask file it is meant for; one that says which file it was made with must mean this one.

    Raises:
        RecoveryFileError: the file is missing, of another kind or version, its tensors do not fit together, or it was
            made with another mask.
        OSError: the mask file cannot be read.
    """
    metadata, tensors = read_safetensors(path, "recovery file", RecoveryFileError)
    for key, expected in (("format", "maskpro-recovery"), ("format_version", str(FORMAT_VERSION))):
        if metadata.get(key) != expected:
            raise RecoveryFileError(f"{path}: metadata {key}: expected {expected!r}, found {metadata.get(key)!r}")
    updates = {}
    for name in sorted(key.removesuffix(".b") for key in tensors if key.endswith(".b")):
        parts = [tensors.pop(name + suffix, None) for suffix in _SUFFIXES]
        if missing := [suffix for suffix, part in zip(_SUFFIXES, parts, strict=True) if part is None]:
            raise RecoveryFileError(f"{path}: tensor {name}{missing[0]} is missing")
        try:
            updates[name] = _dequantize([part for part in parts if part is not None])
        except ValueError as error:
            raise RecoveryFileError(f"{path}: {name}: {error}") from error
    if tensors:
        raise RecoveryFileError(f"{path}: unexpected tensor {min(tensors)}")
    made_with = metadata.get("mask_sha256")
    if mask is not None and made_with is not None:
        found = file_sha256(mask)
        if made_with != found:
            raise RecoveryFileError(f"{path}: mask_sha256: expected {found}, the one of {mask}, found {made_with}")
    own = {"format", "format_version"}
    return RecoveryFile(updates, {key: value for key, value in metadata.items() if key not in own})


def _quantize(update: LowRank) -> list[Tensor]:
    """b, its scales, a, its scales: each of the rank's vectors is rounded to a multiple of its largest number / 127."""
    parts = []
    for factor, along in ((update.b, 0), (update.a, 1)):
        factor = factor.detach().float().cpu()
        if not bool(torch.isfinite(factor).all()):
            raise ValueError("recovery: a factor is not finite")
        levels, scale = nearest_levels(factor, along)
        parts += [levels, scale.flatten()]
    return parts


def _dequantize(parts: list[Tensor]) -> LowRank:
    b, b_scale, a, a_scale = parts
    for what, tensor, dimensions in (("b", b, 2), ("b_scale", b_scale, 1), ("a", a, 2), ("a_scale", a_scale, 1)):
        if tensor.dim() != dimensions:
            raise ValueError(f"{what}: expected {dimensions} dimensions, found {tuple(tensor.shape)}")
    rank = len(b_scale)
    for what, tensor, dtype, shape in (
        ("b", b, torch.int8, (b.shape[0], rank)),
        ("b_scale", b_scale, torch.float32, (rank,)),
        ("a", a, torch.int8, (rank, a.shape[-1])),
        ("a_scale", a_scale, torch.float32, (rank,)),
    ):
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{what}: expected {dtype} {shape}, found {tensor.dtype} {tuple(tensor.shape)}")
    if not bool(torch.isfinite(b_scale).all() and torch.isfinite(a_scale).all()):
        raise ValueError("a scale is not finite")
    return LowRank(b.float() * b_scale, a.float() * a_scale.unsqueeze(1))
