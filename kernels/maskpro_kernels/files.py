"""Writing files so that a reader sees the old one or the whole new one, never a part; reading safetensors whole."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


def write_atomically(path: Path, content: bytes) -> None:
    """Writes to a temporary name beside ``path``, syncs, and renames it into place.

    Raises:
        OSError: the disk is full or the folder cannot be written; ``path`` is as it was.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """:func:`write_atomically` of a safetensors file; equal content is an equal file.

    safetensors writes its metadata in another order every time, so it is put in order here.

    Raises:
        OSError: as write_atomically.
    """
    content = save(dict(tensors), dict(metadata))
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    write_atomically(path, len(text).to_bytes(8, "little") + text + content[8 + size :])


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
