"""How far one model's predictions are from another's, in a fraction of the memory that torch's own operators take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 20  # numbers; float32 temporaries of this size stay in a core's cache


class _Divergence(torch.autograd.Function):
    """The gradient is made together with the loss, in the dtype of the logits; nothing else is kept."""

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, target: Tensor) -> Tensor:
        grad = torch.empty_like(predicted)
        total = torch.zeros((), dtype=torch.float64, device=predicted.device)
        rows = max(1, _CHUNK // predicted.shape[-1])
        for ours, theirs, into in zip(predicted.split(rows), target.split(rows), grad.split(rows), strict=True):
            log_ours, log_theirs = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
            wanted = log_theirs.exp()
            into.copy_(log_ours.exp().sub_(wanted))
            total += wanted.mul_(log_theirs.sub_(log_ours)).sum()
        ctx.save_for_backward(grad)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad.mul_(grads[0].to(grad.dtype)), None  # in place: a graph is walked back once


def divergence(predicted: Tensor, target: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of the predictions from the targets, summed over positions, in nats.

    Args:
        predicted: (..., vocabulary), logits; the gradient flows to them.
        target: same shape, logits of the distribution to come near; none flows here.

    Returns:
        float32 scalar: sum over positions of sum_v t_v (log t_v - log p_v), each row in float32.

    Cost: two softmaxes and one tensor of the size and dtype of ``predicted``; :func:`torch.nn.functional.kl_div` on two
        log_softmax keeps five in float32.
    """
    size = predicted.shape[-1]
    result: Tensor = _Divergence.apply(predicted.reshape(-1, size), target.reshape(-1, size))
    return result
