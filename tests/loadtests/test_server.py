"""A server that a measurement starts."""

from __future__ import annotations

import sys

import pytest
from calibration import STUB
from server import Server, ServerError


def test_its_memory_is_that_of_its_processes(stub):
    assert 10 << 20 < stub.memory() < 1 << 30


def test_a_server_that_ends_says_why(tmp_path):
    server = Server(["--first-token", "soon"], tmp_path / "log", program=(sys.executable, str(STUB))).start()
    try:
        with pytest.raises(ServerError, match=r"(?s)exit code 2.*invalid float value: 'soon'"):
            server.wait_ready(20)
        assert server.memory() == 0
    finally:
        server.stop()
