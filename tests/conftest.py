"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before the first import of torch: beside another test process, threads that spin while they wait only take its cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

REPOSITORY = Path(__file__).parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--refresh-goldens", action="store_true", help="rewrite tests/goldens instead of comparing")


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
