"""Wins back what pruning lost: W' = m * (W + B A), of low rank, merged into the kept weights at no cost at inference.

Two stages. :func:`reconstruct` goes block by block: it fits every layer's update to the layer's dense output, then
trains those of the block together so that the block, given what the recovered blocks before it make of the text,
puts out what the dense model has there. :func:`distill` then trains all updates together towards the dense model's
predictions, the Kullback-Leibler divergence for every token: of calibration text a dense model says much more than
the text's next tokens do.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from maskpro_kernels import NMPattern
from maskpro_kernels.bits import pack_bits
from maskpro_kernels.recovery import LowRank
from maskpro_learner.checkpointed import digest, read_checkpoint, run_steps, write_checkpoint
from maskpro_learner.config import check_seed
from maskpro_learner.divergence import divergence
from maskpro_learner.errors import LearnerError
from maskpro_learner.layers import select_layers
from maskpro_learner.refit import damped, low_rank_refit, root_mean_square
from maskpro_learner.repeatable import repeatable
from maskpro_learner.sequential import BlockRunner

_WARMUP = 0.05
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class RecoverConfig:
    """What :func:`reconstruct` and :func:`distill` do.

    Attributes:
        rank: of every update.
        block_steps: of Adam on each block; 0 leaves it at the layers' own fits.
        block_learning_rate: of those, relative to each factor's root mean square at the start, as the next.
        steps: of distillation; 0 leaves it out.
        learning_rate: of Adam in distillation; it warms up for 5% of the steps and falls to 0 along a cosine.
        minibatch: blocks of text in a step.
        batch: blocks of text run through the models at once: of a minibatch, memory only; of the block fit, a step of
            Adam (there the largest divisor of the samples up to it).
        seed: of the order of the text.
    """

    rank: int = 32
    block_steps: int = 64
    block_learning_rate: float = 0.05
    steps: int = 300
    learning_rate: float = 0.02
    minibatch: int = 8
    batch: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("block_steps", 0), ("steps", 0), ("minibatch", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise LearnerError(f"recovery: {name}: expected at least {least}, found {getattr(self, name)}")
        check_seed(self.seed)
        for name in ("block_learning_rate", "learning_rate"):
            if not getattr(self, name) > 0:
                raise LearnerError(f"recovery: {name}: expected above 0, found {getattr(self, name)}")


@dataclass(frozen=True)
class BlockFit:
    """One block: its number from 0, the relative squared error of its output before and after training."""

    block: int
    before: float
    after: float


@dataclass(frozen=True)
class DistillStep:
    """One step: its number from 1, the divergence from the dense model in nats per token, seconds."""

    step: int
    divergence: float
    seconds: float


def relative_adam(factors: Iterable[nn.Parameter]) -> torch.optim.Adam:
    """Adam whose learning rate is relative to each factor's root mean square at the start."""
    groups = [{"params": [factor], "size": root_mean_square(factor)} for factor in factors]
    return torch.optim.Adam(groups, betas=(0.9, 0.98))


def set_learning_rate(adam: torch.optim.Adam, peak: float, done: int, steps: int) -> None:
    """For the step after ``done``: a linear warm-up, then a cosine that would reach 0 after the last step."""
    position = (done + 1) / (steps + 1)
    warm = (
        position / _WARMUP
        if position < _WARMUP
        else 0.5 * (1 + math.cos(math.pi * (position - _WARMUP) / (1 - _WARMUP)))
    )
    for group in adam.param_groups:
        group["lr"] = peak * warm * group["size"]


def learning_linears(model: PreTrainedModel, masks: Mapping[str, Tensor], pattern: NMPattern) -> dict[str, nn.Linear]:
    """The linears that the masks name, by weight name, in forward order.

    Raises:
        LearnerError: a mask is for no prunable layer of the model, or of another shape.
    """
    linears = {f"{name}.weight": linear for name, linear in select_layers(model, pattern).linears.items()}
    for name, mask in masks.items():
        shape = tuple(linears[name].weight.shape) if name in linears else None
        if shape != tuple(mask.shape):
            raise LearnerError(f"recovery: {name}: expected a mask of shape {shape}, found {tuple(mask.shape)}")
    return {name: linear for name, linear in linears.items() if name in masks}


