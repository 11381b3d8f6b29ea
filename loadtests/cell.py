"""Runs one cell: Locust, in a process of its own, against one endpoint."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from load_settings import LoadSettings
from records import RunFile

LOCUSTFILE = Path(__file__).with_name("locustfile.py")


class LoadError(RuntimeError):
    """A run that measured nothing; the message says why."""


def locust_command(url: str, model: str, settings: LoadSettings, records: Path) -> list[str]:
    """The command of one run."""
    return [
        *(sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary", "--host", url),
        *("--users", str(settings.users), "--spawn-rate", str(settings.users)),
        *("--model", model, "--workload", settings.workload, "--seed", str(settings.seed)),
        *("--rate", str(settings.rate), "--requests", str(settings.requests), "--warmup", str(settings.warmup)),
        *("--request-timeout", str(settings.timeout), "--retries", str(settings.retries)),
        *("--abort-share", str(settings.abort_share), "--records", str(records)),
        *([] if settings.fixed_length else ["--natural-stop"]),
    ]


def run_cell(url: str, model: str, settings: LoadSettings, path: Path) -> RunFile:
    """Measures, unless the file holds the result of the same settings already: one with failures, too, is a result.

    Args:
        url: of the endpoint.
        model: name of the served model, empty for the first listed.
        settings: of the run.
        path: file for the result.

    Raises:
        LoadError: Locust ended without a result, or no request succeeded.
    """
    if (kept := kept_result(path, settings)) is not None:
        return kept
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    result = subprocess.run(locust_command(url, model, settings, path), capture_output=True, text=True, check=False)
    if not path.exists():
        tail = "\n".join(result.stderr.splitlines()[-20:])
        raise LoadError(f"{url}: Locust ended with exit code {result.returncode} and no result:\n{tail}")
    run = RunFile.read(path)
    if _none_answered(run):
        raise LoadError(f"{url}: all {len(run.records)} requests failed; the first: {run.records[0].error}")
    return run


def kept_result(path: Path, settings: LoadSettings) -> RunFile | None:
    """What an earlier call left, if it is the same measurement, and if anything was answered."""
    if not path.exists():
        return None
    run = RunFile.read(path)
    if run.settings != asdict(settings) or _none_answered(run):
        return None
    return run


def _none_answered(run: RunFile) -> bool:
    return bool(run.records) and all(record.failed for record in run.records)


def failures(run: RunFile) -> int:
    """Requests that failed, those of the warm-up among them."""
    return run.warmup_failures + sum(record.failed for record in run.records)
