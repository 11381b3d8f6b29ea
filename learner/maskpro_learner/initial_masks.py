"""One-shot masks: magnitude, Wanda (arXiv:2306.11695), SparseGPT (arXiv:2301.00774), swap search, random.

They are where learning starts, and masks of their own right. N means kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from maskpro_kernels import NMPattern
from maskpro_kernels.packing import magnitude_mask, top_n_mask
from maskpro_learner.layers import select_layers
from maskpro_learner.mask_search import swap_search
from maskpro_learner.packed_masks import PackedMasks
from maskpro_learner.sequential import BlockRunner, InputStatistics
from maskpro_learner.sparsegpt import sparsegpt

Method = Literal["magnitude", "wanda", "sparsegpt", "swap", "random"]
METHODS: tuple[Method, ...] = get_args(Method)
CALIBRATED_METHODS: tuple[Method, ...] = ("wanda", "sparsegpt", "swap")
_GRAM_METHODS: tuple[Method, ...] = ("sparsegpt", "swap")


def wanda_mask(weight: Tensor, square_sum: Tensor, pattern: NMPattern) -> Tensor:
    """Keeps the n largest ``|w_ij| * ||x_j||_2`` of every group of a row (Wanda, equation 1).

    Args:
        weight: (out_features, in_features).
        square_sum: (in_features,), the sum of x_j^2 over the calibration tokens.
        pattern: the pattern; ties go to the lower column.
    """
    return top_n_mask(weight.abs().double() * square_sum.double().sqrt(), pattern)


def random_mask(shape: tuple[int, int], pattern: NMPattern, generator: torch.Generator) -> Tensor:
    """A mask drawn uniformly from all strict ones: boolean ``shape``, on the CPU."""
    return top_n_mask(torch.rand(shape, generator=generator, dtype=torch.float64), pattern)


@dataclass(frozen=True)
class InitialMasks:
    """Masks by parameter name, in forward order, and the layers that stay dense with the reason."""

    masks: PackedMasks
    dense: dict[str, str]


@torch.no_grad()
def initial_masks(
    model: PreTrainedModel,
    pattern: NMPattern,
    method: Method,
    *,
    tokens: Tensor | None = None,
    seed: int = 0,
    refit: bool = False,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    batch: int = 4,
    advance: Callable[[int], None] = lambda count: None,
) -> InitialMasks:
    """Makes a mask for every prunable layer, and applies it to the model in place.

    Wanda, SparseGPT and swap go block by block: the inputs of a block come from the blocks before it, already pruned.

    Args:
        model: changed in place: dropped weights become zero.
        pattern: the pattern.
        method: magnitude, wanda, sparsegpt, swap (Wanda, then swap_search) or random.
        tokens: int64 (samples, length) calibration tokens, for wanda, sparsegpt and swap.
        seed: of the random masks.
        refit: sparsegpt only: also replace the kept weights by the refit ones. Without it the kept weights stay bit
            for bit as they were, and later blocks see *that* model, the one a mask file describes.
        include: globs of module names to prune.
        exclude: globs of module names to leave dense.
        batch: calibration samples run at once.
        advance: called with the number of linears done.

    Raises:
        ValueError: the method is unknown, misses its tokens, or cannot refit.
        ModelError: nothing to prune.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: expected one of {', '.join(METHODS)}")
    if refit and method != "sparsegpt":
        raise ValueError(f"refit: only sparsegpt refits the kept weights, found {method}")
    layers = select_layers(model, pattern, include=include, exclude=exclude)
    needs_inputs = method in CALIBRATED_METHODS
    if needs_inputs and tokens is None:
        raise ValueError(f"{method} needs calibration tokens")
    runner = BlockRunner(model, layers.blocks, tokens, batch=batch) if needs_inputs and tokens is not None else None
    generator = torch.Generator().manual_seed(seed)
    masks = PackedMasks()
    for index, block in enumerate(layers.blocks):
        statistics = runner.statistics(index, with_gram=method in _GRAM_METHODS) if runner else {}
        for name, linear in block.linears.items():
            masks[f"{name}.weight"] = _prune(linear, statistics.get(name), pattern, method, refit, generator)
            advance(1)
        if runner:
            runner.advance(index)
    return InitialMasks(masks, layers.dense)


def _prune(
    linear: nn.Linear,
    statistics: InputStatistics | None,
    pattern: NMPattern,
    method: Method,
    refit: bool,
    generator: torch.Generator,
) -> Tensor:
    weight = linear.weight
    match method:
        case "magnitude":
            mask = magnitude_mask(weight, pattern)
        case "random":
            mask = random_mask((linear.out_features, linear.in_features), pattern, generator).to(weight.device)
        case "wanda":
            assert statistics is not None
            mask = wanda_mask(weight, statistics.square_sum, pattern)
        case "sparsegpt":
            assert statistics is not None
            assert statistics.gram is not None
            result = sparsegpt(weight, statistics.gram, pattern)
            mask = result.mask
            if refit:
                weight.copy_(result.refit)
        case "swap":
            assert statistics is not None
            assert statistics.gram is not None
            start = wanda_mask(weight, statistics.square_sum, pattern)
            mask = swap_search(weight, statistics.gram, start, pattern)
        case _:
            assert_never(method)
    weight.masked_fill_(~mask, 0)
    return mask
