"""Local search for the mask that reconstructs a layer best when the kept weights stay as they are.

Wanda scores every weight alone; SparseGPT scores it as if the others would be refit. A mask file is used with the
original weights, so its error is exactly  E(m) = d H d^T  per row, with d = w * (1 - m) the dropped weights and
H = X^T X. Correlated inputs make that differ much from the sum of Wanda's scores: dropped weights can cancel out.

A move swaps a kept column i and a dropped column j of one group, and changes E by
    2 (w_i p_i - w_j p_j) + w_i^2 H_ii + w_j^2 H_jj - 2 w_i w_j H_ij,        p = d H,
so the best swap of every row is found at once, group after group, and E only ever falls.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskpro_kernels import NMPattern


@torch.no_grad()
def swap_search(
    weight: Tensor, gram: Tensor, mask: Tensor, pattern: NMPattern, *, sweeps: int = 8, block: int = 128
) -> Tensor:
    """Improves a strict mask by the best swap in every group of every row, sweep after sweep.

    Args:
        weight: (out_features, in_features), original weights.
        gram: (in_features, in_features), X^T X over the calibration inputs.
        mask: boolean, strictly N:M, where the search starts; not changed.
        pattern: the pattern.
        sweeps: passes over all groups, at most; stops when none finds a swap.
        block: columns whose changes are applied at once to the rest; only speed depends on it.

    Returns:
        A strict mask whose reconstruction error ||X (W - m*W)^T||^2 is at most that of ``mask``.

    Cost: O(out * in^2) operations a sweep, as one SparseGPT.
    """
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    m = pattern.m
    w, h = weight.to(dtype), gram.to(dtype)
    kept = mask.clone()
    rows = torch.arange(w.shape[0], device=w.device)
    for _ in range(sweeps):
        p = (w * ~kept) @ h  # fresh every sweep, so rounding does not pile up
        changed = False
        for start in range(0, w.shape[1], block):
            stop = min(start + block, w.shape[1])
            change = torch.zeros((w.shape[0], stop - start), dtype=dtype, device=w.device)
            for left in range(start, stop, m):
                group = slice(left, left + m)
                wg, hg, pg, kg = w[:, group], h[group, group], p[:, group], kept[:, group]
                own = wg.square() * hg.diagonal()
                drop = (own + 2 * wg * pg).masked_fill(~kg, torch.inf)  # (rows, i): i becomes dropped
                keep = (own - 2 * wg * pg).masked_fill(kg, torch.inf)  # (rows, j): j becomes kept
                gain = drop.unsqueeze(2) + keep.unsqueeze(1) - 2 * wg.unsqueeze(2) * wg.unsqueeze(1) * hg
                best = gain.flatten(1).min(dim=1)
                # a swap must be worth more than the rounding of p, or equal weights would swap for ever
                better = best.values < -1e-6 * own.sum(1)
                i, j = best.indices // m, best.indices % m
                row, i, j = rows[better], i[better], j[better]
                if not len(row):
                    continue
                changed = True
                delta = torch.zeros_like(wg)
                delta[row, i], delta[row, j] = wg[row, i], -wg[row, j]
                kept[row, left + i], kept[row, left + j] = False, True
                p[:, start:stop] += delta @ h[group, start:stop]
                change[:, left - start : left - start + m] = delta
            p[:, stop:] += change @ h[start:stop, stop:]  # groups to the left read p in the next sweep only
        if not changed:
            break
    return kept
