"""A process that was forked early is, to its caller, like one that multiprocessing has spawned."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")

# What a process runs, and what it says of itself to a file.
SCRIPT = """
import fractions  # before the fork: a process that is spawned has not imported it
import json, os, sys, time
from multiprocessing import connection, current_process, parent_process
from pathlib import Path

def say(path):
    Path(path).write_text(json.dumps({
        "pid": os.getpid(), "parent": os.getppid(), "name": current_process().name, "knows": parent_process().pid,
        "new": os.environ.get("NEW"), "old": os.environ.get("OLD"), "cores": len(os.sched_getaffinity(0)),
        "imported": "fractions" in sys.modules and "MARK" in vars(sys.modules["fractions"]),
    }))

def leave(code):
    sys.exit(code)

def fail():
    raise RuntimeError("it went wrong")

def leave_a_note(path):
    import atexit, weakref
    atexit.register(Path(path).write_text, "left")
    weakref.finalize(sys, print, "finalized")

def sleep(path):
    say(path)
    time.sleep(60)

def answer(pipe, path):
    say(path)
    pipe.send(pipe.recv() + 1)

if __name__ == "__main__":
    from maskpro_serve.forked_process import ForkedContext, _Process

    fractions.MARK = True
    os.environ["OLD"] = "1"
    context = ForkedContext()
    waiting = _Process.waiting.pid
    os.environ["NEW"] = "1"
    del os.environ["OLD"]
    folder = Path(sys.argv[1])
"""


def run(folder, body, before=SCRIPT):
    """What the rest of the script prints, and its errors."""
    script = folder / "script.py"
    script.write_text(before + "".join(f"    {line}\n" for line in body.strip().splitlines()))
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    finished = subprocess.run(
        [sys.executable, script, folder], capture_output=True, text=True, timeout=60, env=environment, check=True
    )
    return finished.stdout.split(), finished.stderr


def said(folder, name):
    return json.loads((folder / name).read_text())


def gone(pid):
    """Whether a process ends within some seconds."""
    try:
        process = psutil.Process(pid)
        for _ in range(100):
            if process.status() == psutil.STATUS_ZOMBIE:  # nobody has asked for its code
                return True
            time.sleep(0.05)
    except psutil.NoSuchProcess:
        return True
    return False


def test_the_first_was_forked_and_the_second_is_spawned(tmp_path):
    body = """
for name in "first", "second":
    process = context.Process(target=say, args=(folder / name,), name=name)
    process.start()
    process.join()
    print(process.pid, process.exitcode, os.getpid(), len(os.sched_getaffinity(0)), waiting)
"""
    out, errors = run(tmp_path, body)
    assert errors == ""
    pid, code, parent, cores, waiting = map(int, out[:5])
    first = {"pid": pid, "parent": parent, "name": "first", "knows": parent, "new": "1", "old": None, "cores": cores}
    assert said(tmp_path, "first") == first | {"imported": True}
    assert (pid, code) == (waiting, 0)
    pid, code = map(int, out[5:7])
    assert said(tmp_path, "second") == first | {"pid": pid, "name": "second", "imported": False}
    assert (pid != waiting, code) == (True, 0)


@pytest.mark.parametrize(
    ("start", "code", "error"),
    [("target=leave, args=(7,)", 7, ""), ("target=fail", 1, "RuntimeError: it went wrong")],
)
def test_its_end_is_seen(tmp_path, start, code, error):
    body = f"""
process = context.Process({start})
process.start()
assert connection.wait([process.sentinel], 30)
process.join(30)
print(process.exitcode)
"""
    out, errors = run(tmp_path, body)
    assert out == [str(code)]
    assert error in errors
    assert ("Traceback" in errors) == bool(error)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_signals_reach_it(tmp_path, number):
    body = f"""
process = context.Process(target=sleep, args=(folder / "said",))
process.start()
while not (folder / "said").exists():
    time.sleep(0.01)
os.kill(process.pid, {int(number)})
process.join(30)
print(process.exitcode)
"""
    out, errors = run(tmp_path, body)
    interrupted = number == signal.SIGINT
    assert out == ["1" if interrupted else str(-number)]
    assert ("KeyboardInterrupt" in errors) == interrupted


def test_it_ends_with_this_process_if_it_was_never_needed(tmp_path):
    out, errors = run(tmp_path, "import signal\nos.kill(waiting, signal.SIGINT)\nprint(waiting)")
    assert errors == ""
    assert gone(int(out[0]))


def test_it_is_ended_when_nothing_was_started_as_it(tmp_path):
    body = """
print(waiting, context.end_if_waiting(), context.end_if_waiting())
process = context.Process(target=say, args=(folder / "said",))
process.start()
process.join()
print(process.exitcode, process.pid != waiting)
"""
    out, errors = run(tmp_path, body)
    assert (out[1:], errors) == (["True", "False", "0", "True"], "")
    assert gone(int(out[0]))


def test_it_cleans_up_at_its_end_but_not_for_the_other(tmp_path):
    before = SCRIPT.replace("import fractions", "import weakref, fractions")
    made = "    context = ForkedContext()"
    before = before.replace(made, "    weakref.finalize(sys, print, 'ours')\n" + made)
    body = """
process = context.Process(target=leave_a_note, args=(folder / "note",))
process.start()
process.join()
print(process.exitcode)
"""
    out, errors = run(tmp_path, body, before)
    assert (out, errors) == (["finalized", "0", "ours"], "")
    assert (tmp_path / "note").read_text() == "left"


def test_one_that_was_killed_is_spawned(tmp_path):
    body = """
os.kill(waiting, 9)
while "State:\\tZ" not in Path(f"/proc/{waiting}/status").read_text():
    time.sleep(0.01)
process = context.Process(target=say, args=(folder / "said",))
process.start()
process.join()
print(process.exitcode, process.pid != waiting)
"""
    assert run(tmp_path, body) == (["0", "True"], "")
    assert said(tmp_path, "said")["imported"] is False


@pytest.mark.parametrize("change", ["os.environ['LD_PRELOAD'] = ''", "context.set_executable(folder / 'python')"])
def test_what_must_be_started_otherwise_is_spawned(tmp_path, change):
    (tmp_path / "python").symlink_to(sys.executable)
    body = f"""
{change}
process = context.Process(target=say, args=(folder / "said",))
process.start()
process.join()
print(process.exitcode, waiting)
"""
    out, errors = run(tmp_path, body)
    assert (out[0], errors) == ("0", "")
    assert said(tmp_path, "said")["imported"] is False
    assert gone(int(out[1]))


def test_what_needs_an_open_file_is_spawned(tmp_path):
    body = """
ours, theirs = context.Pipe()
process = context.Process(target=answer, args=(theirs, folder / "said"))
process.start()
ours.send(41)
print(ours.recv(), waiting)
process.join()
"""
    out, errors = run(tmp_path, body)
    assert (out[0], errors) == ("42", "")
    assert said(tmp_path, "said")["imported"] is False
    assert gone(int(out[1]))
