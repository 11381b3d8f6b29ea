"""Learns masks: the loop of MaskPro (arXiv:2506.12876, algorithm 1), which can stop anywhere and go on.

Every step is a function of (seed, step, logits, tracker): the text of its minibatch and its draws come from counters,
so a run that was interrupted ends with the same bits as one that was not. Several processes share a minibatch
(:mod:`maskpro_learner.distributed`) and end with the masks of one: to the bit, but for the gradients of first-order,
wherever the model computes the same bits for a block whatever blocks are beside it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from maskpro_kernels.policy_step import DRAW_VERSION
from maskpro_learner.checkpointed import digest, read_checkpoint, run_steps, write_checkpoint
from maskpro_learner.config import LearnConfig
from maskpro_learner.distributed import ALONE, World
from maskpro_learner.errors import CalibrationError, LearnerError
from maskpro_learner.estimator import Estimator, make_estimator
from maskpro_learner.evaluate import summed_loss
from maskpro_learner.layers import select_layers
from maskpro_learner.margins import margin_logits
from maskpro_learner.masked_model import MaskedModel, constant_logits, masked, token_losses
from maskpro_learner.packed_masks import PackedMasks
from maskpro_learner.repeatable import repeatable


@dataclass(frozen=True)
class Step:
    """What happened in one step: all losses are nats per token of its minibatch.

    Attributes:
        step: counted from 1.
        loss: mean over the masks tried.
        residual: loss minus the initial mask's on the same text.
        tracker: the estimator's moving average.
        seconds: how long it took.
        flips: groups whose sampled mask was not a most likely one, mean over the masks tried; NaN in older logs.
    """

    step: int
    loss: float
    residual: float
    tracker: float
    seconds: float
    flips: float = math.nan


def learn_masks(
    model: PreTrainedModel,
    tokens: Tensor,
    masks: Mapping[str, Tensor],
    config: LearnConfig,
    *,
    on_step: Callable[[Step], None] = lambda step: None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 600.0,
    stop: Callable[[], bool] = lambda: False,
    world: World = ALONE,
) -> PackedMasks:
    """Learns from initial masks, and leaves the model's weights as they were.

    Args:
        model: a causal language model, its weights frozen; logits and masks live where its weights do.
        tokens: int64 (samples, length), calibration text.
        masks: initial masks by parameter name; they say which linears learn.
        config: the settings.
        on_step: called after every step.
        checkpoint: file to write now and then and at the end, and to go on from if it exists. The caller removes it
            once the masks are safe.
        checkpoint_seconds: time between two writes.
        stop: asked before every step; True writes the checkpoint and ends early. Every process must answer alike.
        world: the processes that learn together, each of which makes this same call. Only the first one reads and
            writes the checkpoint, and its masks count.

    Returns:
        The most likely masks, by parameter name.

    Raises:
        LearnerError: masks of other layers, a loss that is not finite, or a checkpoint of another run.
        CalibrationError: no block of text.
        OSError: the checkpoint cannot be written; the last one is intact.
    """
    if len(tokens) < 1:
        raise CalibrationError("learning: expected at least one block of calibration text, found none")
    if (together := min(config.minibatch, len(tokens))) < world.size:
        raise LearnerError(
            f"learning: expected a minibatch of at least one block for each of {world.size} processes, found {together}"
        )
    linears = select_layers(model, config.pattern).linears
    unknown = sorted(masks.keys() - {f"{name}.weight" for name in linears})
    if unknown:
        raise LearnerError(f"initial mask: {unknown[0]}: the model has no such prunable layer")
    learning = {name: linear for name, linear in linears.items() if f"{name}.weight" in masks}
    masks = PackedMasks((name, world.from_first(mask)) for name, mask in masks.items())
    scale = config.settings().initial_logit
    resumed = world.largest(int(checkpoint is not None and world.is_first and checkpoint.exists())) > 0
    if config.start == "margin" and not resumed:  # a checkpoint brings its logits
        logits = margin_logits(model, tokens, masks, config.pattern, scale, batch=config.batch)
    else:
        logits = constant_logits(masks, scale)
    with (
        repeatable(model.device),
        masked(learning, masks, config.pattern, logits=logits, seed=config.seed) as policy,
    ):
        run = _Run(model, tokens, policy, config, world)
        if checkpoint is not None and resumed and world.is_first:
            run.resume(checkpoint)
        run.begin()
        run_steps(
            run, config.steps, on_step=on_step, checkpoint=checkpoint, checkpoint_seconds=checkpoint_seconds, stop=stop
        )
        world.largest(0)  # a launcher ends the first process, which writes, soon after another one has left
        return policy.masks()


class _Run:
    """The state of a run: steps done, the logits (in the policy), the tracker, and the initial mask's losses."""

    def __init__(
        self, model: PreTrainedModel, tokens: Tensor, policy: MaskedModel, config: LearnConfig, world: World
    ) -> None:
        self.done = 0
        self._model, self._tokens, self._policy, self._config, self._world = model, tokens, policy, config, world
        settings = config.settings()
        self._estimator: Estimator = make_estimator(
            config.estimator, settings.learning_rate, config.smoothing, settings.draws
        )
        # The weights are frozen, so one pass over the text gives f_0 of every minibatch there will be.
        count, predicted = len(tokens), tokens.shape[1] - 1
        losses = (summed_loss(model, tokens[i : i + 1, :-1], tokens[i : i + 1, 1:]) for i in world.share(count))
        self._initial = torch.tensor(world.gathered([loss / predicted for loss in losses], count), dtype=torch.float64)
        self._check(float(self._initial.sum()))

    def begin(self) -> None:
        """Makes every process's state the first one's, and draws the first mask."""
        self.done = self._world.largest(self.done)  # 0 everywhere but on the first, which may have resumed
        state = self._world.from_first(torch.tensor(self._estimator.tracker, dtype=torch.float64))
        self._estimator.tracker = float(state)
        for logits in self._policy.logits.values():
            self._world.from_first(logits)
        self._policy.step([], self._draw(0))

    def advance(self) -> Step:
        """Tries the masks of this step on its minibatch and updates the logits."""
        begin = time.monotonic()
        chosen = self._minibatch()
        count = self._estimator.masks_per_batch
        losses, flips = [], 0
        for k in range(count):
            if k > 0:
                self._policy.step([], self._draw(k))
            losses.append(self._loss(self._tokens[chosen], backward=self._estimator.group_draws > 0))
            flips += self._policy.flips()
        initial = float(self._initial[chosen].mean())
        coefficients = self._estimator.coefficients(losses, initial)
        scored = count if self._estimator.group_draws else 0  # the draws after those tried, or those
        updates = [(coefficient, self._draw(scored + k)) for k, coefficient in enumerate(coefficients)]
        gains = self._policy.gains(self._world) if self._estimator.group_draws else None
        self.done += 1
        self._policy.step(updates, self._draw(0), gains)
        loss = sum(losses) / count
        seconds = time.monotonic() - begin
        return Step(self.done, loss, loss - initial, self._estimator.tracker, seconds, flips / count)

    def _draw(self, k: int) -> int:
        """The number of mask k of the step that is next."""
        return self.done * (self._estimator.masks_per_batch + self._estimator.group_draws) + k

    def _minibatch(self) -> Tensor:
        """Indices of different blocks, drawn anew for every step; all blocks where there are no more."""
        generator = torch.Generator().manual_seed(self._config.seed * 1_000_003 + self.done)
        return torch.randperm(len(self._tokens), generator=generator)[: self._config.minibatch]

    def _loss(self, blocks: Tensor, *, backward: bool = False) -> float:
        """Mean loss per token; backward also leaves this process's part of its gradient in the learning weights.

        Blocks are summed exactly, so that it does not matter which process had which.
        """
        predicted = blocks.shape[0] * (blocks.shape[1] - 1)
        places = self._world.share(len(blocks))
        own: list[float] = []
        for part in blocks[places.start : places.stop].split(self._config.batch):
            if backward:
                losses = self._policy.backward(self._model, part)
            else:
                with torch.inference_mode():
                    losses = token_losses(self._model, part)
            own += losses.double().sum(1).tolist()
        return self._check(math.fsum(self._world.gathered(own, len(blocks))) / predicted)

    def _check(self, loss: float) -> float:
        if not math.isfinite(loss):
            raise LearnerError(f"step {self.done + 1}: the loss is {loss}: lower --learning-rate, or --dtype float32")
        return loss

    def save(self, path: Path) -> None:
        """Writes the checkpoint, in the first process.

        Raises:
            OSError: it cannot be; the last one is intact.
        """
        if self._world.is_first:
            state = {"tracker": self._estimator.tracker.hex()}
            write_checkpoint(path, self._policy.logits, identity=self._identity(), done=self.done, state=state)

    def resume(self, path: Path) -> None:
        """Goes on where a checkpoint of this very run stopped.

        Raises:
            LearnerError: it is unreadable, or of another run.
        """
        with read_checkpoint(path, identity=self._identity()) as (done, state, tensor):
            for name, logits in self._policy.logits.items():
                logits.copy_(tensor(name))
            self.done = done
            self._estimator.tracker = float.fromhex(state["tracker"])

    def _identity(self) -> str:
        """Settings, shapes, text and initial losses: what two runs share if and only if one can go on as the other."""
        settings = asdict(self._config) | asdict(self._config.settings()) | {"pattern": str(self._config.pattern)}
        settings.pop("steps")  # a longer run may go on from a shorter one
        shapes = {name: list(logits.shape) for name, logits in self._policy.logits.items()}
        text = [digest(self._tokens), list(self._tokens.shape), DRAW_VERSION]
        losses = [loss.hex() for loss in self._initial.tolist()]
        return json.dumps([settings, shapes, text, losses], sort_keys=True)
