"""A stub endpoint, and Locust against it as a user would run it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from calibration import STUB, Pace
from records import RunFile
from server import Server


@pytest.fixture(scope="session")
def pace() -> Pace:
    """Of the stub: fast enough for tests, slow enough to be seen."""
    return Pace(first_token=0.05, gap=0.004)


@pytest.fixture(scope="session")
def stub(tmp_path_factory, pace) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("stub") / "stub.log"
    arguments = ["--first-token", str(pace.first_token), "--gap", str(pace.gap)]
    with Server(arguments, log, program=(sys.executable, str(STUB))) as server:
        yield server


Locust = Callable[..., tuple[int, RunFile]]


@pytest.fixture
def locust(stub: Server, tmp_path: Path, repository: Path) -> Locust:
    """Runs Locust headless against the stub: flags in, exit code and records out."""

    def run(*flags: object) -> tuple[int, RunFile]:
        records = tmp_path / "records.json"
        command = [
            *(sys.executable, "-m", "locust", "-f", str(repository / "loadtests" / "locustfile.py"), "--headless"),
            *("--host", stub.url, "--records", str(records), "--only-summary", *map(str, flags)),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert records.exists(), done.stderr
        return done.returncode, RunFile.read(records)

    return run
