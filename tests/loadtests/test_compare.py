"""The whole comparison, of two endpoints that are one stub, and its report."""

from __future__ import annotations

import base64
import csv
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from calibration import Pace, calibrate
from compare import endpoints_from, parser, plan_from
from load_settings import LoadSettings

QUICK = ["--rounds", "2", "--concurrency", "2", "--rates", "8", "--requests-per-user", "1", "--open-seconds", "0.5",
         "--least-requests", "2", "--no-calibration"]  # fmt: skip


def compare(repository: Path, output: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, repository / "loadtests" / "compare.py", "--output", output, "--idle", 0, *flags]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=180)


@pytest.fixture(scope="module")
def sides(stub) -> list[str]:
    return ["--endpoint", f"one={stub.url},stub", "--endpoint", f"two={stub.url}/v1"]


@pytest.fixture(scope="module")
def output(tmp_path_factory, sides) -> Path:
    """A comparison that was stopped after a run or more, and then went on to its end."""
    repository = Path(__file__).parents[2]
    folder = tmp_path_factory.mktemp("comparison")
    stopped = compare(repository, folder, *sides, *QUICK, "--stop-after", 1.5)
    assert stopped.returncode == 3, stopped.stderr
    assert not (folder / "report.json").exists()
    first = {path: path.read_bytes() for path in (folder / "cells").iterdir()}
    assert 0 < len(first) < 8
    done = compare(repository, folder, *sides, *QUICK)
    assert done.returncode == 0, done.stderr
    assert f"{len(first)} runs of 8 are there" in done.stderr
    assert all(path.read_bytes() == content for path, content in first.items())
    return folder


def test_the_numbers(output):
    report = json.loads((output / "report.json").read_text())
    assert [load["label"] for load in report["loads"]] == ["2 users", "8/s"]
    for load in report["loads"]:
        one, two = load["endpoints"]["one"], load["endpoints"]["two"]
        assert one["failed"] == two["failed"] == 0
        for count in ("requests", "ok", "prompt_tokens", "completion_tokens"):
            assert one[count] == two[count] > 0  # both are asked the same
        assert ("tokens per second" in load["ratios"]) == bool(load["users"])
        assert all(each["low"] <= each["ratio"] <= each["high"] for each in load["ratios"].values())
    assert report["machine"]["cores"] >= 1
    assert report["versions"]["locust"]
    assert "--concurrency 2" in report["command"]


def test_the_runs(output):
    rows = list(csv.DictReader((output / "runs.csv").read_text().splitlines()))
    assert [(row["endpoint"], row["users"], row["round"]) for row in rows[:4]] == [
        ("one", "2", "1"), ("two", "2", "1"), ("one", "0", "1"), ("two", "0", "1"),
    ]  # fmt: skip
    assert len(rows) == 8
    assert len({row["seed"] for row in rows}) == 2  # one a round
    for row in rows:
        assert float(row["ttft_p50"]) > 0.05


class Page(HTMLParser):
    """Collects what a page needs from elsewhere, its images, and whether its tags are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.links += [values[name] for name in ("href", "src") if name in values]
        if tag == "img":
            self.images.append(values["src"])
        if tag not in ("img", "meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_nothing_else(output):
    text = (output / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert len(page.images) == 4
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    for image in page.images:
        svg = ElementTree.fromstring(base64.b64decode(image.split(",")[1]))
        assert svg.tag.endswith("svg")
    assert "failed: the numbers" not in text


def test_the_markdown_says_the_same(output):
    text = (output / "report.md").read_text()
    report = json.loads((output / "report.json").read_text())
    for load in report["loads"]:
        for name, side in load["endpoints"].items():
            row = rf"\| {load['label']}, {load['workload']} \| {name} \| {side['tokens_per_second']:.1f} \|"
            assert re.search(row, text)
    images = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert len(images) == 4
    assert all((output / image).read_bytes().startswith(b"\x89PNG") for image in images)


def test_a_report_can_be_written_again(output, repository, sides):
    before = {name: (output / name).read_bytes() for name in ("report.json", "report.md", "report.html", "runs.csv")}
    assert compare(repository, output, *sides, *QUICK, "--report-only").returncode == 0
    assert {name: (output / name).read_bytes() for name in before} == before


def test_an_unfinished_comparison_of_others_is_not_mixed(repository, tmp_path, sides):
    assert compare(repository, tmp_path, *sides, *QUICK, "--stop-after", 0).returncode == 3
    other = compare(repository, tmp_path, *sides[:3], f"{sides[3]},stub-busy", *QUICK)
    assert other.returncode == 2
    assert "holds an unfinished comparison of other endpoints or flags (one, two)" in other.stderr


def test_failed_requests_are_an_exit_code(stub, repository, tmp_path, sides):
    busy = [*sides[:2], "--endpoint", f"busy={stub.url},stub-busy"]
    flags = ["--concurrency", "1", "--rates", "--rounds", "1", "--least-requests", "3", "--retries", "0"]
    done = compare(repository, tmp_path, *busy, *flags, "--no-calibration")
    assert done.returncode == 1
    assert re.search(r"compare.py: [12345] requests failed", done.stderr)
    assert "requests failed: the numbers below" in (tmp_path / "report.html").read_text()
    # A comparison that is taken up again keeps its failures.
    cells = {path: path.read_bytes() for path in (tmp_path / "cells").iterdir()}
    notes = tmp_path / "notes.json"
    notes.write_text(json.dumps(json.loads(notes.read_text()) | {"finished": False}))
    again = compare(repository, tmp_path, *busy, *flags, "--no-calibration")
    assert again.returncode == 1
    assert {path: path.read_bytes() for path in (tmp_path / "cells").iterdir()} == cells
    assert re.search(r"compare.py: [12345] requests failed", again.stderr)
    broken = compare(repository, tmp_path, *sides[:2], "--endpoint", f"busy={stub.url},stub-broken", *flags, "--fresh")
    assert broken.returncode == 1
    assert "all 3 requests failed; the first: HTTP 500: broken as told" in broken.stderr


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--endpoint", "one=http://x"], "expected two endpoints of different names, found one"),
        (["--endpoint", "a=http://x", "--endpoint", "a=http://y"], "expected two endpoints of different names"),
        (["--endpoint", "x:8000"], "expected NAME=URL or NAME=URL,MODEL"),
        (["--name-a", "a/b"], "name 'a/b': expected letters"),
        (["--env-a", "X"], "variable 'X': expected NAME=VALUE"),
        (["--concurrency", "0"], "concurrencies and rates above 0"),
        (["--concurrency", "--rates"], "one round or more"),
    ],
)
def test_bad_input_is_one_sentence(flags, sentence):
    arguments = parser().parse_args(flags)
    with pytest.raises(ValueError, match=sentence):
        endpoints_from(arguments), plan_from(arguments)


def test_bad_input_is_exit_code_2(repository, tmp_path):
    done = compare(repository, tmp_path, "--report-only")
    assert done.returncode == 2
    assert "expected a measured run, found none" in done.stderr
    assert "Traceback" not in done.stderr


def test_calibration_against_the_stub(tmp_path):
    pace = Pace(first_token=0.2, gap=0.01)
    found = calibrate(LoadSettings(users=2, requests=4, warmup=1), pace, tmp_path)
    assert (found["requests"], found["failed"]) == (4, 0)
    assert found["measured"]["ttft"] >= pace.first_token
    assert 0 <= found["error"]["ttft"] < 1  # a bound for a machine that does much else
    assert -1 < found["error"]["tokens_per_second"] <= 0.01
    assert 0 < found["generator_cpu_share"] < 1
