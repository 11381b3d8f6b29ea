"""Masks made elsewhere, for ``--init``: our mask file, MaskLLM's npz, the zeros of a checkpoint folder.

Whatever the source, the result is strictly N:M, has a mask for every selected layer and for no other, and an error
names the first layer and group that is not so. Pickles are never read.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from maskpro_kernels import NMPattern, read_masks
from maskpro_kernels.packing import check_mask, top_n_mask
from maskpro_learner.errors import LearnerError
from maskpro_learner.initial_masks import InitialMasks
from maskpro_learner.layers import PrunableLayers, select_layers
from maskpro_learner.packed_masks import PackedMasks

SOURCES = "a mask file, MaskLLM's .npz, or a folder with a pruned checkpoint"
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".npy")
_NPY_HEADER = 4096
"""Bytes that the header of an array of bytes never needs."""
_NPZ_SUFFIX = ".mask.npy"


def masks_from_path(
    path: Path,
    model: PreTrainedModel,
    pattern: NMPattern,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> InitialMasks:
    """Reads masks for the selected layers of a model from whatever ``path`` is.

    Args:
        path: :data:`SOURCES`.
        model: the dense model that the masks are for; not changed.
        pattern: the pattern every mask must obey.
        include: globs of module names.
        exclude: globs of module names to leave dense.

    Raises:
        MaskFileError: our own mask file cannot be used.
        LearnerError: any other source cannot be; names the file, the layer, what was expected and found.
    """
    layers = select_layers(model, pattern, include=include, exclude=exclude)
    if path.is_dir():
        masks = _masks_from_zeros(path, layers, pattern)
    elif path.suffix == ".npz":
        masks = _masks_from_npz(path, layers, pattern)
    elif path.suffix in _PICKLES:
        raise LearnerError(f"{path}: expected {SOURCES}; {path.suffix} files can hold code and are never loaded")
    else:
        masks = _masks_from_file(path, layers, pattern)
    return InitialMasks(PackedMasks(masks), layers.dense)


def _shapes(layers: PrunableLayers) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) by parameter name, in forward order."""
    return {f"{name}.weight": (x.out_features, x.in_features) for name, x in layers.linears.items()}


def _check_layers(path: Path, expected: Mapping[str, object], found: Mapping[str, object]) -> None:
    """Raises LearnerError with the first layer where what is there is not what is expected."""
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise LearnerError(
                f"{path}: {name}: expected a mask of shape {expected.get(name)}, found {found.get(name)}: "
                f"is it the mask of another model?"
            )


def _masks_from_file(path: Path, layers: PrunableLayers, pattern: NMPattern) -> dict[str, Tensor]:
    file = read_masks(path)
    if file.pattern != pattern:
        raise LearnerError(f"{path}: expected masks of pattern {pattern}, found {file.pattern}")
    expected = _shapes(layers)
    _check_layers(path, expected, {name: tuple(mask.shape) for name, mask in file.masks.items()})
    return {name: file.masks[name] for name in expected}


def _masks_from_npz(path: Path, layers: PrunableLayers, pattern: NMPattern) -> dict[str, Tensor]:
    """MaskLLM's ``mask_compressed.npz``: ``<weight>.mask`` is ``np.packbits`` of the flattened mask, MSB first.

    It holds no shapes: those are the model's. No array is read before its declared size is the expected one, so a
    small file cannot ask for much memory.
    """
    shapes = _shapes(layers)
    masks = {}
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            found = {name.removesuffix(_NPZ_SUFFIX): None for name in members if name.endswith(_NPZ_SUFFIX)}
            if others := sorted(members.keys() - {f"{name}{_NPZ_SUFFIX}" for name in found}):
                raise LearnerError(f"{path}: expected keys <weight>.mask, found {others[0].removesuffix('.npy')!r}")
            for name in sorted(shapes.keys() | found.keys()):
                if (name in shapes) != (name in found):
                    what = "expected a mask, found none" if name in shapes else "a mask for no selected layer"
                    raise LearnerError(f"{path}: {name}: {what}: is it the mask of another model?")
            for name, (rows, columns) in shapes.items():
                count = (rows * columns + 7) // 8
                info = members[f"{name}{_NPZ_SUFFIX}"]
                if info.file_size > count + _NPY_HEADER:
                    raise LearnerError(
                        f"{path}: {name}: expected {count} bytes for shape {(rows, columns)}, found {info.file_size}"
                    )
                with archive.open(info) as member:
                    packed = _read_bytes_array(member, count, f"{path}: {name}")
                bits = torch.from_numpy(np.unpackbits(packed))
                if bool(bits[rows * columns :].any()):
                    raise LearnerError(f"{path}: {name}: a bit after the last weight is set")
                masks[name] = bits[: rows * columns].bool().reshape(rows, columns)
                _check_strict(masks[name], pattern, f"{path}: {name}")
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise LearnerError(f"{path}: not a readable npz file: {error}") from error
    return masks