def reconstruct(
    model: PreTrainedModel,
    tokens: Tensor,
    masks: Mapping[str, Tensor],
    pattern: NMPattern,
    config: RecoverConfig,
    *,
    on_block: Callable[[BlockFit], None] = lambda fit: None,
) -> dict[str, LowRank]:
    """Fits updates block by block; the inputs of a block come from the recovered blocks before it.

    Args:
        model: the dense model; its weights are as before at the end.
        tokens: int64 (samples, length), calibration text.
        masks: weight name to boolean mask.
        pattern: the masks' pattern.
        config: the settings; ``block_steps`` and ``batch`` among them.
        on_block: called after every block.

    Returns:
        Weight name to update.

    Raises:
        LearnerError: masks of other layers, or a fit whose error is not finite.

    Cost: per layer, 80 products of (out, in) with (in, in), and five eigendecompositions of the smaller side; per
        block, ``block_steps`` forward and backward passes over ``batch`` blocks of text.
    """
    layers = select_layers(model, pattern)
    known = learning_linears(model, masks, pattern)
    dense = BlockRunner(model, layers.blocks, tokens, batch=config.batch)
    runner = BlockRunner(model, layers.blocks, tokens, batch=config.batch)
    updates: dict[str, LowRank] = {}
    for index, block in enumerate(layers.blocks):
        linears = {f"{name}.weight": linear for name, linear in block.linears.items() if f"{name}.weight" in known}
        statistics = runner.statistics(index, with_gram=True)
        dense.advance(index)
        found = {}
        for name, linear in linears.items():
            gram = statistics[name.removesuffix(".weight")].gram
            assert gram is not None
            mask = masks[name].to(gram.device)
            found[name] = low_rank_refit(linear.weight.float(), damped(gram), mask, config.rank)
        with _parametrized(linears, masks, found) as modules:
            fit = _train_block(index, runner, dense.hidden, modules, config)
            runner.advance(index)
        updates |= {name: module.update() for name, module in modules.items()}
        on_block(fit)
    return updates


def _train_block(
    index: int, runner: BlockRunner, targets: list[Tensor], modules: dict[str, _Recovered], config: RecoverConfig
) -> BlockFit:
    """Trains one block's updates on the mean squared difference from the dense model's hidden states."""
    before = _relative_error(index, runner, targets)
    if not math.isfinite(before):
        raise LearnerError(f"block {index}: the error before its fit is {before}: expected finite weights")
    factors = [factor for module in modules.values() for factor in module.parameters()]
    if not factors or not config.block_steps:  # no factors: the masks leave this block dense
        return BlockFit(index, before, before)
    adam = relative_adam(factors)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
    order: list[int] = []
    for step in range(config.block_steps):
        if not order:
            order = torch.randperm(len(targets), generator=generator).tolist()
        position = order.pop()
        set_learning_rate(adam, config.block_learning_rate, step, config.block_steps)
        adam.zero_grad()
        with torch.enable_grad():
            difference = runner.call(index, runner.hidden[position]) - targets[position]
            (difference.square().sum() / targets[position].square().sum()).backward()
        adam.step()
    after = _relative_error(index, runner, targets)
    if not math.isfinite(after):
        raise LearnerError(f"block {index}: the error of its fit is {after}: lower --block-learning-rate")
    return BlockFit(index, before, after)


@torch.no_grad()
def _relative_error(index: int, runner: BlockRunner, targets: list[Tensor]) -> float:
    pairs = [
        ((runner.call(index, x) - y).square().sum(), y.square().sum())
        for x, y in zip(runner.hidden, targets, strict=True)
    ]
    return float(sum(error for error, _ in pairs) / sum(size for _, size in pairs))


