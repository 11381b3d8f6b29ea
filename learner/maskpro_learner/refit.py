"""Refits the kept weights of one layer, so that its output changes least: exactly, and by a low-rank update.

With H = X^T X over the layer's inputs, a weight V under the mask m has the error  ||X (V - W)^T||^2 = tr D H D^T,
D = V - W. It is a quadratic in the kept weights: V* solves  m * (V H) = m * (W H), row by row. What is left of it
when V = m * (W + B A) is the same quadratic around V*, so the low-rank fit starts from V*.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskpro_kernels.recovery import LowRank

_DAMPING = 0.01
"""Share of the mean diagonal added to H's diagonal, as in SparseGPT."""


def damped(gram: Tensor) -> Tensor:
    """H with :data:`_DAMPING` of its mean diagonal added to the diagonal; inputs that never occur stay harmless."""
    result = gram.clone()
    result.diagonal().add_(_DAMPING * gram.diagonal().mean() + torch.finfo(gram.dtype).tiny)
    return result


@torch.no_grad()
def refit(weight: Tensor, gram: Tensor, mask: Tensor, *, iterations: int = 40) -> Tensor:
    """The best kept weights for a mask: conjugate gradients on all rows at once.

    Args:
        weight: float32 or float64 (out_features, in_features).
        gram: (in_features, in_features), :func:`damped`.
        mask: boolean (out_features, in_features).
        iterations: of conjugate gradients; each lowers the error, or ends at its minimum.

    Returns:
        (out_features, in_features), zero where the mask drops.

    Cost: O(out * in^2) an iteration.
    """
    inverse_diagonal = 1 / gram.diagonal()
    solution = weight * mask
    residual = mask * ((weight - solution) @ gram)
    step = residual * inverse_diagonal
    size = (residual * step).sum(1, keepdim=True)
    least = size * torch.finfo(weight.dtype).eps ** 2
    for _ in range(iterations):
        image = mask * (step @ gram)
        rate = torch.where(size > least, size / (step * image).sum(1, keepdim=True), 0)
        solution += rate * step
        residual -= rate * image
        scaled = residual * inverse_diagonal
        new_size = (residual * scaled).sum(1, keepdim=True)
        step = scaled + torch.where(size > least, new_size / size, 0) * step
        size = torch.where(size > least, new_size, 0)
    return solution


@torch.no_grad()
def low_rank_refit(
    weight: Tensor, gram: Tensor, mask: Tensor, rank: int, *, completions: int = 5, iterations: int = 40
) -> LowRank:
    """The low-rank update that brings ``mask * (weight + b @ a)`` closest to the layer's dense output.

    Args:
        weight: float32 (out_features, in_features).
        gram: (in_features, in_features), :func:`damped`.
        mask: boolean (out_features, in_features).
        rank: of the update; at most the smaller side of the weight is used.
        completions: where the mask drops, any change is free: how often the change of :func:`refit` is completed there
            by its own truncated decomposition.
        iterations: of Adam on the factors afterwards.

    Cost: O(out * in^2) an iteration, and ``completions`` eigendecompositions of the smaller side.
    """
    rank = min(rank, *weight.shape)
    change = refit(weight, gram, mask) - weight * mask
    scale = gram.diagonal().sqrt()
    completed = change
    for _ in range(completions):
        b, a = _truncated(completed * scale, rank)
        a = a / scale
        completed = torch.where(mask, change, b @ a)
    unit = gram / gram.diagonal().mean()
    b, a = (factor.clone(memory_format=torch.contiguous_format) for factor in (b, a))
    adam = torch.optim.Adam([{"params": [factor], "lr": 0.05 * root_mean_square(factor)} for factor in (b, a)])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, iterations))
    for _ in range(iterations):
        gradient = torch.where(mask, torch.where(mask, b @ a - change, 0) @ unit, 0)
        b.grad, a.grad = gradient @ a.T, b.T @ gradient
        adam.step()
        schedule.step()
    return LowRank(b, a)


def root_mean_square(tensor: Tensor) -> float:
    """The root mean square of its elements, never quite 0."""
    return max(float(tensor.detach().square().mean().sqrt()), 1e-8)


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors (rows, rank) and (rank, columns), of like size, of the best approximation of that rank."""
    wide = matrix.shape[0] <= matrix.shape[1]
    small = matrix if wide else matrix.T
    values, vectors = torch.linalg.eigh(small @ small.T)  # cheaper than a singular value decomposition
    root = values[-rank:].clamp_min(torch.finfo(matrix.dtype).tiny).pow(0.25)
    basis = vectors[:, -rank:]
    left, right = basis * root, (basis.T @ small) / root.unsqueeze(1)
    return (left, right) if wide else (right.T, left.T)
