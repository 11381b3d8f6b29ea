"""Mask files: safetensors with one packed mask per weight. FORMAT.md is the specification.

Two encodings: ``bitmask`` (1 bit per weight, any pattern, the layout of a packed checkpoint) and
``states`` (M = 4 only: the rank of each group among the masks it can have, as many groups in a byte
as fit; 2:4 takes 0.667 bit per weight), for shipping.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskpro_kernels.bits import bitmask_width, pack_bits, unpack_bits
from maskpro_kernels.files import read_safetensors, write_safetensors
from maskpro_kernels.packing import check_mask
from maskpro_kernels.pattern import NMPattern

FORMAT_VERSION = 1
ENCODINGS = ("bitmask", "states")


class MaskFileError(ValueError):
    """A mask file that cannot be used; names the file, the tensor, what was expected and found."""


@dataclass(frozen=True)
class MaskFile:
    """What a mask file holds.

    Attributes:
        pattern: the pattern every mask obeys.
        masks: weight name (``model.layers.0.mlp.up_proj.weight``) to boolean (out_features, in_features).
        provenance: how it was made: base_model, base_model_sha256, method, steps, seed, ... (all optional).
    """

    pattern: NMPattern
    masks: dict[str, Tensor]
    provenance: dict[str, str]


def groups_per_byte(pattern: NMPattern) -> int:
    """How many groups the ``states`` encoding puts in one byte.

    Raises:
        ValueError: m is not 4; larger groups have too many states to gain anything.
    """
    if pattern.m != 4:
        raise ValueError(f"the states encoding is for groups of 4, found pattern {pattern}: use bitmask")
    return max(k for k in range(1, 9) if pattern.states**k <= 256)


def _state_table(pattern: NMPattern) -> Tensor:
    """Boolean (states, m): the masks of one group in lexicographic order of their kept columns."""
    table = torch.zeros((pattern.states, pattern.m), dtype=torch.bool)
    for state, columns in enumerate(itertools.combinations(range(pattern.m), pattern.n)):
        table[state, list(columns)] = True
    return table


def encode_states(mask: Tensor, pattern: NMPattern) -> Tensor:
    """Encodes a strict boolean (out, in) mask, groups in row-major order, first group least significant.

    Returns:
        uint8 (ceil(groups / groups_per_byte),); the last byte is filled up with state 0.
    """
    per_byte = groups_per_byte(pattern)
    bits = pack_bits(_state_table(pattern)).flatten().long()  # one nibble per state
    rank = torch.zeros(16, dtype=torch.uint8)
    rank[bits] = torch.arange(pattern.states, dtype=torch.uint8)
    digits = rank[pack_bits(mask.reshape(-1, pattern.m)).flatten().long()]
    digits = torch.nn.functional.pad(digits, (0, -len(digits) % per_byte)).reshape(-1, per_byte)
    code = torch.zeros(len(digits), dtype=torch.uint8)
    for position in range(per_byte):
        code += digits[:, position] * pattern.states**position
    return code


def decode_states(code: Tensor, pattern: NMPattern, shape: tuple[int, int]) -> Tensor:
    """Inverse of :func:`encode_states`.

    Raises:
        ValueError: a byte is no code, the length disagrees with the shape, or the padding is not state 0.
    """
    per_byte = groups_per_byte(pattern)
    groups = shape[0] * pattern.kept(shape[1]) // pattern.n
    expected = (groups + per_byte - 1) // per_byte
    if code.dtype != torch.uint8 or tuple(code.shape) != (expected,):
        raise ValueError(f"expected torch.uint8 ({expected},), found {code.dtype} {tuple(code.shape)}")
    limit = pattern.states**per_byte
    if expected and int(code.max()) >= limit:
        raise ValueError(f"byte {int(code.max())} is no code of {per_byte} {pattern} groups (below {limit})")
    digits = torch.stack([code // pattern.states**k % pattern.states for k in range(per_byte)], dim=1).flatten()
    if digits[groups:].any():
        raise ValueError("padding after the last group is not state 0")
    return _state_table(pattern)[digits[:groups].long()].reshape(shape)


def write_masks(
    path: Path,
    masks: Mapping[str, Tensor],
    pattern: NMPattern,
    *,
    provenance: Mapping[str, str] | None = None,
    encoding: str = "bitmask",
) -> None:
    """Writes a mask file: to a temporary name, synced, then renamed.

    Args:
        path: the file to write; its folder must exist.
        masks: weight name to boolean (out_features, in_features), strictly ``pattern``.
        pattern: the pattern.
        provenance: metadata to keep, text to text.
        encoding: ``bitmask``, or ``states`` for M = 4.

    Raises:
        ValueError: a mask is not strict (names the tensor), or the encoding is unknown.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"unknown mask encoding {encoding!r}: expected one of {ENCODINGS}")
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, mask in masks.items():
        try:
            check_mask(mask, pattern)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        mask = mask.cpu()
        shapes[name] = list(mask.shape)
        tensors[f"{name}.mask"] = pack_bits(mask) if encoding == "bitmask" else encode_states(mask, pattern)
    metadata = {
        **(provenance or {}),
        "format": "maskpro-mask",
        "format_version": str(FORMAT_VERSION),
        "pattern": str(pattern),
        "encoding": encoding,
        "shapes": json.dumps(shapes, sort_keys=True),
    }
    write_safetensors(path, tensors, metadata)


