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
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from maskpro_kernels import NMPattern
from maskpro_kernels.files import write_atomically
from maskpro_kernels.recovery import LowRank
from maskpro_learner.errors import LearnerError
from maskpro_learner.layers import select_layers, weights_restored
from maskpro_learner.refit import damped, low_rank_refit, root_mean_square
from maskpro_learner.sequential import BlockRunner

_CHECKPOINT_VERSION = "1"
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
        batch: of those, how many run through the models at once; memory only.
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
    """For the step after ``done``: a linear warm-up, then a cosine to 0."""
    position = (done + 1) / steps
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

    Cost: per layer, 80 products of (out, in) with (in, in), and five eigendecompositions of the smaller side; per
        block, ``block_steps`` forward and backward passes over ``batch`` blocks of text.
    """
    layers = select_layers(model, pattern)
    known = learning_linears(model, masks, pattern)
    dense = BlockRunner(model, layers.blocks, tokens, batch=config.batch)
    runner = BlockRunner(model, layers.blocks, tokens, batch=config.batch)
    updates: dict[str, LowRank] = {}
    with weights_restored(known.values()):
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
            for name, linear in linears.items():
                linear.weight.data = torch.where(masks[name].to(linear.weight.device), linear.weight, 0)
            on_block(fit)
    return updates


def _train_block(
    index: int, runner: BlockRunner, targets: list[Tensor], modules: dict[str, _Recovered], config: RecoverConfig
) -> BlockFit:
    """Trains one block's updates on the mean squared difference from the dense model's hidden states."""
    factors = [factor for module in modules.values() for factor in module.parameters()]
    adam = relative_adam(factors)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
    before = _relative_error(index, runner, targets)
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
    return BlockFit(index, before, _relative_error(index, runner, targets) if config.block_steps else before)


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
    updates: Mapping[str, LowRank],
    config: RecoverConfig,
    *,
    on_step: Callable[[DistillStep], None] = lambda step: None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 600.0,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, LowRank]:
    """Trains the updates so that the pruned model predicts what the dense one does.

    Args:
        model: holds the dense weights, float32; they are as before at the end.
        teacher: the dense model, another instance.
        tokens: int64 (samples, length), text; every position of it counts.
        masks: weight name to boolean mask.
        pattern: the masks' pattern.
        updates: weight name to update, where training starts.
        config: the settings.
        on_step: called after every step.
        checkpoint: file to write now and then, and to go on from if it exists; removed when training is over.
        checkpoint_seconds: time between two writes.
        stop: asked after every step; True writes the checkpoint and ends early.

    Returns:
        Weight name to update.

    Raises:
        LearnerError: masks or updates of other layers, a loss that is not finite, or a checkpoint of another run.
        OSError: the checkpoint cannot be written; the last one is intact.
    """
    linears = learning_linears(model, masks, pattern)
    if missing := sorted(linears.keys() - updates.keys()):
        raise LearnerError(f"recovery: {missing[0]}: no update to start from")
    with _parametrized(linears, masks, updates) as recovered:
        run = _Distillation(model, teacher, tokens, recovered, config)
        if checkpoint is not None and checkpoint.exists():
            run.resume(checkpoint)
        written = time.monotonic()
        while run.done < config.steps and not stop():
            on_step(run.advance())
            if checkpoint is not None and time.monotonic() - written >= checkpoint_seconds:
                run.save(checkpoint)
                written = time.monotonic()
        if checkpoint is not None:
            if run.done < config.steps:
                run.save(checkpoint)
            else:
                checkpoint.unlink(missing_ok=True)
        return {name: LowRank(module.b.detach().cpu(), module.a.detach().cpu()) for name, module in recovered.items()}


class _Distillation:
    """The state of a run: steps done, the factors, and Adam's moments of them."""

    def __init__(
        self, model: PreTrainedModel, teacher: PreTrainedModel, tokens: Tensor, recovered: dict[str, _Recovered],
        config: RecoverConfig,
    ) -> None:  # fmt: skip
        self.done = 0
        self._model, self._teacher, self._tokens, self._config = model, teacher, tokens, config
        self._factors = {
            f"{name}.{which}": factor
            for name, module in recovered.items()
            for which, factor in module.named_parameters()
        }
        self._adam = relative_adam(self._factors.values())
        self._first = [group["size"] for group in self._adam.param_groups]

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
                target = self._teacher(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            predicted = self._model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
            loss = nn.functional.kl_div(predicted, target, log_target=True, reduction="sum") / blocks.numel()
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
        """Writes the checkpoint: to a temporary name, synced, then renamed."""
        tensors = {name: factor.detach() for name, factor in self._factors.items()}
        for name, factor in self._factors.items():
            if state := self._adam.state[factor]:
                tensors |= {f"{name}.{moment}": state[moment] for moment in _MOMENTS}
        metadata = {"version": _CHECKPOINT_VERSION, "run": self._identity(), "done": str(self.done)}
        write_atomically(path, save(tensors, metadata))

    def resume(self, path: Path) -> None:
        """Goes on where a checkpoint of this very run stopped.

        Raises:
            LearnerError: it is unreadable, or of another run.
        """
        try:
            with safe_open(path, framework="pt", device=str(self._model.device)) as file:
                metadata: dict[str, str] = file.metadata() or {}
                if metadata.get("version") != _CHECKPOINT_VERSION or metadata.get("run") != self._identity():
                    raise LearnerError(f"{path}: a checkpoint of another run: remove it, or change --output")
                self.done = int(metadata["done"])
                for name, factor in self._factors.items():
                    factor.data.copy_(file.get_tensor(name))
                    if self.done:
                        state = {moment: file.get_tensor(f"{name}.{moment}") for moment in _MOMENTS}
                        self._adam.state[factor] = {"step": torch.tensor(float(self.done)), **state}
        except (SafetensorError, OSError, KeyError) as error:
            raise LearnerError(f"{path}: not a readable checkpoint: {error}") from error

    def _identity(self) -> str:
        """Settings, text and start: what two runs share if and only if one can go on as the other."""
        text = [int(self._tokens.sum()), list(self._tokens.shape)]
        return json.dumps([asdict(self._config), text, self._first], sort_keys=True)
