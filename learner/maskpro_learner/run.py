"""A learning run at a terminal: progress, log, curve, checkpoints, and a stop that loses nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel

from maskpro_learner.config import LearnConfig
from maskpro_learner.learning_log import LearningLog, draw_curve, read_log
from maskpro_learner.trainer import Step, learn_masks


@dataclass(frozen=True)
class RunFiles:
    """The files of a run, named after its mask file."""

    checkpoint: Path
    log: Path
    curve: Path

    @classmethod
    def beside(cls, output: Path) -> RunFiles:
        """Those of ``mask.safetensors``: mask.checkpoint, mask.jsonl, mask.png."""
        return cls(*(output.with_suffix(suffix) for suffix in (".checkpoint", ".jsonl", ".png")))


class Interrupted(Exception):  # noqa: N818  (no error: the run was asked to stop, and can go on)
    """A signal ended the run early; its checkpoint is written.

    Attributes:
        signal: which.
    """

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command goes on from {checkpoint}")
        self.signal = number


class StopRequest:
    """The last SIGINT or SIGTERM, if there was one."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self) -> bool:
        return self.number is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Notes the signals while inside; a second one ends the process at once."""
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in handled}

        def note(number: int, frame: object) -> None:
            self.number = number
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in handled:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def run_learning(
    model: PreTrainedModel, tokens: Tensor, masks: dict[str, Tensor], config: LearnConfig, files: RunFiles,
    *, checkpoint_seconds: float,
) -> tuple[dict[str, Tensor], list[Step]]:  # fmt: skip
    """:func:`learn_masks` with everything a long run needs.

    Returns:
        The masks, and every step.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the checkpoint is written.
        LearnerError, CalibrationError, OSError: as learn_masks; the last checkpoint is intact.
    """
    stop = StopRequest()
    columns = (
        TextColumn(f"maskpro {config.pattern}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]} residual {task.fields[residual]} tracker {task.fields[tracker]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    if not files.checkpoint.exists():
        files.log.unlink(missing_ok=True)
    with (
        stop.listening(),
        LearningLog(files.log) as log,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        task = progress.add_task("", total=config.steps, loss="-", residual="-", tracker="-")

        def on_step(step: Step) -> None:
            log.write(step)
            loss, residual, tracker = f"{step.loss:.4f}", f"{step.residual:+.4f}", f"{step.tracker:+.4f}"
            progress.update(task, completed=step.step, loss=loss, residual=residual, tracker=tracker)

        learned = learn_masks(
            model, tokens, masks, config, on_step=on_step, checkpoint=files.checkpoint,
            checkpoint_seconds=checkpoint_seconds, stop=stop,
        )  # fmt: skip
    steps = read_log(files.log)
    draw_curve(steps, files.curve, f"{config.estimator}, {config.pattern}, {config.steps} steps")
    if stop.number is not None and files.checkpoint.exists():
        raise Interrupted(stop.number, files.checkpoint)
    return learned, steps
