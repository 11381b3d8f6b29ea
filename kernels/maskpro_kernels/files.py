"""Writing files so that a reader sees the old one or the whole new one, never a part."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
