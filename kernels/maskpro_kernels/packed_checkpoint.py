"""Reads and checks a packed checkpoint: a Hugging Face folder with ``compressed``, ``bitmask``, ``shape``.

FORMAT.md is the specification. Every way a file can be wrong is one :class:`CheckpointError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskpro_kernels.bits import bitmask_width
from maskpro_kernels.model_folder import (
    INDEX,
    CheckpointError,
    TensorInfo,
    open_safetensors,
    read_config,
    read_headers,
    read_index,
    read_tensor,
)
from maskpro_kernels.packing import WEIGHT_DTYPES, NMWeight, check_bitmask
from maskpro_kernels.pattern import NMPattern

QUANT_METHOD = "maskpro"
FORMAT = "nm-bitmask"
FORMAT_VERSION = 1
SUFFIXES = (".compressed", ".bitmask", ".shape")
SCALE_SUFFIX = ".weight_scale"
"""With int8 values only."""

MAY_BE_EIGHT_BITS = ("values", "activations", "head")
"""Keys that are there for 8 bits only."""

_OWN_KEYS = {"quant_method", "format", "format_version", "pattern", "ignore", *MAY_BE_EIGHT_BITS}


def _foreign(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are not the format's own: where the mask came from."""
    return {key: value for key, value in entries.items() if key not in _OWN_KEYS}


@dataclass(frozen=True)
class PackedFormat:
    """The ``quantization_config`` of a packed checkpoint.

    Attributes:
        pattern: the (N:M) pattern of every packed linear.
        ignore: names of linears that stayed dense.
        provenance: the rest: where the mask came from.
        values: ``int8``, or None for kept values of the model's own dtype.
        activations: ``int8`` allows to round those of every packed linear, each token by a scale of its own; None does
            not. Only beside int8 values.
        head: ``int8`` allows to round the rows of the output head, each to multiples of a scale of its own.
    """

    pattern: NMPattern
    ignore: tuple[str, ...] = ()
    provenance: Mapping[str, Any] | None = None
    values: str | None = None
    activations: str | None = None
    head: str | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], where: str) -> PackedFormat:
        """Parses it.

        Args:
            config: the ``quantization_config`` of config.json.
            where: the file, for messages.

        Raises:
            CheckpointError: another method, format, a newer version, or an unknown pattern.
        """
        for key, expected in (("quant_method", QUANT_METHOD), ("format", FORMAT)):
            if config.get(key) != expected:
                raise CheckpointError(f"{where}: {key}: expected {expected!r}, found {config.get(key)!r}")
        found = config.get("format_version")
        if found != FORMAT_VERSION:
            newer = isinstance(found, int) and found > FORMAT_VERSION
            hint = "; it was written by a newer maskpro-serve, upgrade to read it" if newer else ""
            raise CheckpointError(f"{where}: format_version: expected {FORMAT_VERSION}, found {found!r}{hint}")
        try:
            pattern = NMPattern.parse(config.get("pattern", ""))
        except ValueError as error:
            raise CheckpointError(f"{where}: pattern: {error}") from error
        ignore = config.get("ignore", [])
        if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
            raise CheckpointError(f"{where}: ignore: expected a list of layer names, found {ignore!r}")
        eight_bits = {name: config.get(name) for name in MAY_BE_EIGHT_BITS}
        check_eight_bits(**eight_bits, where=f"{where}: ")
        return cls(pattern, tuple(ignore), _foreign(config), **eight_bits)

    def to_dict(self) -> dict[str, Any]:
        """The inverse of :meth:`from_dict`."""
        return {
            **_foreign(self.provenance or {}),
            "quant_method": QUANT_METHOD,
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "pattern": str(self.pattern),
            **{name: kind for name in MAY_BE_EIGHT_BITS if (kind := getattr(self, name)) is not None},
            "ignore": list(self.ignore),
        }


def check_eight_bits(values: object, activations: object, head: object, where: str = "") -> None:
    """Checks what values, activations and the output head are rounded to; ``where`` begins a message.

    Raises:
        CheckpointError: neither ``int8`` nor None, or activations are rounded beside other values.
    """
    for name, found in (("values", values), ("activations", activations), ("head", head)):
        if found not in (None, "int8"):
            raise CheckpointError(f"{where}{name}: expected 'int8' or none, found {found!r}")
    if activations is not None and values is None:
        raise CheckpointError(f"{where}activations: expected none without int8 values, found {activations!r}")


def packed_names(headers: Mapping[str, TensorInfo]) -> list[str]:
    """Names (without suffix) of the packed linears."""
    return sorted({name.removesuffix(s) for name in headers for s in SUFFIXES if name.endswith(s)})


def check_parts(
    headers: Mapping[str, TensorInfo], name: str, pattern: NMPattern
) -> tuple[TensorInfo, TensorInfo, tuple[int, int]]:
    """Checks the three parts of a packed linear against each other, but for the dtype of its values.

    Args:
        headers: from :func:`read_headers`.
        name: the linear's name, without suffix.
        pattern: the pattern it is packed in.

    Returns:
        ``compressed``, ``bitmask``, and (out_features, in_features).

    Raises:
        CheckpointError: a part is missing, or the parts disagree.
    """
    compressed, bitmask, shape = (part(headers, name, suffix) for suffix in SUFFIXES)
    with open_safetensors(shape.file) as file:
        if shape.dtype != torch.int64 or shape.shape != (2, 1):
            raise CheckpointError(f"{shape}: expected int64 (2, 1), found {shape.dtype} {shape.shape}")
        out_features, in_features = (int(size) for size in file.get_tensor(shape.name).flatten())
    if out_features <= 0 or not pattern.divides(in_features):
        raise CheckpointError(f"{shape}: ({out_features}, {in_features}) is no shape that {pattern} groups divide")
    for info, columns in ((compressed, pattern.kept(in_features)), (bitmask, bitmask_width(in_features))):
        if info.shape != (out_features, columns):
            raise CheckpointError(
                f"{info}: expected shape {(out_features, columns)} (a {pattern} weight of {out_features} x "
                f"{in_features}), found {info.shape}"
            )
    if bitmask.dtype != torch.uint8:
        raise CheckpointError(f"{bitmask}: expected torch.uint8, found {bitmask.dtype}")
    return compressed, bitmask, (out_features, in_features)