def read_masks(path: Path) -> MaskFile:
    """Reads a mask file and checks all of it.

    Raises:
        MaskFileError: the file is missing, is no mask file, is from a newer format version, or holds a
            mask that is not strict; the message names the file, the tensor, expected and found.
    """
    metadata, tensors = read_safetensors(path, "mask file", MaskFileError)
    pattern, encoding, shapes = _header(path, metadata)
    masks = {}
    for name, (out_features, in_features) in shapes.items():
        tensor = tensors.pop(f"{name}.mask", None)
        if tensor is None:
            raise MaskFileError(f"{path}: tensor {name}.mask is listed in the metadata but missing")
        try:
            if encoding == "states":
                masks[name] = decode_states(tensor, pattern, (out_features, in_features))
            else:
                masks[name] = _decode_bitmask(tensor, pattern, (out_features, in_features))
        except ValueError as error:
            raise MaskFileError(f"{path}: {name}.mask: {error}") from error
    if tensors:
        raise MaskFileError(f"{path}: unexpected tensor {min(tensors)}")
    own = {"format", "format_version", "pattern", "encoding", "shapes"}
    return MaskFile(pattern, masks, {k: v for k, v in metadata.items() if k not in own})


def _header(path: Path, metadata: dict[str, str]) -> tuple[NMPattern, str, dict[str, tuple[int, int]]]:
    if metadata.get("format") != "maskpro-mask":
        raise MaskFileError(f"{path}: metadata format: expected 'maskpro-mask', found {metadata.get('format')!r}")
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise MaskFileError(
            f"{path}: format_version: expected {FORMAT_VERSION}, found {metadata.get('format_version')!r}"
        )
    encoding = metadata.get("encoding")
    if encoding not in ENCODINGS:
        raise MaskFileError(f"{path}: encoding: expected one of {ENCODINGS}, found {encoding!r}")
    try:
        pattern = NMPattern.parse(metadata.get("pattern", ""))
        raw: dict[str, Any] = json.loads(metadata.get("shapes", ""))
        shapes = {name: (int(out), int(inner)) for name, (out, inner) in raw.items()}
        if any(out < 0 or inner < 0 for out, inner in shapes.values()):
            raise ValueError("a negative size")
    except (ValueError, TypeError, AttributeError) as error:
        raise MaskFileError(f"{path}: metadata pattern or shapes: {error}") from error
    return pattern, encoding, shapes


def _decode_bitmask(bitmask: Tensor, pattern: NMPattern, shape: tuple[int, int]) -> Tensor:
    expected = (shape[0], bitmask_width(shape[1]))
    if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != expected:
        raise ValueError(f"expected torch.uint8 {expected}, found {bitmask.dtype} {tuple(bitmask.shape)}")
    bits = unpack_bits(bitmask, 8 * expected[1])
    if bits[:, shape[1] :].any():
        raise ValueError(f"a bit past column {shape[1] - 1} is set")
    mask = bits[:, : shape[1]]
    check_mask(mask, pattern)
    return mask
