"""A Hugging Face model folder: its config.json, its index, and the tensors of its safetensors files.

Every way one of them can be wrong is one :class:`CheckpointError`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maskpro_kernels.files import SAFETENSORS_DTYPES

INDEX = "model.safetensors.index.json"
BLOCK = 1 << 23
"""Elements that :func:`blocks` gives at once: work on them stays far below a gigabyte."""
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; names the file, the tensor, what was expected and found."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's place and header entry, before any of its data is read."""

    file: Path
    name: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data; 0 for a dtype that torch does not have."""
        return 0 if self.dtype is None else math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """``safe_open`` on the CPU, its errors turned into ours.

    Raises:
        CheckpointError: the file is missing, truncated or no safetensors file.
    """
    try:
        if not path.is_file():  # to open a pipe would never end
            raise CheckpointError(f"{path}: no such file")
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``.

    Raises:
        CheckpointError: the folder or the file is missing, or it is not a JSON object.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(config).__name__}")
    return config


def read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name to file name as the folder's index has it, or None where there is no index.

    Raises:
        CheckpointError: the index is unreadable or names a file outside the folder.
    """
    index = folder / INDEX
    if not index.is_file():
        return None
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a readable index: {error!r}") from error
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name:
            raise CheckpointError(f"{index}: weight_map: expected a file name, found {name!r}")
    return weight_map


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files: those the index names, else ``model.safetensors``.

    Raises:
        CheckpointError: there are none, or the index is wrong.
    """
    weight_map = read_index(folder)
    if weight_map is not None:
        return [folder / name for name in sorted(set(weight_map.values()))]
    single = folder / "model.safetensors"
    if not single.is_file():
        raise CheckpointError(f"{folder}: neither model.safetensors nor {INDEX} is there")
    return [single]


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Name, place, dtype and shape of every tensor, from the files' headers alone.

    Raises:
        CheckpointError: a file is missing or truncated, or two files hold the same tensor.
    """
    infos: dict[str, TensorInfo] = {}
    for path in weight_files(folder):
        with open_safetensors(path) as file:
            for name in file.offset_keys():
                if not name.isprintable():
                    raise CheckpointError(f"{path}: a tensor's name has characters that cannot be printed: {name!r}")
                view = file.get_slice(name)
                info = TensorInfo(path, name, _DTYPES.get(view.get_dtype()), tuple(view.get_shape()))
                if name in infos:
                    raise CheckpointError(f"{info}: also in {infos[name].file}")
                infos[name] = info
    return infos


def read_tensor(info: TensorInfo) -> Tensor:
    """One tensor, whole.

    Raises:
        CheckpointError: the file is missing, truncated or no safetensors file.
    """
    with open_safetensors(info.file) as file:
        tensor: Tensor = file.get_tensor(info.name)
    return tensor


def blocks(info: TensorInfo) -> Iterator[range]:
    """The rows of a tensor in parts: at most :data:`BLOCK` elements, or one row. One row, if it has no dimension."""
    count = info.shape[0] if info.shape else 1
    rows = max(1, BLOCK // max(1, math.prod(info.shape[1:])))
    for first in range(0, count, rows):
        yield range(first, min(first + rows, count))


def read_block(info: TensorInfo, rows: range) -> Tensor:
    """Some rows of a tensor that has dimensions, else all of it: a view of the mapped file, which is read when touched.

    Raises:
        CheckpointError: the file is missing, truncated or no safetensors file.
    """
    with open_safetensors(info.file) as file:
        block: Tensor = file.get_slice(info.name)[rows.start : rows.stop] if info.shape else file.get_tensor(info.name)
    return block
