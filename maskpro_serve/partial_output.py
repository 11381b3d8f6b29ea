"""A folder in the making that survives a kill: the next run with the same inputs goes on where the last one was."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskpro_kernels.files import sync_folder, write_atomically

_STATE = "state.json"
_CONTENT = "content"
_LOCK = "lock"


@dataclass
class PartialOutput:
    """What there is of a folder so far.

    Attributes:
        folder: to be filled. Files appear in it whole (:func:`maskpro_kernels.files.atomic_file`).
        state: what an earlier run of the same inputs remembered, or None.
    """

    folder: Path
    state: dict[str, Any] | None
    _inputs: Mapping[str, Any]

    def remember(self, state: Mapping[str, Any]) -> None:
        """Keeps a JSON document for the next run."""
        self.state = dict(state)
        document = {"inputs": self._inputs, "state": self.state}
        write_atomically(self.folder.parent / _STATE, json.dumps(document).encode())


def file_identity(path: Path) -> list[Any]:
    """Name, size and time of a file: another of these is another input.

    Raises:
        OSError: there is no such file.
    """
    found = path.stat()
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]


@contextmanager
def partial_output(target: Path, inputs: Mapping[str, Any]) -> Iterator[PartialOutput]:
    """A folder beside ``target`` that becomes it at the end.

    It stays where the process is killed, interrupted or out of disk, and is taken up again by a run with equal
    ``inputs``; otherwise, and when the inputs turn out to be wrong (a ValueError), it is removed.

    Args:
        target: the folder to make; must not exist.
        inputs: everything that the content depends on, as JSON.

    Raises:
        FileExistsError: ``target`` exists, or another process is making it.
        OSError: the parent cannot be written.
    """
    if target.exists():
        raise FileExistsError(f"{target}: already exists; remove it or choose another --output")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.partial"
    work.mkdir(exist_ok=True)
    # A file, open for writing: NFS emulates flock by locks that want both.
    descriptor = os.open(work / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"{work}: another process is writing {target}") from error
        output = _take_up(work, json.loads(json.dumps(inputs)))
        try:
            yield output
        except ValueError:
            shutil.rmtree(work, ignore_errors=True)
            raise
        sync_folder(output.folder)
        output.folder.rename(target)
        sync_folder(target.parent)
        shutil.rmtree(work, ignore_errors=True)
    finally:
        os.close(descriptor)


def _take_up(work: Path, inputs: Mapping[str, Any]) -> PartialOutput:
    try:
        document = json.loads((work / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        document = None
    folder = work / _CONTENT
    if not isinstance(document, dict) or document.get("inputs") != inputs:
        document = None
        for path in work.iterdir():
            if path.name != _LOCK:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(exist_ok=True)
    for unfinished in (*folder.glob(".*.tmp"), *work.glob(".*.tmp")):
        unfinished.unlink()
    return PartialOutput(folder, document and document["state"], inputs)
