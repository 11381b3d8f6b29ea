"""Initial logits that say how sure the initial mask is: near-ties are tried often, clear cases hardly ever.

The paper starts every group alike, pi_0 = c m_0, and so tries dropping a weight that matters most as often as one
that barely won its place. What keeping weight j is worth to a layer, the rest of the mask as it is, follows from the
same second moments H = X^T X that one-shot masks are made of: with d = w * (1 - m) the dropped weights and p = d H,
the layer's error rises by  w_j (2 p_j + w_j H_jj)  if a kept j is dropped, and falls by  w_j (2 p_j - w_j H_jj)  if a
dropped j is kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from maskpro_kernels import NMPattern
from maskpro_learner.layers import select_layers, weights_restored
from maskpro_learner.sequential import BlockRunner

_TOKENS = 32_768
"""Of the calibration text, at most: blocks from all of it."""

_LEAST, _MOST = 0.1, 10.0
"""Between the logits of kept and dropped weights: the initial mask is the most likely one, and nothing is certain."""


@torch.no_grad()
def margin_logits(
    model: PreTrainedModel,
    tokens: Tensor,
    masks: Mapping[str, Tensor],
    pattern: NMPattern,
    scale: float,
    *,
    batch: int = 4,
) -> dict[str, Tensor]:
    """Logits whose most likely mask is the initial one, as far from each other as the weights' worth is.

    Args:
        model: the dense model; its weights are as before at the end.
        tokens: int64 (samples, length), calibration text.
        masks: initial masks by parameter name.
        pattern: their pattern.
        scale: logit of the layer's median worth.
        batch: blocks of text run at once.

    Returns:
        float32 (out_features, in_features) by parameter name.

    Cost: two forward passes over the text, and a product of (out, in) with (in, in) for each layer.
    """
    layers = select_layers(model, pattern)
    count = min(len(tokens), max(1, _TOKENS // tokens.shape[1]))
    spread = torch.arange(count) * len(tokens) // count  # several sources of text lie one after the other
    runner = BlockRunner(model, layers.blocks, tokens[spread], batch=batch)
    logits: dict[str, Tensor] = {}
    with weights_restored(layers.linears.values()):
        for index, block in enumerate(layers.blocks):
            statistics = runner.statistics(index, with_gram=True)
            for module_name, linear in block.linears.items():
                name = f"{module_name}.weight"
                if name not in masks:
                    continue
                gram = statistics[module_name].gram
                assert gram is not None
                mask = masks[name].to(gram.device)
                logits[name] = _logits(_worth(linear.weight.float(), gram, mask), mask, pattern, scale)
                linear.weight.data = torch.where(mask, linear.weight, 0)
            runner.advance(index)
    return logits


def _worth(weight: Tensor, gram: Tensor, mask: Tensor) -> Tensor:
    """How much the layer's error falls for having each weight."""
    own = weight.square() * gram.diagonal()
    return 2 * weight * ((weight * ~mask) @ gram) + torch.where(mask, own, -own)


def _logits(worth: Tensor, mask: Tensor, pattern: NMPattern, scale: float) -> Tensor:
    """Worth in units of the layer's median, counted from the middle between the weakest kept and strongest dropped."""
    unit = worth.abs().median().clamp_min(torch.finfo(worth.dtype).tiny)
    groups, kept = (worth / unit).reshape(-1, pattern.m), mask.reshape(-1, pattern.m)
    weakest = groups.masked_fill(~kept, torch.inf).amin(1, keepdim=True)
    strongest = groups.masked_fill(kept, -torch.inf).amax(1, keepdim=True)
    if pattern.n == pattern.m:
        strongest = weakest  # nothing is dropped
    centred = (scale * (groups - (weakest + strongest) / 2)).clamp(-_MOST / 2, _MOST / 2)
    bounded = torch.where(kept, centred.clamp_min(_LEAST / 2), centred.clamp_max(-_LEAST / 2))
    return bounded.reshape(worth.shape).contiguous()
