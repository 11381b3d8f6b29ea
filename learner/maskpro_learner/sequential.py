"""Runs a model block by block over calibration tokens, so that every block meets inputs from pruned ones.

Only one block's statistics are alive at a time. Nothing of the model is copied or replaced: the inputs of the
first block are taken with a forward hook, and from there each block is called as the model calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from maskpro_learner.errors import ModelError
from maskpro_learner.layers import Block


class InputStatistics:
    """Sums over the inputs x (tokens, in_features) of one linear layer.

    Attributes:
        square_sum: float64 (in_features,), sum of x^2: all that Wanda needs.
        gram: float32 (in_features, in_features), sum of x^T x, or None where it is not asked for.
        tokens: rows seen.
    """

    def __init__(self, linear: nn.Linear, *, with_gram: bool) -> None:
        size, device = linear.in_features, linear.weight.device
        self.square_sum = torch.zeros(size, dtype=torch.float64, device=device)
        self.gram = torch.zeros((size, size), dtype=torch.float32, device=device) if with_gram else None
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Adds (..., in_features) inputs."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.square_sum += rows.square().sum(0, dtype=torch.float64)
        if self.gram is not None:
            self.gram.addmm_(rows.T, rows)
        self.tokens += len(rows)


class _Collector:
    """Hooks of one block's linears. Linears that get the very same tensor (q, k, v) share one statistic."""

    def __init__(self, block: Block, *, with_gram: bool) -> None:
        self.statistics: dict[str, InputStatistics] = {}
        self._with_gram = with_gram
        self._last: tuple[Tensor, InputStatistics] | None = None
        self._handles = [linear.register_forward_pre_hook(self._hook(name)) for name, linear in block.linears.items()]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            assert isinstance(module, nn.Linear)
            x = inputs[0]
            if self._last is not None and self._last[0] is x:
                self.statistics.setdefault(name, self._last[1])
                if self.statistics[name] is self._last[1]:
                    return  # already counted
            statistics = self.statistics.get(name)
            if statistics is None:
                statistics = self.statistics[name] = InputStatistics(module, with_gram=self._with_gram)
            statistics.add(x)
            self._last = (x, statistics)

        return hook

    def close(self) -> None:
        self._last = None
        for handle in self._handles:
            handle.remove()


class _Stop(Exception):  # noqa: N818  (no an error: ends a forward pass whose rest is not needed)
    pass


Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with besides its hidden states."""


class BlockRunner:
    """Holds the hidden states between two blocks, batch by batch.

    Args:
        model: a Hugging Face causal language model.
        blocks: its decoder blocks in forward order.
        tokens: int64 (samples, length).
        batch: the most samples run at once; the largest divisor of ``samples`` up to it is used, so that every
            batch has the same shape and one set of masks and positions fits all.

    Raises:
        ModelError: the blocks are called with more that depends on the text (Gemma 3n's embeddings of every layer), or
            with what they hand on to each other (its keys and values).

    Cost: hidden states of samples * length * hidden_size, in the model's dtype, stay in memory.
    """

    def __init__(self, model: PreTrainedModel, blocks: list[Block], tokens: Tensor, *, batch: int = 4) -> None:
        size = max(divisor for divisor in range(1, min(batch, len(tokens)) + 1) if len(tokens) % divisor == 0)
        batches = torch.split(tokens.to(model.device), size)
        self._blocks = blocks
        self._calls = self._capture_calls(model, batches[0])
        if len(batches) > 1:
            _check_same(model, self._calls, self._capture_calls(model, batches[-1]))
        self.hidden = [self._first_input(model, part) for part in batches]

    @torch.no_grad()
    def _capture_calls(self, model: PreTrainedModel, tokens: Tensor) -> list[Call]:
        """One forward pass that notes the arguments of every block: masks differ between blocks in some models."""
        calls: dict[nn.Module, Call] = {}

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            calls[module] = (args[1:], rest)

        with _hooked([block.module for block in self._blocks], note):
            model.base_model(input_ids=tokens, use_cache=False)
        return [calls[block.module] for block in self._blocks]

    @torch.no_grad()
    def _first_input(self, model: PreTrainedModel, tokens: Tensor) -> Tensor:
        found: list[Tensor] = []

        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _Stop

        with _hooked([self._blocks[0].module], take), suppress(_Stop):
            model.base_model(input_ids=tokens, use_cache=False)
        return found[0]

    @torch.no_grad()
    def statistics(self, index: int, *, with_gram: bool) -> Mapping[str, InputStatistics]:
        """Input statistics of every prunable linear of one block, from the hidden states that reach it."""
        collector = _Collector(self._blocks[index], with_gram=with_gram)
        try:
            for hidden in self.hidden:
                self.call(index, hidden)
        finally:
            collector.close()
        return collector.statistics

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Runs one block, with whatever weights it has now, over all hidden states."""
        for position, hidden in enumerate(self.hidden):
            self.hidden[position] = self.call(index, hidden)

    def call(self, index: int, hidden: Tensor) -> Tensor:
        """One block's output, as the model would call it."""
        args, kwargs = self._calls[index]
        output = self._blocks[index].module(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output


def _check_same(model: PreTrainedModel, calls: list[Call], others: list[Call]) -> None:
    """Whether blocks are called alike for two batches of text."""
    for call, other in zip(calls, others, strict=True):
        mine, theirs = _leaves(call), _leaves(other)
        if len(mine) != len(theirs) or not all(map(_same, mine, theirs)):
            raise ModelError(
                f"{type(model).__name__}: expected blocks that are called with hidden states, masks and positions, "
                "found more that depends on the text: they cannot be run one by one"
            )


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for each in value for leaf in _leaves(each)]
    if isinstance(value, dict):
        return [leaf for key in value for leaf in _leaves(value[key])]
    return [value]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    return True  # settings, or an object that only says where a mask is


@contextmanager
def _hooked(modules: list[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
