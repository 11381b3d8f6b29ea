"""Runs of many steps that can be stopped anywhere, or killed, and go on to the same bits."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from maskpro_kernels.files import write_safetensors
from maskpro_learner.errors import LearnerError

_VERSION = "3"
Found = TypeVar("Found", covariant=True)


class Run(Protocol[Found]):
    """What :func:`run_steps` runs; ``done`` counts its steps, and resuming sets it."""

    done: int

    def advance(self) -> Found:
        """Takes the next step and returns what it found."""

    def save(self, path: Path) -> None:
        """Writes a checkpoint."""


def run_steps(
    run: Run[Found], steps: int, *, on_step: Callable[[Found], None], checkpoint: Path | None,
    checkpoint_seconds: float, stop: Callable[[], bool],
) -> None:  # fmt: skip
    """Takes the steps that are not done yet.

    Args:
        run: the run, resumed already if it is to be.
        steps: of the whole run.
        on_step: called after every step with what it found.
        checkpoint: file to write every ``checkpoint_seconds`` and at the end, whichever it is; None for none.
        checkpoint_seconds: time between two writes.
        stop: asked before every step; True ends early.

    Raises:
        LearnerError: more steps are done than the run is to have.
        OSError: the checkpoint cannot be written; the last one is intact.
    """
    if run.done > steps:
        raise LearnerError(f"{checkpoint}: expected at most {steps} steps done, found {run.done}: give as many or more")
    written = time.monotonic()
    while run.done < steps and not stop():
        on_step(run.advance())
        if checkpoint is not None and time.monotonic() - written >= checkpoint_seconds:
            run.save(checkpoint)
            written = time.monotonic()
    if checkpoint is not None:
        run.save(checkpoint)


def digest(*tensors: Tensor) -> str:
    """A hash of tensors' bytes, for identities."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def write_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], *, identity: str, done: int, state: Mapping[str, str] | None = None
) -> None:
    """Writes a checkpoint: to a temporary name, synced, then renamed.

    Args:
        path: the file.
        tensors: the state that is tensors.
        identity: what two runs share if and only if one can go on as the other.
        done: steps.
        state: the rest of the state, text to text.

    Raises:
        OSError: it cannot be written; the last one is intact.
    """
    metadata = {"version": _VERSION, "run": identity, "done": str(done), **(state or {})}
    try:
        write_safetensors(path, tensors, metadata)
    except OSError as error:
        raise OSError(
            f"{path}: the checkpoint of step {done} cannot be written ({error.strerror}); the one before, if any, is "
            "intact, and the same command goes on from it"
        ) from error


@contextmanager
def read_checkpoint(path: Path, *, identity: str) -> Iterator[tuple[int, dict[str, str], Callable[[str], Tensor]]]:
    """Opens a checkpoint of the run that ``identity`` names.

    Yields:
        The steps done, the rest of the state, and what reads a tensor of it, on the CPU.

    Raises:
        LearnerError: it is unreadable, or of another run.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("version") != _VERSION:
                raise LearnerError(
                    f"{path}: checkpoint version: expected {_VERSION}, found {metadata.get('version')}: finish the run "
                    "with the release that began it, or remove it"
                )
            if metadata.get("run") != identity:
                raise LearnerError(
                    f"{path}: a checkpoint of another run (other settings, masks or text; or this machine, its torch "
                    "or its number of threads rounds otherwise): remove it, or change --output"
                )
            yield int(metadata["done"]), metadata, file.get_tensor
    except (SafetensorError, OSError, KeyError) as error:
        raise LearnerError(f"{path}: not a readable checkpoint: {error}") from error
