"""What one server takes."""

from __future__ import annotations

import sys

import pytest
from calibration import STUB
from footprint import footprint
from server import Server, ServerError


def stub(tmp_path, *flags: object) -> Server:
    return Server([*map(str, flags)], tmp_path / "log", program=(sys.executable, str(STUB)))


def test_memory_and_pace_are_the_servers(tmp_path, pace):
    server = stub(tmp_path, "--first-token", pace.first_token, "--gap", pace.gap)
    found = footprint(server, timeout=30)
    assert 10 << 20 < found.serving_bytes <= found.peak_bytes < 1 << 30
    assert found.s_per_token == pytest.approx(pace.gap, abs=pace.gap / 2)
    assert found.ready_s > 0
    assert server.exit_code is not None


def test_a_server_that_does_not_start_is_stopped_and_says_why(tmp_path):
    with pytest.raises(ServerError, match="invalid float value: 'soon'"):
        footprint(stub(tmp_path, "--gap", "soon"), timeout=30)
