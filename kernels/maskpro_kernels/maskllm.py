"""MaskLLM's ``mask_compressed.npz``: ``<weight>.mask`` is ``np.packbits`` of the flattened mask, MSB first."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from threading import Lock
from typing import IO

import numpy as np
import torch
from torch import Tensor

from maskpro_kernels.masks import MaskFileError

_KEPT = 4  # as many as threads that each read rows of another weight
_NPY_HEADER = 4096
"""Bytes that the header of an array of bytes never needs."""
_SUFFIX = ".mask.npy"


class MaskLLMArchive:
    """The masks of one archive; the last four that were read stay in memory, at one bit a weight. Thread-safe.

    No array is read before its declared size is the expected one, so a small file cannot ask for much memory.

    Attributes:
        path: the file.
        names: the weights that it has masks of.

    Raises:
        MaskFileError: it is no npz file, or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._latest: dict[str, np.ndarray] = {}
        self._lock = Lock()
        with self._open() as archive:
            self._members = {info.filename: info for info in archive.infolist()}
        self.names = {name.removesuffix(_SUFFIX) for name in self._members if name.endswith(_SUFFIX)}
        if others := sorted(self._members.keys() - {f"{name}{_SUFFIX}" for name in self.names}):
            raise MaskFileError(f"{path}: expected keys <weight>.mask, found {others[0].removesuffix('.npy')!r}")

    def check_size(self, name: str, shape: tuple[int, ...]) -> None:
        """Compares the declared size with that of a mask of this shape.

        Raises:
            MaskFileError: it is larger; a smaller one is found when it is read.
        """
        expected, found = _bytes(shape), self._members[f"{name}{_SUFFIX}"].file_size
        if found > expected + _NPY_HEADER:
            raise MaskFileError(f"{self.path}: {name}: expected {expected} bytes for shape {shape}, found {found}")

    def read(self, name: str, shape: tuple[int, ...], first: int, rows: int) -> Tensor:
        """Some rows of a mask, not checked for strictness: boolean (rows, in_features).

        Raises:
            MaskFileError: the array is not one of that shape's bits.
        """
        with self._lock:  # whoever else wants this mask meanwhile waits for it
            if (packed := self._latest.get(name)) is None:
                while len(self._latest) >= _KEPT:
                    del self._latest[next(iter(self._latest))]
                packed = self._latest[name] = self._packed(name, shape)
        begin, end = first * shape[1], (first + rows) * shape[1]
        bits = np.unpackbits(packed[begin // 8 : (end + 7) // 8])[begin % 8 :][: end - begin]
        return torch.from_numpy(bits).view(torch.bool).reshape(rows, shape[1])

    def _packed(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        where = f"{self.path}: {name}"
        with self._open() as archive, archive.open(f"{name}{_SUFFIX}") as member:
            packed = _read_array(member, _bytes(shape), where)
        if prod(shape) % 8 and int(packed[-1]) & (0xFF >> prod(shape) % 8):
            raise MaskFileError(f"{where}: a bit after the last weight is set")
        return packed

    @contextmanager
    def _open(self) -> Iterator[zipfile.ZipFile]:
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield archive
        except FileNotFoundError as error:
            raise MaskFileError(f"{self.path}: no such mask file") from error
        except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
            raise MaskFileError(f"{self.path}: not a readable npz file: {error}") from error


def _bytes(shape: tuple[int, ...]) -> int:
    return (prod(shape) + 7) // 8


def _read_array(member: IO[bytes], count: int, where: str) -> np.ndarray:
    """A uint8 (count,) array from its .npy bytes; nothing of another type or size is read."""
    try:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(member)
    except ValueError as error:
        raise MaskFileError(f"{where}: not an array: {error}") from error
    if dtype != np.uint8 or shape != (count,):
        raise MaskFileError(f"{where}: expected uint8 ({count},) from np.packbits, found {dtype} {shape}")
    content = member.read(count)
    if len(content) != count or member.read(1):  # reading past the end also makes zipfile compare the checksum
        raise MaskFileError(f"{where}: expected {count} bytes, found {'fewer' if len(content) < count else 'more'}")
    return np.frombuffer(content, dtype=np.uint8)
