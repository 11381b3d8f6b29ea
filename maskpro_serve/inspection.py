"""What a model folder holds, from its headers: patterns, bytes, and which kernel would run it here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maskpro_kernels import NMPattern
from maskpro_kernels.model_folder import CheckpointError, TensorInfo, open_safetensors, read_headers
from maskpro_kernels.packed_checkpoint import (
    SCALE_SUFFIX,
    SUFFIXES,
    checked_names,
    packed_format,
    packed_names,
    read_packed,
)
from maskpro_kernels.support import select_backend
from maskpro_serve.dense_model import open_dense_model
from maskpro_serve.scheme import LinearScheme, scheme_of_packed
from maskpro_serve.served import check_served, legacy_format, stored_schemes
from maskpro_serve.zero_patterns import count_zeros

SAMPLE_ROWS = 64
"""Rows of a dense weight that are read to tell whether it has zeros in a pattern."""


@dataclass(frozen=True)
class Layer:
    """One linear.

    Attributes:
        name: in the checkpoint, without suffix.
        pattern: of a packed one; None for a dense one.
        shape: (out_features, in_features) of the dense weight.
        dtype: of the values.
        nbytes: that it takes.
        dense_nbytes: that it would take dense; in 16 bits for values of 8.
        backends: torch device type to the kernel that would run it here, or the reason why none would.
        sampled: of a dense one, the tightest pattern that the zeros of its first rows satisfy.
    """

    name: str
    pattern: str | None
    shape: tuple[int, int]
    dtype: str
    nbytes: int
    dense_nbytes: int
    backends: Mapping[str, str]
    sampled: str | None = None


@dataclass(frozen=True)
class Inspection:
    """A model folder.

    Attributes:
        folder: where it is.
        kind: ``packed``, ``dense``, or ``sparse-24-bitmask``, the compressed-tensors format of 2:4.
        pattern: of the packed linears.
        layers: the linears.
        other_nbytes: of all other tensors: embeddings, norms, the output head.
        provenance: what the folder says about its mask.
        may_round: what a server may round to 8 bits beside stored values: ``activations`` of packed linears, ``head``.
    """

    folder: str
    kind: str
    pattern: str | None
    layers: tuple[Layer, ...]
    other_nbytes: int
    provenance: Mapping[str, Any]
    may_round: tuple[str, ...] = ()


def inspect(folder: Path) -> Inspection:
    """Reads the headers of a folder, packed or dense; of dense weights also a sample of rows, of packed ones no values.

    Of a dense folder of compressed-tensors' 8-bit values, the linears are those that have a scale.

    Raises:
        CheckpointError: it is neither, or something in it is wrong.
    """
    packed = packed_format(folder)
    headers = read_headers(folder)
    if packed is not None:
        for name in (names := checked_names(folder, headers, packed)):
            read_packed(headers, name, packed, contents=False)
        layers = tuple(_packed_layer(headers, name, packed.pattern, scheme_of_packed(packed, name)) for name in names)
        ignored = frozenset(packed.ignore)
        dense = [info for name, info in headers.items() if name.removesuffix(".weight") in ignored]
        layers += tuple(_dense_layer(info) for info in dense if len(info.shape) == 2 and info.name != "lm_head.weight")
        may_round = tuple(name for name in ("activations", "head") if getattr(packed, name) is not None)
        return _inspection(folder, "packed", packed.pattern, layers, headers, packed.provenance or {}, may_round)
    if (legacy := legacy_format(folder)) is not None:
        check_served(folder, contents=False)
        may_round = ("activations",) if any(scheme.inputs for scheme in stored_schemes(legacy)) else ()
        if legacy.compressed:
            layers = tuple(
                _packed_layer(headers, name, legacy.pattern, legacy.scheme(name)) for name in packed_names(headers)
            )
            return _inspection(folder, "sparse-24-bitmask", legacy.pattern, layers, headers, {}, may_round)
        if legacy.groups:
            scaled = (name.removesuffix(SCALE_SUFFIX) for name in headers if name.endswith(SCALE_SUFFIX))
            layers = tuple(_dense_layer(headers[f"{name}.weight"]) for name in scaled)
            return _inspection(folder, "dense", None, layers, headers, {}, may_round)
    model = open_dense_model(folder)
    layers = tuple(_dense_layer(model.headers[name]) for name in model.linears)
    return _inspection(folder, "dense", None, layers, headers, {})


def _inspection(
    folder: Path, kind: str, pattern: NMPattern | None, layers: tuple[Layer, ...], headers: Mapping[str, TensorInfo],
    provenance: Mapping[str, Any], may_round: tuple[str, ...] = (),
) -> Inspection:  # fmt: skip
    other = sum(info.nbytes for info in headers.values()) - sum(layer.nbytes for layer in layers)
    named = None if pattern is None else str(pattern)
    return Inspection(str(folder), kind, named, layers, other, provenance, may_round)


def _packed_layer(
    headers: Mapping[str, TensorInfo], name: str, pattern: NMPattern, scheme: LinearScheme | None
) -> Layer:
    parts = [headers[key] for suffix in (*SUFFIXES, SCALE_SUFFIX) if (key := name + suffix) in headers]
    values = headers.get(f"{name}.compressed")
    if values is None or len(values.shape) != 2 or values.dtype is None or values.shape[1] % pattern.n:
        raise CheckpointError(f"{parts[0].file.parent}: {name}.compressed: expected two dimensions of {pattern} values")
    shape = values.shape[0], values.shape[1] // pattern.n * pattern.m
    dense = shape[0] * shape[1] * max(2, values.dtype.itemsize)
    return Layer(
        name, str(pattern), shape, _name(values.dtype), sum(info.nbytes for info in parts), dense,
        backends(pattern, values.dtype, may_round=scheme is not None and scheme.inputs == torch.int8),
    )  # fmt: skip


def _dense_layer(info: TensorInfo) -> Layer:
    rows, columns = info.shape
    with open_safetensors(info.file) as file:
        rows_read = file.get_slice(info.name)[:SAMPLE_ROWS]
    zeros = count_zeros(columns, [rows_read.float() if info.dtype == torch.float8_e4m3fn else rows_read])
    assert info.dtype is not None
    return Layer(
        info.name.removesuffix(".weight"), None, (rows, columns), _name(info.dtype), info.nbytes, info.nbytes,
        {}, None if zeros.tightest is None else str(zeros.tightest),
    )  # fmt: skip


def backends(pattern: NMPattern, values: torch.dtype, *, may_round: bool = False) -> dict[str, str]:
    """By device type of this machine, the kernel that would run a packed weight, or why none would.

    With float32 activations on the CPU and bfloat16 ones elsewhere.
    """
    devices = {"cpu": torch.float32}
    if torch.cuda.is_available():
        devices["cuda"] = torch.bfloat16
    found = {}
    for device, activation in devices.items():
        widened = device == "cpu" and values == torch.float8_e4m3fn  # when it is loaded
        kept = torch.bfloat16 if widened else values
        try:
            found[device] = select_backend(pattern, activation, kept, device, may_round=may_round).name
        except ValueError as error:
            found[device] = f"none: {error}"
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