def _read_bytes_array(member: IO[bytes], count: int, where: str) -> np.ndarray:
    """A uint8 (count,) array from its .npy bytes; nothing of another type or size is read."""
    try:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(member)
    except ValueError as error:
        raise LearnerError(f"{where}: not an array: {error}") from error
    if dtype != np.uint8 or shape != (count,):
        raise LearnerError(f"{where}: expected uint8 ({count},) from np.packbits, found {dtype} {shape}")
    content = member.read(count)
    if len(content) != count or member.read(1):  # reading past the end also makes zipfile compare the checksum
        raise LearnerError(f"{where}: expected {count} bytes, found {'fewer' if len(content) < count else 'more'}")
    return np.frombuffer(content, dtype=np.uint8)


def _check_strict(mask: Tensor, pattern: NMPattern, where: str) -> None:
    try:
        check_mask(mask, pattern)
    except ValueError as error:
        raise LearnerError(f"{where}: {error}") from error


def _masks_from_zeros(folder: Path, layers: PrunableLayers, pattern: NMPattern) -> dict[str, Tensor]:
    """What a pruned checkpoint keeps: its nonzeros.

    A group with fewer than n of them is filled up with the weights that are the largest in the model that the masks
    are for; ties, as where that model is the pruned one itself, go to the lower column.
    """
    files = _tensor_files(folder)
    expected = _shapes(layers)
    masks = {}
    for name, linear in layers.linears.items():
        parameter = f"{name}.weight"
        where = f"{folder}: {parameter}"
        if parameter not in files:
            raise LearnerError(f"{where}: expected a tensor of shape {expected[parameter]}, found none")
        weight = _read_tensor(files[parameter], parameter, expected[parameter], where)
        kept = weight != 0
        counts = kept.reshape(len(kept), -1, pattern.m).sum(-1)
        if bool((counts > pattern.n).any()):
            row, group = (int(i) for i in (counts > pattern.n).nonzero()[0])
            raise LearnerError(
                f"{where}: row {row}, group {group} (columns {group * pattern.m} to {(group + 1) * pattern.m - 1}) has "
                f"{int(counts[row, group])} nonzeros, expected at most {pattern.n} of {pattern.m}; "
                f"{int((counts > pattern.n).sum())} of {counts.numel()} groups have too many"
            )
        size = linear.weight.detach().abs().float().cpu().nan_to_num(nan=0.0)  # infinite becomes the largest finite
        masks[parameter] = top_n_mask(size.masked_fill_(kept, torch.inf), pattern)
    return masks


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Where every tensor of a checkpoint folder with safetensors is."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LearnerError(f"{folder}: expected a checkpoint folder, found no readable config.json: {error}") from error
    if isinstance(config, dict) and config.get("quantization_config"):
        raise LearnerError(f"{folder}: expected dense tensors with zeros, found a quantization_config in config.json")
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError) as error:
            raise LearnerError(f"{path}: not a readable safetensors file: {error}") from error
    if not files:
        raise LearnerError(f"{folder}: expected *.safetensors with the pruned weights, found none")
    return files


def _read_tensor(path: Path, name: str, shape: tuple[int, int], where: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            found = tuple(file.get_slice(name).get_shape())
            if found != shape:
                raise LearnerError(f"{where}: expected a tensor of shape {shape}, found {found}")
            tensor: Tensor = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise LearnerError(f"{path}: not a readable safetensors file: {error}") from error
    return tensor
