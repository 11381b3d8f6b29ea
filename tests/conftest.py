"""Fixtures shared by all tests."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants
from hypothesis import settings

# Before the first import of torch: beside another test process, threads that spin while they wait only take its cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# How long an example takes says more of what else the machine does than of the code.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

REPOSITORY = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--refresh-goldens", action="store_true", help="rewrite tests/goldens instead of comparing")


@pytest.fixture
def on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Puts a model folder into a cache of the hub's, under an id; the hub itself cannot be reached."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(name: str, folder: Path) -> None:
        repository = cache / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / "0123")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0123")

    return put


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of pytest-timeout's: to wait for a turn is no time-out
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Where files are tested side by side (``pytest -n``), a test marked ``alone`` waits until no other runs."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    assert item.config.cache is not None
    with _turn(item.config.cache.mkdir("turns"), alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def _turn(folder: Path, *, alone: bool) -> Iterator[None]:
    with (folder / "gate").open("w") as gate, (folder / "room").open("w") as room:
        fcntl.flock(gate, fcntl.LOCK_EX)  # whoever waits for the room keeps others from entering it meanwhile
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield
        fcntl.flock(room, fcntl.LOCK_UN)  # a fork that a test left behind would hold it


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real models and text, which are no part of the repository: MASKPRO_TEST_DATA, or ../shared/data."""
    folder = Path(os.environ.get("MASKPRO_TEST_DATA") or REPOSITORY.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}; set MASKPRO_TEST_DATA")
    return folder


@pytest.fixture
def golden(request: pytest.FixtureRequest):
    """Compares bytes with a file in tests/goldens, or rewrites it under --refresh-goldens."""

    def compare(name: str, content: bytes) -> None:
        path = REPOSITORY / "tests" / "goldens" / name
        if request.config.getoption("--refresh-goldens"):
            path.write_bytes(content)
        assert path.read_bytes() == content, f"{name} differs; `make goldens` rewrites it, review the diff"

    return compare