class _Recovered(nn.Module):
    """Parametrization of a weight: the dense one plus the update, where the mask keeps it."""

    def __init__(self, mask: Tensor, update: LowRank) -> None:
        super().__init__()
        self.mask = mask
        self.b = nn.Parameter(update.b.to(mask.device, memory_format=torch.contiguous_format, copy=True))
        self.a = nn.Parameter(update.a.to(mask.device, memory_format=torch.contiguous_format, copy=True))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.where(self.mask, weight + (self.b @ self.a).to(weight.dtype), 0)

    def update(self) -> LowRank:
        """The factors as they are now, on the CPU."""
        return LowRank(self.b.detach().cpu().clone(), self.a.detach().cpu().clone())


@contextmanager
def _parametrized(
    linears: Mapping[str, nn.Linear], masks: Mapping[str, Tensor], updates: Mapping[str, LowRank]
) -> Iterator[dict[str, _Recovered]]:
    """The linears compute with their recovered weights while inside; no forward is replaced."""
    made: dict[str, _Recovered] = {}
    try:
        for name, linear in linears.items():
            made[name] = _Recovered(masks[name].to(linear.weight.device), updates[name])
            parametrize.register_parametrization(linear, "weight", made[name], unsafe=True)
        yield made
    finally:
        for name in made:
            parametrize.remove_parametrizations(linears[name], "weight", leave_parametrized=False)


def distill(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokens: Tensor,
    masks: Mapping[str, Tensor],
    pattern: NMPattern,
    updates: Mapping[str, LowRank] | None,
    config: RecoverConfig,
    *,
    origin: str = "",
    on_step: Callable[[DistillStep], None] = lambda step: None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 600.0,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, LowRank]:
    """Trains the updates so that the pruned model predicts what the dense one does.

    Args:
        model: holds the dense weights, float32, or bfloat16 if it is to compute in that (the factors stay float32);
            they are as before at the end.
        teacher: the dense model, another instance.
        tokens: int64 (samples, length), text; every position of it counts.
        masks: weight name to boolean mask.
        pattern: the masks' pattern.
        updates: weight name to update, where training starts; None if the checkpoint is there, which has them.
        config: the settings.
        origin: what the start depends on; a checkpoint of another origin is of another run.
        on_step: called after every step.
        checkpoint: file to write at once, now and then and at the end, and to go on from if it exists. The caller
            removes it once the updates are safe.
        checkpoint_seconds: time between two writes.
        stop: asked before every step; True writes the checkpoint and ends early.

    Returns:
        Weight name to update.

    Raises:
        LearnerError: masks or updates of other layers, a loss that is not finite, or a checkpoint of another run.
        OSError: the checkpoint cannot be written; the last one is intact.
    """
    linears = learning_linears(model, masks, pattern)
    content = digest(tokens, *(pack_bits(masks[name]) for name in linears))
    identity = json.dumps([asdict(config), origin, content, list(tokens.shape)], sort_keys=True)
    resumed = None
    if checkpoint is not None and checkpoint.exists():
        resumed = _State.read(checkpoint, identity, linears)
        updates = resumed.updates
    updates = updates or {}
    if missing := sorted(linears.keys() - updates.keys()):
        raise LearnerError(f"recovery: {missing[0]}: no update to start from")
    with repeatable(model.device), _parametrized(linears, masks, updates) as recovered:
        run = _Distillation(model, teacher, tokens, recovered, config, identity, resumed)
        if checkpoint is not None and resumed is None:
            run.save(checkpoint)  # the updates it starts from may have taken long
        resumed = None
        run_steps(
            run, config.steps, on_step=on_step, checkpoint=checkpoint, checkpoint_seconds=checkpoint_seconds, stop=stop
        )
        return {name: module.update() for name, module in recovered.items()}


