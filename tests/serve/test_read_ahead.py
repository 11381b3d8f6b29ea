"""Reading ahead fills the page cache, no further than it may, and ends with its block whatever the files are."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from maskpro_serve.read_ahead import reading_ahead

MIB = 1 << 20


def is_cached(path: Path, place: int) -> bool:
    """Whether the page at ``place`` is in the page cache. Looking does not change it, as a read would."""
    page = mmap.PAGESIZE
    with path.open("r+b") as file, mmap.mmap(file.fileno(), page, offset=place // page * page) as mapped:
        found = (ctypes.c_ubyte * 1)()
        address = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(ctypes.byref(address), ctypes.c_size_t(page), found)
        del address  # or the mapping cannot be closed
    assert not failed, os.strerror(ctypes.get_errno())
    return bool(found[0] & 1)


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A file of 96 MiB that is on the disk only."""
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        for _ in range(96):
            file.write(os.urandom(MIB))
        file.flush()
        os.fsync(file.fileno())
    for _ in range(50):  # pages that another processor has just touched stay for a while
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if not any(is_cached(path, place) for place in (0, 80 * MIB, 96 * MIB - 1)):
            return path
        time.sleep(0.1)
    pytest.skip("this file system keeps a file in memory whatever it is told")


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def have_memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    pages = {"SC_PHYS_PAGES": size // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)


def test_what_is_read_ahead_is_in_memory(cold: Path) -> None:
    pipe = cold.parent / "pipe.safetensors"
    os.mkfifo(pipe)
    with reading_ahead([cold.parent / "absent.safetensors", cold.parent, pipe, cold]):
        until(lambda: is_cached(cold, 0) and is_cached(cold, 96 * MIB - 1))
    assert "read ahead" not in {thread.name for thread in threading.enumerate()}


def test_no_more_is_read_than_a_quarter_of_memory(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have_memory(monkeypatch, 96 * MIB)
    with reading_ahead([cold]):
        until(lambda: is_cached(cold, 24 * MIB - 1))
        until(lambda: "read ahead" not in {thread.name for thread in threading.enumerate()})
    assert not is_cached(cold, 80 * MIB)  # the system itself may have read some MiB more


def test_reading_ends_with_the_block(cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    have_memory(monkeypatch, 1 << 60)  # else the limit would end it
    with reading_ahead([cold] * 100_000):
        until(lambda: is_cached(cold, 0))
    assert "read ahead" not in {thread.name for thread in threading.enumerate()}
