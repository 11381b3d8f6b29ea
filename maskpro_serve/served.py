"""Checks a local checkpoint of any format that we serve sparse, before a server is started on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from maskpro_kernels import NMWeight
from maskpro_kernels.model_folder import CheckpointError, TensorInfo, read_config, read_headers, read_tensor
from maskpro_kernels.packed_checkpoint import (
    SCALE_SUFFIX,
    PackedFormat,
    check_listed,
    check_parts,
    packed_names,
    part,
)
from maskpro_kernels.packing import WEIGHT_DTYPES, check_bitmask
from maskpro_kernels.support import select_backend
from maskpro_serve.checkpoint import check_checkpoint
from maskpro_serve.legacy import LegacyFormat, claims, find_quantization
from maskpro_serve.scheme import LinearScheme, scheme_of_packed

_HEAD = "lm_head"


def check_served(folder: Path, *, contents: bool) -> PackedFormat | LegacyFormat | None:
    """Checks a local checkpoint before a server is started on it.

    Args:
        folder: a Hugging Face folder; of one that we do not serve sparse only config.json is read.
        contents: also check every bitmask and scale (1/8 byte per weight).

    Returns:
        How its linears are stored, or None for a checkpoint of another kind.

    Raises:
        CheckpointError: the first thing that is wrong, in one sentence.
    """
    legacy = legacy_format(folder)
    if legacy is None:
        return check_checkpoint(folder, contents=contents)
    headers = read_headers(folder)
    for name, scheme in _stored(folder, headers, legacy):
        _check_layer(headers, name, scheme, contents=contents)
    check_listed(folder, headers)
    return legacy


def stored_schemes(stored: PackedFormat | LegacyFormat) -> list[LinearScheme]:
    """The ways in which a checkpoint's sparse or quantized linears are stored, by its configuration."""
    if isinstance(stored, PackedFormat):
        return [scheme for scheme in [scheme_of_packed(stored, "")] if scheme is not None]
    return [scheme for _, scheme in stored.groups] or [LinearScheme(stored.compressed)]


def check_kernels(stored: PackedFormat | LegacyFormat) -> None:
    """Checks that this machine's CPU has a kernel for a checkpoint's linears, as MASKPRO_KERNEL asks.

    Raises:
        UnsupportedKernelError: it has none; the message says why.
        ValueError: MASKPRO_KERNEL names no backend.
    """
    for scheme in stored_schemes(stored):
        kept = torch.int8 if scheme.values == torch.int8 else torch.bfloat16  # fp8 numbers become bfloat16
        select_backend(stored.pattern, torch.float32, kept, "cpu", may_round=scheme.inputs == kept)


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The one dtype of a local checkpoint's packed values, or where none is packed of its matrices.

    8-bit values do not count. None where there are several, or none.

    Raises:
        CheckpointError: a file is missing or truncated.
    """
    floats = {name: info for name, info in read_headers(folder).items() if info.dtype in WEIGHT_DTYPES}
    packed = {info.dtype for name, info in floats.items() if name.endswith(".compressed")}
    dense = {info.dtype for name, info in floats.items() if name.endswith(".weight") and len(info.shape) == 2}
    dtypes = packed or dense
    return dtypes.pop() if len(dtypes) == 1 else None


def legacy_format(folder: Path) -> LegacyFormat | None:
    """The folder's format, if compressed-tensors wrote it and it is ours to serve or to refuse.

    Raises:
        CheckpointError: config.json is unreadable, or speaks of 2:4 in a way that nobody can serve.
    """
    found = find_quantization(read_config(folder))
    if found is None or not isinstance(found[1], dict) or not claims(found[1]):
        return None
    return LegacyFormat.from_dict(found[1], f"{folder / 'config.json'}: {found[0]}")


def _stored(
    folder: Path, headers: Mapping[str, TensorInfo], legacy: LegacyFormat
) -> Iterator[tuple[str, LinearScheme]]:
    """The layers that are packed or quantized, as their tensors tell, after config.json was found to say the same."""
    packed = packed_names(headers)
    scaled = {name.removesuffix(SCALE_SUFFIX) for name in headers if name.endswith(SCALE_SUFFIX)}
    if legacy.compressed and not packed:
        raise CheckpointError(f"{folder}: config.json says sparse-24-bitmask, but no tensor ends in .compressed")
    for name in sorted({*packed, *scaled}):
        if name.rpartition(".")[2] == _HEAD:
            raise CheckpointError(f"{folder}: {name}: an output head that is packed or quantized cannot be served")
        if ".experts." in name:
            raise CheckpointError(f"{folder}: {name}: experts that are packed or quantized cannot be served")
        scheme = legacy.scheme(name) or LinearScheme(False)
        found, said = (name in packed, name in scaled), (scheme.compressed, scheme.values is not None)
        if found != said:
            raise CheckpointError(
                f"{folder}: {name}: expected a {_describe(*said)}, as config.json says, found a {_describe(*found)}"
            )
        if name in packed and (twin := headers.get(f"{name}.weight")):
            raise CheckpointError(f"{twin}: unexpected, {name} is also there packed")
        yield name, scheme
    for name in legacy.targets:  # those that are names of layers, not classes or patterns
        if "." in name and not name.startswith("re:") and name not in packed and f"{name}.weight" not in headers:
            raise CheckpointError(f"{folder / 'config.json'}: targets: {name}: no such layer in the checkpoint")


def _describe(packed: bool, scaled: bool) -> str:
    return f"{'packed' if packed else 'dense'} weight {'with' if scaled else 'without'} a weight_scale"


def _check_layer(headers: Mapping[str, TensorInfo], name: str, scheme: LinearScheme, *, contents: bool) -> None:
    if scheme.compressed:
        values, bitmask, shape = check_parts(headers, name, LegacyFormat.pattern)
    else:
        values = part(headers, name, ".weight")
        if len(values.shape) != 2 or not LegacyFormat.pattern.divides(values.shape[1]):
            raise CheckpointError(f"{values}: expected two dimensions and whole groups of 4, found {values.shape}")
        bitmask, shape = None, (values.shape[0], values.shape[1])
    if scheme.values is None and values.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(f"{values}: expected a 16 or 32 bit float, found {values.dtype}")
    if scheme.values is not None and values.dtype != scheme.values:
        raise CheckpointError(f"{values}: expected {scheme.values}, as config.json says, found {values.dtype}")
    scales = {}
    if scheme.values is not None:
        expected = ((shape[0], 1),) if scheme.scale == "channel" else ((1,), ())
        scales[part(headers, name, SCALE_SUFFIX)] = expected
    if scheme.input_scale:
        scales[part(headers, name, ".input_scale")] = ((1,), ())
    for info, expected in scales.items():
        if info.shape not in expected or info.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{info}: expected a 16 or 32 bit float {expected[0]}, found {info.dtype} {info.shape}"
            )
        if contents and not torch.isfinite(read_tensor(info)).all():
            raise CheckpointError(f"{info}: expected finite scales, found inf or NaN")
    if contents and bitmask is not None:
        unread = torch.empty(values.shape, dtype=torch.bfloat16, device="meta")
        try:
            check_bitmask(NMWeight(unread, read_tensor(bitmask), shape, LegacyFormat.pattern))
        except ValueError as error:
            raise CheckpointError(f"{bitmask}: {error}") from error