def part(headers: Mapping[str, TensorInfo], name: str, suffix: str) -> TensorInfo:
    """One part of a linear.

    Raises:
        CheckpointError: it is missing.
    """
    if (info := headers.get(name + suffix)) is None:
        folder = next(iter(headers.values())).file.parent
        raise CheckpointError(f"{folder}: tensor {name}{suffix} is missing, but other parts of {name} are there")
    return info


def read_packed(
    headers: Mapping[str, TensorInfo], name: str, packed: PackedFormat, *, contents: bool
) -> NMWeight | None:
    """Checks one packed linear, and reads it.

    Args:
        headers: from :func:`read_headers`.
        name: the linear's name, without suffix.
        packed: the checkpoint's format.
        contents: False checks shapes and dtypes only, and returns None.

    Raises:
        CheckpointError: a part is missing, the parts disagree, or the bitmask is not strict.
    """
    pattern = packed.pattern
    compressed, bitmask, shape = check_parts(headers, name, pattern)
    scale = part(headers, name, SCALE_SUFFIX) if packed.values == "int8" else None
    if scale is None and compressed.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(f"{compressed}: expected a 16 or 32 bit float, found {compressed.dtype}")
    if scale is not None and compressed.dtype != torch.int8:
        raise CheckpointError(f"{compressed}: expected torch.int8, as config.json says, found {compressed.dtype}")
    if scale is not None and (scale.dtype not in WEIGHT_DTYPES or scale.shape != (shape[0], 1)):
        raise CheckpointError(
            f"{scale}: expected a 16 or 32 bit float {(shape[0], 1)}, found {scale.dtype} {scale.shape}"
        )
    if not contents:
        return None
    scales = None if scale is None else read_tensor(scale).float().flatten()
    if scales is not None and not torch.isfinite(scales).all():
        raise CheckpointError(f"{scale}: expected finite scales, found inf or NaN")
    weight = NMWeight(read_tensor(compressed), read_tensor(bitmask), shape, pattern, scales)
    try:
        check_bitmask(weight)
    except ValueError as error:
        raise CheckpointError(f"{bitmask}: {error}") from error
    return weight


def packed_format(folder: Path) -> PackedFormat | None:
    """The folder's packed format, or None if it is a checkpoint of another kind.

    Raises:
        CheckpointError: config.json is unreadable, or its ``quantization_config`` is ours and wrong.
    """
    quantization = read_config(folder).get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        return None
    return PackedFormat.from_dict(quantization, where=f"{folder / 'config.json'}: quantization_config")


def checked_names(folder: Path, headers: Mapping[str, TensorInfo], packed: PackedFormat) -> list[str]:
    """Names of the packed linears, after the folder was found to hold every tensor once, and no other.

    Raises:
        CheckpointError: it does not.
    """
    names = packed_names(headers)
    if not names:
        raise CheckpointError(f"{folder}: config.json says {packed.pattern}, but no tensor ends in .compressed")
    for name in names:
        if twin := headers.get(f"{name}.weight"):
            raise CheckpointError(f"{twin}: unexpected, {name} is also there packed")
        if packed.values is None and (scale := headers.get(name + SCALE_SUFFIX)):
            raise CheckpointError(f"{scale}: unexpected, config.json does not say that values are int8")
        if name in packed.ignore:
            raise CheckpointError(f"{folder / 'config.json'}: ignore: {name} is said to be dense, but it is packed")
    check_listed(folder, headers)
    return names


def check_listed(folder: Path, headers: Mapping[str, TensorInfo]) -> None:
    """Checks that the folder holds every tensor of its index where it says, if it has one, and no other.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or in another file.
    """
    listed = read_index(folder)
    if listed is not None:
        if missing := sorted(listed.keys() - headers.keys()):
            raise CheckpointError(f"{folder / listed[missing[0]]}: {missing[0]}: listed in {INDEX} but missing")
        if unexpected := sorted(headers.keys() - listed.keys()):
            raise CheckpointError(f"{headers[unexpected[0]]}: unexpected, not listed in {INDEX}")
        for name, file in listed.items():
            if headers[name].file.name != file:
                raise CheckpointError(f"{headers[name]}: {INDEX} says that it is in {file}")


def packed_weights(folder: Path) -> Iterator[tuple[str, Tensor | NMWeight]]:
    """Every weight of a packed checkpoint, one at a time.

    Yields:
        the packed linears under their dense name (``X.weight``), in order, then all other tensors.

    Raises:
        CheckpointError: the folder is no packed checkpoint, or something in it is wrong.
    """
    packed = packed_format(folder)
    if packed is None:
        raise CheckpointError(
            f"{folder / 'config.json'}: quantization_config: expected quant_method {QUANT_METHOD!r}, found another "
            "or none"
        )
    headers = read_headers(folder)
    names = checked_names(folder, headers, packed)
    for name in names:
        weight = read_packed(headers, name, packed, contents=True)
        assert weight is not None
        yield f"{name}.weight", weight
    parts = {name + suffix for name in names for suffix in (*SUFFIXES, SCALE_SUFFIX)}
    for name, info in headers.items():
        if name not in parts:
            yield name, read_tensor(info)