@dataclass(frozen=True)
class _State:
    """What a checkpoint holds: steps done, the factors, what their learning rates are relative to, Adam's moments."""

    done: int
    updates: dict[str, LowRank]
    sizes: dict[str, float]
    moments: dict[str, dict[str, Tensor]]

    @classmethod
    def read(cls, path: Path, identity: str, names: Iterable[str]) -> _State:
        """A checkpoint of the run of that identity.

        Raises:
            LearnerError: it is unreadable, or of another run.
        """
        with read_checkpoint(path, identity=identity) as (done, state, tensor):
            updates = {name: LowRank(tensor(f"{name}.b"), tensor(f"{name}.a")) for name in names}
            factors = [f"{name}.{which}" for name in updates for which in ("b", "a")]
            moments = {
                factor: {moment: tensor(f"{factor}.{moment}") for moment in _MOMENTS} for factor in factors if done
            }
            sizes = {factor: float.fromhex(state[f"{factor}.size"]) for factor in factors}
        return cls(done, updates, sizes, moments)


class _Distillation:
    """A run of distillation.

    Args:
        model: computes with the recovered weights.
        teacher: the dense model.
        tokens: the text.
        recovered: weight name to its parametrization; their factors are trained.
        config: the settings.
        identity: of the run, for its checkpoints.
        resumed: the state to go on from; the factors are its already.
    """

    def __init__(
        self, model: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor, recovered: dict[str, _Recovered],
        config: RecoverConfig, identity: str, resumed: _State | None,
    ) -> None:  # fmt: skip
        self.done = 0
        self._model, self._teacher, self._tokens, self._config = model, teacher, tokens, config
        self._identity = identity
        self._factors = {
            f"{name}.{which}": factor
            for name, module in recovered.items()
            for which, factor in module.named_parameters()
        }
        self._adam = relative_adam(self._factors.values())
        if resumed is not None:
            self.done = resumed.done
            for group, (name, factor) in zip(self._adam.param_groups, self._factors.items(), strict=True):
                group["size"] = resumed.sizes[name]
                if self.done:
                    moments = {moment: value.to(factor.device) for moment, value in resumed.moments[name].items()}
                    self._adam.state[factor] = {"step": torch.tensor(float(self.done)), **moments}

    def advance(self) -> DistillStep:
        """One minibatch."""
        begin = time.monotonic()
        set_learning_rate(self._adam, self._config.learning_rate, self.done, self._config.steps)
        blocks = self._tokens[self._minibatch()]
        self._adam.zero_grad()
        total = 0.0
        for part in blocks.split(self._config.batch):
            ids = part.to(self._model.device)
            with torch.no_grad():
                target = self._teacher(input_ids=ids, use_cache=False).logits
            loss = divergence(self._model(input_ids=ids, use_cache=False).logits, target) / blocks.numel()
            loss.backward()
            total += float(loss.detach())
        if not math.isfinite(total):
            raise LearnerError(f"step {self.done + 1}: the divergence is {total}: lower --learning-rate")
        self._adam.step()
        self.done += 1
        return DistillStep(self.done, total, time.monotonic() - begin)

    def _minibatch(self) -> Tensor:
        """Indices of blocks: epochs, each in an order of its own."""
        size, count = self._config.minibatch, len(self._tokens)
        wanted = range(self.done * size, (self.done + 1) * size)
        orders = {epoch: self._order(epoch) for epoch in {position // count for position in wanted}}
        return torch.stack([orders[position // count][position % count] for position in wanted])

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._config.seed * 1_000_003 + epoch)
        return torch.randperm(len(self._tokens), generator=generator)

    def save(self, path: Path) -> None:
        """Writes the checkpoint.

        Raises:
            OSError: it cannot be written; the last one is intact.
        """
        tensors = {name: factor.detach() for name, factor in self._factors.items()}
        for name, factor in self._factors.items():
            if moments := self._adam.state[factor]:
                tensors |= {f"{name}.{moment}": moments[moment] for moment in _MOMENTS}
        sizes = {
            f"{name}.size": group["size"].hex()
            for name, group in zip(self._factors, self._adam.param_groups, strict=True)
        }
        write_checkpoint(path, tensors, identity=self._identity, done=self.done, state=sizes)
