"""Mask files: safetensors with one packed mask per weight. FORMAT.md is the specification.

Two encodings: ``bitmask`` (1 bit per weight, any pattern, the layout of a packed checkpoint) and
``states`` (M = 4 only: the rank of each group among the masks it can have, as many groups in a byte
as fit; 2:4 takes 0.667 bit per weight), for shipping.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maskpro_kernels.bits import bitmask_width, pack_bits, unpack_bits
from maskpro_kernels.files import write_safetensors
from maskpro_kernels.packing import check_bits, check_mask
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


def decode_states(
    code: Tensor, pattern: NMPattern, shape: tuple[int, int], first: int = 0, rows: int | None = None
) -> Tensor:
    """Inverse of :func:`encode_states`, of all rows or some.

    Args:
        code: of the whole mask.
        pattern: the pattern.
        shape: (out, in) of the whole mask.
        first: the first row wanted.
        rows: how many; None for all from there.

    Raises:
        ValueError: a byte is no code, the length disagrees with the shape, or the padding is not state 0.
    """
    per_byte = groups_per_byte(pattern)
    width = pattern.kept(shape[1]) // pattern.n
    groups = shape[0] * width
    expected = (groups + per_byte - 1) // per_byte
    if code.dtype != torch.uint8 or tuple(code.shape) != (expected,):
        raise ValueError(f"expected torch.uint8 ({expected},), found {code.dtype} {tuple(code.shape)}")
    begin, end = first * width, groups if rows is None else (first + rows) * width
    part = code[begin // per_byte : (end + per_byte - 1) // per_byte]
    limit = pattern.states**per_byte
    if len(part) and int(part.max()) >= limit:
        raise ValueError(f"byte {int(part.max())} is no code of {per_byte} {pattern} groups (below {limit})")
    digits = torch.stack([part // pattern.states**k % pattern.states for k in range(per_byte)], dim=1).flatten()
    skipped = begin % per_byte
    if end == groups and digits[skipped + end - begin :].any():
        raise ValueError("padding after the last group is not state 0")
    return _state_table(pattern)[digits[skipped : skipped + end - begin].long()].reshape(-1, shape[1])


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


class MaskReader:
    """A mask file, read and checked a part at a time.

    Attributes:
        path: the file.
        pattern: the pattern every mask obeys.
        shapes: weight name to (out_features, in_features).
        provenance: how it was made.

    Raises:
        MaskFileError: the file is missing, is no mask file, or is from a newer format version; names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as file:
            metadata: dict[str, str] = dict(sorted((file.metadata() or {}).items()))  # each reading has another order
            names = set(file.keys())
        self.pattern, self._encoding, self.shapes = _header(path, metadata)
        expected = {f"{name}.mask" for name in self.shapes}
        if missing := sorted(expected - names):
            raise MaskFileError(f"{path}: tensor {missing[0]} is listed in the metadata but missing")
        if unexpected := sorted(names - expected):
            raise MaskFileError(f"{path}: unexpected tensor {unexpected[0]}")
        own = {"format", "format_version", "pattern", "encoding", "shapes"}
        self.provenance = {key: value for key, value in metadata.items() if key not in own}

    def read(self, name: str, first: int = 0, rows: int | None = None) -> Tensor:
        """One mask, or some of its rows: boolean (rows, in_features).

        Raises:
            MaskFileError: it is not strict, or does not fit its shape; names the file, the tensor, expected and found.
        """
        return unpack_bits(self.read_bits(name, first, rows), self.shapes[name][1])

    def read_bits(self, name: str, first: int = 0, rows: int | None = None) -> Tensor:
        """One mask, or some of its rows, as a bitmask: uint8 (rows, ceil(in_features / 8)).

        Raises:
            MaskFileError: as :meth:`read`.
        """
        shape = self.shapes[name]
        with self._open() as file:
            try:
                if self._encoding == "states":
                    return pack_bits(decode_states(file.get_tensor(f"{name}.mask"), self.pattern, shape, first, rows))
                stored = file.get_slice(f"{name}.mask")
                expected, found = (shape[0], bitmask_width(shape[1])), tuple(stored.get_shape())
                if stored.get_dtype() != "U8" or found != expected:
                    raise ValueError(f"expected U8 {expected}, found {stored.get_dtype()} {found}")
                bitmask: Tensor = stored[first : shape[0] if rows is None else first + rows]
                check_bits(bitmask, shape[1], self.pattern, first_row=first)
                return bitmask
            except ValueError as error:
                raise MaskFileError(f"{self.path}: {name}.mask: {error}") from error

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self.path, framework="pt") as file:
                yield file
        except FileNotFoundError as error:
            raise MaskFileError(f"{self.path}: no such mask file") from error
        except (OSError, SafetensorError) as error:
            raise MaskFileError(f"{self.path}: not a readable safetensors file: {error}") from error


def read_masks(path: Path) -> MaskFile:
    """Reads a mask file and checks all of it.

    Raises:
        MaskFileError: the file is missing, is no mask file, is from a newer format version, or holds a
            mask that is not strict; the message names the file, the tensor, expected and found.
    """
    reader = MaskReader(path)
    return MaskFile(reader.pattern, {name: reader.read(name) for name in reader.shapes}, reader.provenance)


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
