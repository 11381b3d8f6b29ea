"""Everything that waits for a GPU, in one command: tests, kernels against cuBLAS, the learning step, vLLM end to end.

    make gpu                                    # or: python scripts/gpu/run.py
    python scripts/gpu/run.py --only kernels --seconds 1200 --everything

Rows go to docs/results/gpu_*.json as they are measured, and a table of all of them to docs/results/gpu.md. What the
time does not allow is left for the next call, which goes on from there on the same machine. Without a GPU it says so
and exits 0.

Needs torch 2.11 or later for CUDA and Triton; pytest for the tests, vLLM for the last section: what is missing is said.
The package is found beside this script: nothing has to be installed but, for the learner's tests, `make native`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs" / "results"
PATHS = [str(REPOSITORY), str(REPOSITORY / "kernels"), str(REPOSITORY / "learner")]
SECTIONS = ("tests", "kernels", "w8a8", "learner", "serve")
TESTS = (
    "tests/kernels/test_nm_linear_triton.py", "tests/kernels/test_cuda_dispatch.py", "tests/kernels/test_w8a8.py",
    "tests/kernels/test_round_inputs_triton.py", "tests/kernels/test_policy_step_triton.py",
    "tests/learner/test_trainer.py", "tests/learner/test_distributed.py",
)  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=480, help="in all (default: 480)")
    parser.add_argument("--everything", action="store_true", help="more patterns, and all layers of the 8B shape")
    return parser.parse_args()


def reason_not_to_run() -> str | None:
    """Why nothing can be measured here, in one sentence."""
    if importlib.util.find_spec("torch") is None:
        return "There is no PyTorch here, so nothing was measured."
    import torch

    if not torch.cuda.is_available():
        return f"There is no CUDA GPU that torch {torch.__version__} can use here, so nothing was measured."
    if importlib.util.find_spec("triton") is None:
        return f"{torch.cuda.get_device_name()} is here but Triton is not, so nothing was measured."
    return None


def test_rows(rows: Any, seconds: float) -> None:
    """Runs the tests that need a GPU, a row for each file; what fails or is not finished is no row, and runs again.

    Raises:
        RuntimeError: of some files, after all were tried.
    """
    wrong = []
    for file in TESTS:
        try:
            rows.row(file, lambda file=file: {"pytest -m gpu": _test_file(file, seconds)})
        except RuntimeError as error:
            wrong.append(str(error))
    if wrong:
        raise RuntimeError("; ".join(wrong))


def _test_file(file: str, seconds: float) -> str:
    """pytest's last line."""
    plain = [] if importlib.util.find_spec("pytest_timeout") else ["-c", os.devnull, f"--rootdir={REPOSITORY}"]
    # Most of their time is the compilation of some hundred kernels.
    together = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--import-mode=importlib", *plain, *together, file]
    paths = [*PATHS, str(REPOSITORY / Path(file).parent)]  # helpers of the tests
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{file}: not finished in {seconds:.0f} s") from error
    last = done.stdout.strip().splitlines()[-1:] or [done.stderr.strip()[-200:]]
    summary = re.sub(r"^=+ | =+$", "", last[0])
    if done.returncode not in (0, 5):  # 5: nothing to run
        print(done.stdout[-6000:], done.stderr[-2000:], sep="\n")
        raise RuntimeError(f"{file}: {summary}")
    return summary


def main() -> None:
    arguments = parse_arguments()
    if reason := reason_not_to_run():
        print(reason)
        return
    sys.path += PATHS
    os.environ["PYTHONPATH"] = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])  # of vLLM's processes
    from end_to_end import serve_rows
    from kernel_table import kernel_rows
    from learning_step import learner_rows
    from rows import OutOfTimeError, Rows, table, this_machine
    from w8a8_table import w8a8_rows

    machine, deadline = this_machine(), time.monotonic() + arguments.seconds
    print(machine, flush=True)
    sections: dict[str, Callable[[Rows], None]] = {
        "tests": lambda rows: test_rows(rows, arguments.seconds / 8),
        "kernels": lambda rows: kernel_rows(rows, arguments.everything),
        "w8a8": lambda rows: w8a8_rows(rows, arguments.everything),
        "learner": learner_rows,
        "serve": lambda rows: serve_rows(rows, arguments.everything),
    }
    missing = {"tests": "pytest", "serve": "vllm"}
    report = [f"# Measured on a GPU\n\n{machine}; `python scripts/gpu/run.py`.\n"]
    failed = False
    for name in SECTIONS:
        rows = Rows(RESULTS / f"gpu_{name}.json", machine, deadline)
        if name in arguments.only and importlib.util.find_spec(missing.get(name, "torch")) is None:
            print(f"{name}: {missing[name]} is not installed here, so this is left out.")
        elif name in arguments.only:
            try:
                sections[name](rows)
            except OutOfTimeError as cut:
                print(f"No time is left for {cut}: run this again to go on.")
            except Exception as error:  # one section must not cost the others their time on a borrowed GPU
                failed = True
                print(f"{name}: {type(error).__name__}: {error}")
        if rows.rows:
            report.append(f"\n## {name}\n{table(rows.rows, name)}\n")
    if len(report) > 1:
        from maskpro_kernels.files import write_atomically

        write_atomically(RESULTS / "gpu.md", "".join(report).encode())
    sys.exit(failed)


if __name__ == "__main__":
    main()
