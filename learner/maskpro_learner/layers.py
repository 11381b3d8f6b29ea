"""Which linear layers of a causal language model get masks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from maskpro_kernels import NMPattern
from maskpro_kernels.servable import fused_with, text_model_type, why_dense
from maskpro_learner.errors import ModelError


@dataclass(frozen=True)
class Block:
    """One decoder block: its module and its prunable linears by full module name, in the order the model lists them."""

    name: str
    module: nn.Module
    linears: dict[str, nn.Linear]


@dataclass(frozen=True)
class PrunableLayers:
    """The decoder blocks in forward order, and the linears in them that stay dense, each with the reason."""

    blocks: list[Block]
    dense: dict[str, str]

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """Every prunable linear by full module name, in forward order of the blocks."""
        return {name: linear for block in self.blocks for name, linear in block.linears.items()}


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Finds the list of decoder blocks: the outermost ModuleList whose linears hold the most weights.

    Works for any architecture that stacks its blocks in one ModuleList, without a table of their names.

    Raises:
        ModelError: no ModuleList holds an nn.Linear.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            size = sum(linear.weight.numel() for linear in module.modules() if isinstance(linear, nn.Linear))
            if size and (best is None or size > best[0]):  # an outer list comes first and holds its inner ones
                best = (size, name, module)
    if best is None:
        raise ModelError(f"{type(model).__name__}: expected decoder blocks with nn.Linear layers, found none")
    return best[1], best[2]


def select_layers(
    model: nn.Module, pattern: NMPattern, *, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> PrunableLayers:
    """Selects the linears of the decoder blocks that can be served sparse; embeddings and the output head are outside.

    Args:
        model: a Hugging Face causal language model.
        pattern: a layer whose in_features m does not divide stays dense.
        include: globs of module names (``model.layers.0.mlp.*``); a layer must match one.
        exclude: globs; a layer must match none.

    Raises:
        ModelError: no layer is left.
    """
    prefix, modules = decoder_blocks(model)
    model_type = text_model_type(model.config.to_dict()) if isinstance(model, PreTrainedModel) else ""
    blocks, dense = [], {}
    for index, module in enumerate(modules):
        linears = {}
        for name, linear in module.named_modules(prefix=f"{prefix}.{index}"):
            if not isinstance(linear, nn.Linear):
                continue
            if not any(fnmatchcase(name, glob) for glob in include):
                dense[name] = "not included"
            elif any(fnmatchcase(name, glob) for glob in exclude):
                dense[name] = "excluded"
            elif (reason := why_dense(name, linear.out_features, model_type)) is not None:
                dense[name] = reason
            elif not pattern.divides(linear.in_features):
                dense[name] = f"{pattern.m} does not divide in_features = {linear.in_features}"
            else:
                linears[name] = linear
        for name in list(linears):
            if left := [other for other in fused_with(name) if other in dense]:
                dense[name] = f"vLLM fuses it with {left[0].rpartition('.')[2]}, which stays dense"
                del linears[name]
        dense |= _experts(module, f"{prefix}.{index}")
        blocks.append(Block(f"{prefix}.{index}", module, linears))
    if not any(block.linears for block in blocks):
        raise ModelError(
            f"{type(model).__name__}: no linear layer is left to prune to {pattern} ({len(dense)} stay dense)"
        )
    return PrunableLayers(blocks, dense)


def _experts(block: nn.Module, prefix: str) -> dict[str, str]:
    """The weights of a mixture's experts, all of a kind in one tensor, with the reason why they are dense."""
    return {
        f"{name}.{own}": "experts, which no kernel is for"
        for name, module in block.named_modules(prefix=prefix)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and not isinstance(module, nn.Conv1d)
    }


@contextmanager
def weights_restored(linears: Iterable[nn.Linear]) -> Iterator[None]:
    """Gives the linears their weights back at the end, whatever they were set to. They are kept, not copied:
    inside, replace ``weight.data`` and do not write into it."""
    kept = [(linear, linear.weight.data) for linear in linears]
    try:
        yield
    finally:
        for linear, weight in kept:
            linear.weight.data = weight


@torch.no_grad()
def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zeroes the weights a mask does not keep, in place.

    Args:
        model: the model.
        masks: parameter name (``model.layers.0.mlp.up_proj.weight``) to boolean (out_features, in_features).

    Raises:
        ModelError: the model has no such parameter, or its shape is another; names both.
    """
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.shape != mask.shape:
            found = "none" if parameter is None else str(tuple(parameter.shape))
            raise ModelError(
                f"mask of {name}: expected a weight of shape {tuple(mask.shape)} in the model, found {found}"
            )
    for name, mask in masks.items():
        parameters[name].masked_fill_(~mask.to(parameters[name].device), 0)
