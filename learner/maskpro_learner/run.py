"""A learning run at a terminal: progress, log, curve, checkpoints, and a stop that loses nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedModel

from maskpro_learner.config import LearnConfig
from maskpro_learner.distributed import ALONE, World
from maskpro_learner.learning_log import LearningLog, draw_curve, read_log
from maskpro_learner.packed_masks import PackedMasks
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
    """The last SIGINT or SIGTERM, if there was one.

    Args:
        launched: by torchrun, which sends its own signal after the terminal's, and ends processes that take too long.
    """

    def __init__(self, *, launched: bool = False) -> None:
        self.number: int | None = None
        self._launched = launched

    def __call__(self) -> bool:
        return self.number is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Notes the signals while inside; a second one ends the process at once, unless it may be a launcher's."""
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.getsignal(number) for number in handled}

        def note(number: int, frame: object) -> None:
            self.number = number
            if not self._launched:
                for each, handler in before.items():
                    signal.signal(each, handler)

        for number in handled:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class _RunProgress(Progress):
    """A bar, and under it what the last step found: one line would be too long for a terminal."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["found"])


def run_learning(
    model: PreTrainedModel, tokens: Tensor, masks: PackedMasks, config: LearnConfig, files: RunFiles,
    *, checkpoint_seconds: float, world: World = ALONE,
) -> tuple[PackedMasks, list[Step]]:  # fmt: skip
    """:func:`learn_masks` with everything a long run needs; the first process of the world draws and writes.

    Returns:
        The masks, and every step (in the first process). The checkpoint is still there: remove it once the masks are
        written.

    Raises:
        Interrupted: SIGINT or SIGTERM came, here or to another process; the checkpoint is written.
        LearnerError, CalibrationError, OSError: as learn_masks; the last checkpoint is intact.
    """
    request = StopRequest(launched=world.size > 1)
    stopped_by = 0

    def stop() -> bool:
        nonlocal stopped_by
        stopped_by = world.largest(request.number or 0)
        return stopped_by != 0

    if not world.is_first:
        with request.listening():
            learned = learn_masks(model, tokens, masks, config, checkpoint=files.checkpoint, stop=stop, world=world)
        if stopped_by:
            raise Interrupted(stopped_by, files.checkpoint)
        return learned, []
    columns = (
        TextColumn(f"maskpro {config.pattern}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    if not files.checkpoint.exists():
        files.log.unlink(missing_ok=True)
    with (
        request.listening(),
        LearningLog(files.log) as log,
        _RunProgress(*columns, console=Console(stderr=True)) as progress,
    ):
        task = progress.add_task("", total=config.steps, found="the initial mask's loss on the calibration text")

        def on_step(step: Step) -> None:
            log.write(step)
            found = (
                f"loss {step.loss:.4f}  residual {step.residual:+.4f}  tracker {step.tracker:+.4f}  "
                f"flips {step.flips:,.0f}"
            )
            progress.update(task, completed=step.step, found=found)

        learned = learn_masks(
            model, tokens, masks, config, on_step=on_step, checkpoint=files.checkpoint,
            checkpoint_seconds=checkpoint_seconds, stop=stop, world=world,
        )  # fmt: skip
    steps = read_log(files.log, Step)
    draw_curve(steps, files.curve, f"{config.estimator}, {config.pattern}, {config.steps} steps")
    if stopped_by:
        raise Interrupted(stopped_by, files.checkpoint)
    return learned, steps
