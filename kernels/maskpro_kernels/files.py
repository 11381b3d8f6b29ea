"""Writing files so that a reader sees the old one or the whole new one, never a part; reading safetensors whole."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip


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


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file through :func:`atomic_file`; equal content is an equal file.

    The library's own writers copy all tensors first and put the metadata in another order every time.

    Raises:
        ValueError: a dtype that none of this project's files holds.
        OSError: as there.

    Memory: one copy of a tensor that is not contiguous, or not on the CPU.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so that all are aligned
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{path}: {name}: expected one of {', '.join(map(str, _DTYPES))}, found {tensor.dtype}")
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


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
            return file.metadata() or {}, tensors
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
