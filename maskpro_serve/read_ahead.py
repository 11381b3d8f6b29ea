"""Reads files before they are needed, while the disk would be idle."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_PIECE = 1 << 24
"""Bytes read at once. Large, for each read may wait for the interpreter, which an import holds for 5 ms at a time."""


@contextmanager
def reading_ahead(paths: Sequence[Path]) -> Iterator[None]:
    """Brings the beginning of ``paths``, in their order, into the system's page cache while the block runs.

    What the block itself does should be work for the processor; reading ends with it. At most a quarter of the
    machine's memory is read, so that nothing is thrown out again before it is used. A file that cannot be read is left
    to whoever needs it.

    Memory: one buffer of 16 MiB; the page cache is the system's, which takes it back at need.
    """
    enough = threading.Event()
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    thread = threading.Thread(target=_read, args=(paths, limit, enough), name="read ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()


def _read(paths: Sequence[Path], limit: int, enough: threading.Event) -> None:
    buffer = memoryview(bytearray(_PIECE))
    for path in paths:
        if not path.is_file():  # a pipe would never end
            continue
        with suppress(OSError), path.open("rb", buffering=0) as file:
            while not enough.is_set() and (count := file.readinto(buffer[: max(0, limit)])):
                limit -= count
