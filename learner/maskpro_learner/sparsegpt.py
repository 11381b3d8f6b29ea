"""SparseGPT (arXiv:2301.00774): a mask chosen with second-order information, and the kept weights refit to it.

Written from the paper's section 3; the symbols are its own. For a layer W (out, in) and inputs X, H = X^T X. Columns
are met from left to right; when weight q of a row is dropped, the weights to its right move so that the layer's
output changes least (the OBS update, section 3.1), which only needs the Cholesky factor of H^-1 (section 3.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskpro_kernels import NMPattern
from maskpro_kernels.packing import top_n_mask


@dataclass(frozen=True)
class SparseGPTResult:
    """Both halves of SparseGPT, separately.

    Attributes:
        mask: boolean (out_features, in_features), strictly N:M.
        refit: (out_features, in_features), float32 (float64 for a float64 weight); zero where not kept. A mask file
            holds the mask only: with the original weights the mask is worse than with these.
    """

    mask: Tensor
    refit: Tensor


def inverse_factor(gram: Tensor, damping: float = 0.01) -> Tensor:
    """Upper U with U^T U = (H + damping * mean(diag H) * I)^-1; damping grows tenfold until H is definite.

    U[j, j]^2 is the first diagonal entry of the inverse of H without its first j rows and columns.
    """
    mean = float(gram.diagonal().mean())
    identity: Tensor = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if mean <= 0:
        return identity
    for _ in range(8):
        lower, failed = torch.linalg.cholesky_ex(gram + damping * mean * identity)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                factor: Tensor = upper
                return factor
        damping = max(10 * damping, 1e-6)
    raise ValueError(f"cannot invert the inputs' second moments, not even with damping {damping:g}")


def sparsegpt(
    weight: Tensor, gram: Tensor, pattern: NMPattern, *, damping: float = 0.01, block: int = 128
) -> SparseGPTResult:
    """Prunes one linear layer.

    Args:
        weight: (out_features, in_features); not changed.
        gram: (in_features, in_features), X^T X over the calibration inputs.
        pattern: the pattern; N are kept. Ties go to the lower column.
        damping: share of the mean diagonal that is added to the diagonal (the paper's lambda).
        block: columns whose updates are applied at once to the rest (section 3.4); only speed depends on it.

    Raises:
        ValueError: m does not divide in_features, or block.

    Cost: O(in^3 + out * in^2) operations.
    """
    pattern.kept(weight.shape[1])
    if block % pattern.m:
        raise ValueError(f"block: expected a multiple of {pattern.m}, found {block}")
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    w = weight.to(dtype, copy=True)
    upper = inverse_factor(gram.to(dtype), damping)
    mask = torch.zeros(w.shape, dtype=torch.bool, device=w.device)
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        errors = torch.zeros((w.shape[0], stop - start), dtype=dtype, device=w.device)
        for j in range(start, stop):
            if j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                # the rise of the squared error when a weight is dropped, w_q^2 / [H^-1]_qq, is its score
                mask[:, group] = top_n_mask((w[:, group] / upper.diagonal()[group]).square(), pattern)
            error = w[:, j] * ~mask[:, j] / upper[j, j]
            w[:, j:stop] -= error.unsqueeze(1) * upper[j, j:stop]
            errors[:, j - start] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return SparseGPTResult(mask, w * mask)
