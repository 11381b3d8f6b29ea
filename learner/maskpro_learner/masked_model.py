"""A model whose linears compute with sampled masks: per weight, its dense value, its logit and its masked value.

The masked value lives where the model keeps its weight, so no forward pass is replaced. No mask is stored: a draw
is a function of its number (:mod:`maskpro_kernels.policy_step`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from maskpro_kernels import NMPattern
from maskpro_kernels.packing import top_n_mask
from maskpro_kernels.policy_step import policy_step
from maskpro_learner.distributed import ALONE, World
from maskpro_learner.errors import LearnerError
from maskpro_learner.packed_masks import PackedMasks


def token_losses(model: nn.Module, blocks: Tensor) -> Tensor:
    """Loss in nats of every token of ``blocks`` (blocks, length) but the first: float32 (blocks, length - 1)."""
    blocks = blocks.to(next(model.parameters()).device)
    logits = model(input_ids=blocks[:, :-1], use_cache=False).logits
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), blocks[:, 1:].flatten(), reduction="none")
    return losses.view(len(blocks), -1)


def constant_logits(masks: Mapping[str, Tensor], logit: float) -> dict[str, Tensor]:
    """The paper's pi_0: the same logit for all weights that the masks keep, 0 for the others."""
    return {name: mask.float().mul_(logit) for name, mask in masks.items()}


class MaskedModel:
    """Owns the weights of the linears until :meth:`restore`.

    Args:
        linears: prunable linears by module name, on any device; what belongs to a weight is on its device.
        masks: initial masks by parameter name (``<module>.weight``), strictly ``pattern``.
        pattern: the pattern.
        logits: initial logits by parameter name, float32; become this object's own, and are taken from the mapping.
        seed: of every draw.

    Memory: 4 bytes of logit and one more copy of the weight, per weight.
    """

    def __init__(
        self, linears: Mapping[str, nn.Linear], masks: Mapping[str, Tensor], pattern: NMPattern,
        *, logits: dict[str, Tensor], seed: int,
    ) -> None:  # fmt: skip
        if missing := [name for name in linears if f"{name}.weight" not in masks]:
            raise LearnerError(f"initial mask: none for {missing[0]}")
        self.pattern = pattern
        self.linears = dict(linears)
        self.dense = {name: linear.weight.data.contiguous() for name, linear in linears.items()}
        self.logits = {name: logits.pop(f"{name}.weight").to(weight.device) for name, weight in self.dense.items()}
        self._seed = seed
        self._flips: dict[torch.device, Tensor] = {}
        for name, linear in self.linears.items():
            mask = masks[f"{name}.weight"].to(linear.weight.device)
            linear.weight.data = torch.where(mask, self.dense[name], 0)

    @property
    def weights(self) -> int:
        """How many weights have a logit."""
        return sum(logits.numel() for logits in self.logits.values())

    def step(
        self, updates: Sequence[tuple[float, int]], next_draw: int, gains: Mapping[str, Tensor] | None = None
    ) -> None:
        """Updates the logits by draws of now, then gives every linear the mask of the next draw.

        Args:
            updates: (coefficient, draw), the draws made from the logits as they are.
            next_draw: the number of the mask to compute with.
            gains: by module name, what each weight is worth where it is kept: scores every group by itself.
        """
        self._flips = {
            device: torch.zeros(1, dtype=torch.int64, device=device)
            for device in {weight.device for weight in self.dense.values()}
        }
        for stream, (name, linear) in enumerate(self.linears.items()):
            policy_step(
                self.logits[name], self.pattern, seed=self._seed, stream=stream, updates=updates,
                gains=None if gains is None else gains[name],
                weight=self.dense[name], masked=linear.weight.data, next_draw=next_draw,
                flips=self._flips[linear.weight.device],
            )  # fmt: skip

    def flips(self) -> int:
        """Groups whose mask, of those the last step gave, is not a most likely one of theirs."""
        return sum(int(flips) for flips in self._flips.values())

    def backward(self, model: nn.Module, blocks: Tensor) -> Tensor:
        """Adds the gradient of a batch's loss to the masked weights.

        It is divided by the root of the tokens of a block: in float16, a mean's would vanish and a sum's overflow.

        Returns:
            :func:`token_losses` of the batch.
        """
        weights = [linear.weight for linear in self.linears.values()]
        for weight in weights:
            weight.requires_grad_(True)
        try:
            with torch.enable_grad():
                losses = token_losses(model, blocks)
                (losses.sum() / losses.shape[1] ** 0.5).backward()
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        return losses.detach()

    def gains(self, world: World = ALONE) -> dict[str, Tensor]:
        """-g w for every weight, from the gradients g that backward passes left everywhere, which are taken away.

        Each layer's are divided by their root mean square, so the loss's scale does not matter. The gradient with
        respect to a masked weight is there for dropped weights too: what it would have been worth to keep them.

        Raises:
            LearnerError: a gradient is not finite.
        """
        found = {}
        for name, linear in self.linears.items():
            assert linear.weight.grad is not None
            gradient = world.summed(linear.weight.grad.float())
            linear.weight.grad = None
            gain = gradient.mul_(self.dense[name])
            size = gain.norm()
            if not torch.isfinite(size):
                raise LearnerError(f"{name}.weight: expected a finite gradient, found none: try --dtype bfloat16")
            found[name] = gain.div_(-(size / gain.numel() ** 0.5).clamp_min(1e-30))
        return found

    def masks(self) -> PackedMasks:
        """The most likely mask of every linear, by parameter name; ties go to the lower column."""
        masks = PackedMasks()
        for name, logits in self.logits.items():
            masks[f"{name}.weight"] = top_n_mask(logits, self.pattern)
        return masks

    def restore(self) -> None:
        """Gives the linears their dense weights back."""
        for name, linear in self.linears.items():
            linear.weight.data = self.dense[name]
            linear.weight.grad = None


@contextmanager
def masked(
    linears: Mapping[str, nn.Linear], masks: Mapping[str, Tensor], pattern: NMPattern,
    *, logits: dict[str, Tensor], seed: int,
) -> Iterator[MaskedModel]:  # fmt: skip
    """A :class:`MaskedModel` that is restored at the end, whatever happens."""
    model = MaskedModel(linears, masks, pattern, logits=logits, seed=seed)
    try:
        yield model
    finally:
        model.restore()
