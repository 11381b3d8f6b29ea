"""Writing files so that a reader sees the old one or the whole new one, never a part; reading safetensors whole."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFETENSORS_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float32: "F32", torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0", torch.complex64: "C64",
}  # fmt: skip
"""The names that a safetensors header has for them."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file of a temporary name beside ``path``: synced and renamed to it at the end, removed if anything fails.

    Raises:
        OSError: the disk is full or the folder cannot be written; ``path`` is as it was.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_unfinished(path: Path) -> None:
    """Removes what processes that were killed in :func:`atomic_file` have left of ``path``; none may be writing it."""
    for unfinished in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        unfinished.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """SHA-256 of one file, read in pieces.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a whole file through :func:`atomic_file`.

    Raises:
        OSError: as there.
    """
    with atomic_file(path) as file:
        file.write(content)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written, before there is any data of it."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


class PutRows(Protocol):
    """Writes a part of a tensor to its place in the file: what :func:`safetensors_stream` yields. Thread-safe."""

    def __call__(self, name: str, rows: Tensor, first: int = 0) -> None: ...


@contextmanager
def safetensors_stream(path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> Iterator[PutRows]:
    """Writes a safetensors file through :func:`atomic_file` in pieces, in any order; equal content is an equal file.

    Names, dtypes and shapes are known before, so the header comes first and every piece has its place: no more of the
    file is in memory than the caller holds.

    Args:
        path: the file.
        specs: every tensor of the file.
        metadata: text to text.

    Yields:
        a function that writes ``rows`` (along the first dimension, from row ``first`` on) of tensor ``name``.

    Raises:
        ValueError: a dtype that safetensors has no name for.
        OSError: as :func:`atomic_file`.
    """
    # Widest first, so that all are aligned; the metadata in order, where the library's own writer has them in any.
    ordered = sorted(specs, key=lambda spec: (-spec.dtype.itemsize, spec.name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for spec in ordered:
        if spec.dtype not in SAFETENSORS_DTYPES:
            known = ", ".join(map(str, SAFETENSORS_DTYPES))
            raise ValueError(f"{path}: {spec.name}: expected one of {known}, found {spec.dtype}")
        begin, end = end, end + spec.nbytes
        entry = {"dtype": SAFETENSORS_DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
        header[spec.name] = entry
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    places = {spec.name: (spec, 8 + len(text) + header[spec.name]["data_offsets"][0]) for spec in ordered}
    written: list[int] = []  # to append is atomic among threads, to add is not
    with atomic_file(path) as file:
        _write_at(file.fileno(), len(text).to_bytes(8, "little") + text, 0)

        def put(name: str, rows: Tensor, first: int = 0) -> None:
            spec, place = places[name]
            assert rows.dtype == spec.dtype
            assert tuple(rows.shape[1:]) == spec.shape[1:]
            content = rows.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            _write_at(file.fileno(), content, place + first * math.prod(spec.shape[1:]) * spec.dtype.itemsize)
            written.append(rows.nbytes)

        yield put
        assert sum(written) == end, f"{path}: {sum(written)} bytes of {end} were written"


def _write_at(descriptor: int, content: bytes | memoryview, place: int) -> None:
    """Writes all of it, and has Linux begin to bring it to the disk, so that little is left when the file is synced.

    That is what its page cache does with advice not to need a page that is not on the disk yet.
    """
    begin, view = place, memoryview(content)
    while view:
        count = os.pwrite(descriptor, view, place)
        place, view = place + count, view[count:]
    if place > begin:  # none would mean all of the file
        with suppress(OSError):  # only advice
            os.posix_fadvise(descriptor, begin, place - begin, os.POSIX_FADV_DONTNEED)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file as :func:`safetensors_stream` does, from tensors that are all in memory.

    Raises:
        ValueError, OSError: as there.

    Memory: one copy of a tensor that is not contiguous, or not on the CPU.
    """
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with safetensors_stream(path, specs, metadata) as put:
        for name, tensor in tensors.items():
            put(name, tensor)


def read_safetensors(path: Path, what: str, error_type: type[ValueError]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and all tensors of a safetensors file.

    Args:
        path: the file.
        what: it should be, for the message where there is none: ``mask file``.
        error_type: to raise.

    Raises:
        error_type: the file is missing or unreadable; names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no dict)
            return dict(sorted((file.metadata() or {}).items())), tensors  # it has no order: each reading has another
    except FileNotFoundError as error:
        raise error_type(f"{path}: no such {what}") from error
    except (OSError, SafetensorError) as error:
        raise error_type(f"{path}: not a readable safetensors file: {error}") from error


@contextmanager
def temporary_sibling(target: Path) -> Iterator[Path]:
    """A folder to fill beside ``target``: synced and renamed to it at the end, removed if anything fails.

    Raises:
        OSError: the disk is full, the parent cannot be written, or ``target`` exists and is not empty.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o777 & ~_umask())
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(folder)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Makes a rename inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    """The process's umask, which os offers no way to read but setting it."""
    current = os.umask(0)
    os.umask(current)
    return current
