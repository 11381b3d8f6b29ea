"""What one server takes, and the models of other sizes it is measured with."""

from __future__ import annotations

import json
import sys

import pytest
from calibration import STUB
from footprint import command, footprint
from random_llama import SHAPES, check_shape
from server import Server, ServerError


def stub(tmp_path, *flags: object) -> Server:
    return Server([*map(str, flags)], tmp_path / "log", program=(sys.executable, str(STUB)))


def test_memory_and_pace_are_the_servers(tmp_path, pace):
    gap = 0.05  # long beside what a busy machine adds
    server = stub(tmp_path, "--first-token", pace.first_token, "--gap", gap)
    found = footprint(server, timeout=30)
    assert 10 << 20 < found.serving_bytes <= found.peak_bytes < 1 << 30
    assert found.s_per_token == pytest.approx(gap, abs=gap / 2)
    assert found.ready_s > 0
    assert server.exit_code is not None


def test_the_peak_is_that_of_loading(tmp_path, pace):
    class Loading(Server):
        later = 0

        def memory(self) -> int:
            if self.seconds_to_ready == 0:
                return 900
            self.later += 1
            return 100

    flags = ["--first-token", str(pace.first_token), "--gap", str(pace.gap)]
    server = Loading(flags, tmp_path / "log", program=(sys.executable, str(STUB)))
    found = footprint(server, timeout=30)
    assert (found.peak_bytes, found.serving_bytes) == (900, 100)
    assert server.later <= 2  # none while it answers


def test_a_server_that_does_not_start_is_stopped_and_says_why(tmp_path):
    with pytest.raises(ServerError, match="invalid float value: 'soon'"):
        footprint(stub(tmp_path, "--gap", "soon"), timeout=30)


def test_a_folder_of_another_shape_is_refused(tmp_path):
    (tmp_path / "dense").mkdir()
    config = tmp_path / "dense" / "config.json"
    config.write_text(json.dumps(SHAPES["1.1b"]))
    check_shape(tmp_path, "1.1b")
    with pytest.raises(SystemExit, match=rf"^{config}: hidden_size: expected 4096 \(7b\), found 2048$"):
        check_shape(tmp_path, "7b")


@pytest.mark.parametrize(
    ("words", "arguments", "environment"),
    [
        ("tiny", ["--model", "tiny", "--port", "1"], {}),
        (
            "A=1 B_2='x y=z' folder/tiny --port 2",
            ["--model", "folder/tiny", "--port", "1", "--port", "2"],
            {"A": "1", "B_2": "x y=z"},
        ),
        ("tiny --override={}=1", ["--model", "tiny", "--port", "1", "--override={}=1"], {}),
    ],
)
def test_a_server_is_named_as_in_a_shell(words, arguments, environment):
    assert command(words, "--port 1") == (arguments, environment)


def test_a_server_without_a_model_is_named():
    with pytest.raises(ValueError, match="no model in 'A=1'"):
        command("A=1", "")
