"""Learns masks: the loop of MaskPro (arXiv:2506.12876, algorithm 1), which can stop anywhere and go on.

Every step is a function of (seed, step, logits, tracker): the text of its minibatch and its draws come from counters,
so a run that was interrupted ends with the same bits as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from maskpro_kernels.files import write_atomically
from maskpro_learner.config import LearnConfig
from maskpro_learner.errors import CalibrationError, LearnerError
from maskpro_learner.estimator import Estimator, make_estimator
from maskpro_learner.evaluate import summed_loss
from maskpro_learner.layers import select_layers
from maskpro_learner.margins import margin_logits
from maskpro_learner.masked_model import MaskedModel, constant_logits, masked

_CHECKPOINT_VERSION = "1"


@dataclass(frozen=True)
class Step:
    """What happened in one step: all losses are nats per token of its minibatch.

    Attributes:
        step: counted from 1.
        loss: mean over the masks tried.
        residual: loss minus the initial mask's on the same text.
        tracker: the estimator's moving average.
        seconds: how long it took.
    """

    step: int
    loss: float
    residual: float
    tracker: float
    seconds: float


def learn_masks(
    model: PreTrainedModel,
    tokens: Tensor,
    masks: Mapping[str, Tensor],
    config: LearnConfig,
    *,
    on_step: Callable[[Step], None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 600.0,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Tensor]:
    """Learns from initial masks, and leaves the model's weights as they were.

    Args:
        model: a causal language model on the CPU, its weights frozen.
        tokens: int64 (samples, length), calibration text.
        masks: initial masks by parameter name; they say which linears learn.
        config: the settings.
        on_step: called after every step.
        checkpoint: file to write now and then, and to go on from if it exists; removed when learning is over.
        checkpoint_seconds: time between two writes.
        stop: asked after every step; True writes the checkpoint and ends early.

    Returns:
        The most likely masks, by parameter name.

    Raises:
        LearnerError: masks of other layers, a loss that is not finite, or a checkpoint of another run.
        CalibrationError: fewer blocks than a minibatch takes.
        OSError: the checkpoint cannot be written; the last one is intact.
    """
    if len(tokens) < 1:
        raise CalibrationError("learning: expected at least one block of calibration text, found none")
    linears = select_layers(model, config.pattern).linears
    unknown = sorted(masks.keys() - {f"{name}.weight" for name in linears})
    if unknown:
        raise LearnerError(f"initial mask: {unknown[0]}: the model has no such prunable layer")
    learning = {name: linear for name, linear in linears.items() if f"{name}.weight" in masks}
    scale = config.settings().initial_logit
    if config.start == "margin":
        logits = margin_logits(model, tokens, masks, config.pattern, scale, batch=config.batch)
    else:
        logits = constant_logits(masks, scale)
    with masked(learning, masks, config.pattern, logits=logits, seed=config.seed) as policy:
        run = _Run(model, tokens, policy, config)
        if checkpoint is not None and checkpoint.exists():
            run.resume(checkpoint)
        written = time.monotonic()
        while run.done < config.steps and not stop():
            step = run.advance()
            if on_step is not None:
                on_step(step)
            if checkpoint is not None and time.monotonic() - written >= checkpoint_seconds:
                run.save(checkpoint)
                written = time.monotonic()
        if checkpoint is not None:
            if run.done < config.steps:
                run.save(checkpoint)
            else:
                checkpoint.unlink(missing_ok=True)
        return policy.masks()


class _Run:
    """The state of a run: steps done, the logits (in the policy), the tracker, and the initial mask's losses."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor, policy: MaskedModel, config: LearnConfig) -> None:
        self.done = 0
        self._model, self._tokens, self._policy, self._config = model, tokens, policy, config
        settings = config.settings()
        self._estimator: Estimator = make_estimator(
            config.estimator, settings.learning_rate, config.smoothing, settings.draws
        )
        # The weights are frozen, so one pass over the text gives f_0 of every minibatch there will be.
        self._initial = torch.tensor([self._loss(tokens[i : i + 1]) for i in range(len(tokens))], dtype=torch.float64)
        policy.step([], self._draw(0))

    def advance(self) -> Step:
        """Tries the masks of this step on its minibatch and updates the logits."""
        begin = time.monotonic()
        chosen = self._minibatch()
        count = self._estimator.masks_per_batch
        losses = []
        for k in range(count):
            if k > 0:
                self._policy.step([], self._draw(k))
            losses.append(self._loss(self._tokens[chosen], backward=self._estimator.group_draws > 0))
        initial = float(self._initial[chosen].mean())
        coefficients = self._estimator.coefficients(losses, initial)
        scored = count if self._estimator.group_draws else 0  # the draws after those tried, or those
        updates = [(coefficient, self._draw(scored + k)) for k, coefficient in enumerate(coefficients)]
        gains = self._policy.gains() if self._estimator.group_draws else None
        self.done += 1
        self._policy.step(updates, self._draw(0), gains)
        loss = sum(losses) / count
        return Step(self.done, loss, loss - initial, self._estimator.tracker, time.monotonic() - begin)

    def _draw(self, k: int) -> int:
        """The number of mask k of the step that is next."""
        return self.done * (self._estimator.masks_per_batch + self._estimator.group_draws) + k

    def _minibatch(self) -> Tensor:
        """Indices of blocks: without repetition within an epoch's worth where there are enough."""
        generator = torch.Generator().manual_seed(self._config.seed * 1_000_003 + self.done)
        size = self._config.minibatch
        if size <= len(self._tokens):
            return torch.randperm(len(self._tokens), generator=generator)[:size]
        return torch.randint(len(self._tokens), (size,), generator=generator)

    def _loss(self, blocks: Tensor, *, backward: bool = False) -> float:
        """Mean loss per token; backward also leaves its gradient in the learning weights."""
        predicted = blocks.shape[0] * (blocks.shape[1] - 1)
        total = 0.0
        for part in blocks.split(self._config.batch):
            if backward:
                total += self._policy.backward(self._model, part, predicted)
            else:
                total += summed_loss(self._model, part[:, :-1], part[:, 1:])
        loss = total / predicted
        if not math.isfinite(loss):
            raise LearnerError(f"step {self.done + 1}: the loss is {loss}: lower --learning-rate, or --dtype float32")
        return loss

    def save(self, path: Path) -> None:
        """Writes the checkpoint: to a temporary name, synced, then renamed."""
        metadata = {
            "version": _CHECKPOINT_VERSION,
            "run": self._identity(),
            "done": str(self.done),
            "tracker": self._estimator.tracker.hex(),
        }
        write_atomically(path, save(self._policy.logits, metadata))

    def resume(self, path: Path) -> None:
        """Goes on where a checkpoint of this very run stopped.

        Raises:
            LearnerError: it is unreadable, or of another run.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                if metadata.get("version") != _CHECKPOINT_VERSION or metadata.get("run") != self._identity():
                    raise LearnerError(
                        f"{path}: a checkpoint of another run (other settings, masks or text): remove it, or change "
                        "--output"
                    )
                for name, logits in self._policy.logits.items():
                    logits.copy_(file.get_tensor(name))
                self.done = int(metadata["done"])
                self._estimator.tracker = float.fromhex(metadata["tracker"])
        except (SafetensorError, OSError, KeyError) as error:
            raise LearnerError(f"{path}: not a readable checkpoint: {error}") from error
        self._policy.step([], self._draw(0))

    def _identity(self) -> str:
        """Settings, shapes, text and initial losses: what two runs share if and only if one can go on as the other."""
        settings = asdict(self._config) | asdict(self._config.settings()) | {"pattern": str(self._config.pattern)}
        settings.pop("steps")  # a longer run may go on from a shorter one
        shapes = {name: list(logits.shape) for name, logits in self._policy.logits.items()}
        text = [int(self._tokens.sum()), list(self._tokens.shape)]
        losses = [loss.hex() for loss in self._initial.tolist()]
        return json.dumps([settings, shapes, text, losses], sort_keys=True)
