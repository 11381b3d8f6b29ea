"""The record of a learning run: one JSON line per step, and the curve of MaskPro's Figure 5."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
from collections.abc import Iterable
from io import RawIOBase
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

from maskpro_kernels.files import write_atomically
from maskpro_learner.errors import LearnerError
from maskpro_learner.trainer import Step

_SMOOTHING = 0.98
"""Of the drawn curve; the points behind it are not smoothed."""


class Numbered(Protocol):
    """A dataclass that says which step it is of."""

    @property
    def step(self) -> int: ...


Found = TypeVar("Found", bound=Numbered)


class LearningLog:
    """Appends steps to a JSONL file, line by line and unbuffered, so that what was done survives a kill.

    Args:
        path: the file. A run that goes on appends: steps after its checkpoint appear twice, the later lines count. A
            last line that a kill or a full disk cut short is removed first.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: RawIOBase | None = None

    def __enter__(self) -> LearningLog:
        self._file = self._path.open("ab", buffering=0)
        content = self._path.read_bytes()
        self._file.truncate(content.rfind(b"\n") + 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()

    def write(self, step: Numbered) -> None:
        """Adds one line, of a dataclass's fields.

        Raises:
            OSError: the disk is full.
        """
        assert self._file is not None
        line = json.dumps(vars(step)).encode() + b"\n"
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise OSError(
                f"{self._path}: step {step.step} cannot be written ({error.strerror}); the last checkpoint is intact, "
                "and the same command goes on from it"
            ) from error


def check_log(path: Path, kind: type[Numbered]) -> None:
    """Checks that a log would be written over nothing but a log: calibration text has the same ending.

    Raises:
        LearnerError: the file begins with another thing than a step, whole or cut short.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        line = file.readline()
    cut = b'{"step": '
    try:
        if line.endswith(b"\n") or not (line.startswith(cut) or cut.startswith(line)):
            kind(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise LearnerError(
            f"{path}: would be written over by the run's log, and is none: move it, or change --output"
        ) from error


def read_log(path: Path, kind: type[Found]) -> list[Found]:
    """The steps of a log in order, each once; a last line cut short by a kill is left out.

    Args:
        path: the file.
        kind: the dataclass of a step.

    Raises:
        LearnerError: a line before the last is no step.
    """
    steps: dict[int, Found] = {}
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            step = kind(**json.loads(line))
        except (ValueError, TypeError) as error:
            if number == len(lines):
                break
            raise LearnerError(f"{path}: line {number}: expected a step, found {line[:60]!r}") from error
        steps[step.step] = step
    return [steps[number] for number in sorted(steps)]


def check_drawing() -> None:
    """Checks that :func:`draw_curve` has what it needs, so that a run does not find out at its end.

    Raises:
        LearnerError: matplotlib, which is optional, is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise LearnerError("--steps draws the run's curve with matplotlib: pip install maskpro-serve[learn]")


def moving_average(values: Iterable[float], smoothing: float = _SMOOTHING) -> list[float]:
    """The exponential moving average, corrected for its start at 0."""
    averages, total, weight = [], 0.0, 0.0
    for value in values:
        total = smoothing * total + (1 - smoothing) * value
        weight = smoothing * weight + (1 - smoothing)
        averages.append(total / weight)
    return averages


def draw_curve(steps: list[Step], path: Path, title: str) -> None:
    """Draws the residual over the steps: its points, their moving average, and zero, the initial mask.

    Args:
        steps: from :func:`read_log`.
        path: a .png to write, atomically.
        title: above the axes.
    """
    from matplotlib.figure import Figure  # without pyplot there is no display to ask for

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    numbers = [step.step for step in steps]
    residuals = [step.residual for step in steps]
    axes.plot(numbers, residuals, ".", markersize=2, alpha=0.3, color="tab:blue", label="one minibatch")
    axes.plot(numbers, moving_average(residuals), color="tab:blue", label="moving average")
    axes.axhline(0, color="black", linewidth=0.8, label="initial mask")
    axes.set_xlabel("step")
    axes.set_ylabel("loss minus the initial mask's, nats per token")
    axes.set_title(title)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    write_atomically(path, image.getvalue())
