"""The distribution over masks that MaskPro learns (arXiv:2506.12876, section 4).

A group of M weights has logits l and probabilities p = softmax(l). Its mask is the set S of N distinct draws from p
without replacement, in whatever order they come:

    P(S) = sum over the orders s of S of  prod_j  p_s(j) / (1 - sum_{k<j} p_s(k))

Summing over N! orders is not needed. The probability f(T) that the first draws are the set T obeys

    f(T) = sum_{a in T} f(T - a) p_a / R(T - a),      R(T) = sum_{k not in T} p_k,      P(S) = f(S)

which is 2^N terms, and everything is kept in logarithms: R is a logsumexp over what is left and never 1 minus
something close to 1, so logits of +-100 lose nothing.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MAX_GROUP = 16
"""The largest M: the recursion holds 2^N numbers for a group."""

_CHUNK_ELEMENTS = 1 << 23
"""Numbers of the recursion alive at once: groups are taken in chunks."""


def sample(logits: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Draws one mask for every group: n draws without replacement, as the n largest of logits + Gumbel noise.

    Args:
        logits: (groups, M), floating point.
        n: kept weights, 1 <= n <= M.
        generator: on the logits' device; None takes torch's own.

    Returns:
        Boolean (groups, M), exactly n True in every row.

    Raises:
        ValueError: n or the shape is impossible, or a logit is not finite.
    """
    _check_logits(logits, n)
    # Double precision: in single, noise is a multiple of 2^-24 and can be infinite.
    exponential = torch.empty(logits.shape, dtype=torch.float64, device=logits.device).exponential_(generator=generator)
    return _largest(logits.double() - exponential.log(), n)


def most_likely(logits: Tensor, n: int) -> Tensor:
    """The mask of the n largest logits of every group, which no mask of n is likelier than; ties to the lower column.

    Args:
        logits: (groups, M).
        n: kept weights, 1 <= n <= M.

    Returns:
        Boolean (groups, M).

    Raises:
        ValueError: n or the shape is impossible, or a logit is not finite.
    """
    _check_logits(logits, n)
    return _largest(logits, n)


def log_prob(logits: Tensor, mask: Tensor) -> Tensor:
    """log P(mask | logits), exact: closed form for n = 1 and 2, the subset recursion else.

    Args:
        logits: (groups, M) with M <= 16, floating point; computed in float64.
        mask: boolean (groups, M), the same number n >= 1 of True in every row.

    Returns:
        (groups,). Differentiable; :func:`score` is its gradient, cheaper.

    Raises:
        ValueError: shapes, dtypes or counts are impossible.

    Cost: O(2^n n) per group.
    """
    n = _check_mask(logits, mask)
    return _log_prob(logits.double(), mask, n).to(logits.dtype)


@torch.no_grad()
def score(logits: Tensor, mask: Tensor) -> Tensor:
    """The gradient of :func:`log_prob` with respect to the logits.

    An order that passes through the set T draws next from what T leaves, so with nu(T) the probability that it
    does, given that it ends in S,

        d log P / d l_j  =  [j in S]  -  sum over T smaller than S, without j, of  nu(T) p_j / R(T)

    Args:
        logits: (groups, M) with M <= 16.
        mask: boolean (groups, M), the same number n >= 1 of True in every row.

    Returns:
        (groups, M); every row sums to 0.

    Raises:
        ValueError: shapes, dtypes or counts are impossible.

    Cost: O(2^n (n + M)) per group.
    """
    n = _check_mask(logits, mask)
    return _score(logits.double(), mask, n).to(logits.dtype)


def _log_prob(logits: Tensor, mask: Tensor, n: int) -> Tensor:
    if n == 1:
        return logits.log_softmax(dim=1)[mask]
    if n == 2:
        kept, rest = _pairs(logits, mask)
        return kept.sum(1) - logits.logsumexp(1) + torch.logsumexp(-rest, dim=1)
    return torch.cat([_Recursion(*_split(*part, n)).log_f[:, -1] for part in _chunks(logits, mask, n)])


def _score(logits: Tensor, mask: Tensor, n: int) -> Tensor:
    if n == logits.shape[1]:
        return torch.zeros_like(logits)
    if n == 1:
        return mask.to(logits.dtype) - logits.softmax(1)
    if n == 2:
        return _score_of_pairs(logits, mask)
    return torch.cat([_score_of_many(*part, n) for part in _chunks(logits, mask, n)])


def _score_of_pairs(logits: Tensor, mask: Tensor) -> Tensor:
    columns = mask.nonzero()[:, 1].reshape(-1, 2)
    _, rest = _pairs(logits, mask)
    first = (-rest).softmax(1)  # (groups, 2): the probability that each of the two was drawn first
    gradient = mask.to(logits.dtype) - logits.softmax(1)
    for which in range(2):
        second = (logits - rest[:, which : which + 1]).scatter(1, columns[:, which : which + 1], -torch.inf).exp()
        gradient -= first[:, which : which + 1] * second
    return gradient


def _pairs(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The two kept logits (groups, 2), and the logsumexp of what each of them leaves (groups, 2)."""
    columns = mask.nonzero()[:, 1].reshape(-1, 2)
    rest = [logits.scatter(1, columns[:, which : which + 1], -torch.inf).logsumexp(1) for which in range(2)]
    return logits.gather(1, columns), torch.stack(rest, dim=1)


class _Subsets:
    """All subsets of n kept weights as bit patterns, built once for each n.

    Attributes:
        levels: for each size, of its subsets: the elements (count, size), the subsets without each of them
            (count, size), and the places of those.
        place: (2^n,), where a subset stands among all of them ordered by size.
        complement: (2^n,), the other kept weights.
        holds: boolean (2^n, n).
    """

    def __init__(self, n: int, device: torch.device) -> None:
        everything = torch.arange(1 << n, device=device)
        self.complement = everything.flip(0)
        self.holds = (everything.unsqueeze(1) >> torch.arange(n, device=device) & 1).bool()
        by_size = self.holds.sum(1).argsort(stable=True)
        self.place = by_size.argsort()
        self.levels: list[tuple[Tensor, Tensor, Tensor]] = []
        for size in range(1, n + 1):
            subsets = everything[self.holds.sum(1) == size]
            elements = self.holds[subsets].nonzero()[:, 1].reshape(len(subsets), size)
            before = subsets.unsqueeze(1) - (1 << elements)
            self.levels.append((elements, before, self.place[before]))


_subsets = functools.lru_cache(maxsize=64)(_Subsets)


class _Recursion:
    """f of every subset of the kept weights.

    Attributes:
        log_f: (groups, 2^n), log f(T); the last is log P(S).
        log_rest: (groups, 2^n), log R(T) + logsumexp(l): what T leaves.
    """

    def __init__(self, kept: Tensor, dropped: Tensor) -> None:
        """``kept`` (groups, n), ``dropped`` (groups, M - n)."""
        groups, n = kept.shape
        self.kept, self.subsets = kept, _subsets(n, kept.device)
        outside = dropped.logsumexp(1, keepdim=True) if dropped.shape[1] else kept.new_full((groups, 1), -torch.inf)
        inside = torch.where(self.subsets.holds, kept.unsqueeze(1), -torch.inf).logsumexp(2)  # (groups, 2^n)
        self.log_rest = torch.logaddexp(outside, inside[:, self.subsets.complement])
        log_f = [kept.new_zeros((groups, 1))]
        for elements, before, position in self.subsets.levels:
            step = kept[:, elements] - self.log_rest[:, before]
            log_f.append((torch.cat(log_f, dim=1)[:, position] + step).logsumexp(2))
        self.log_f = torch.cat(log_f, dim=1)[:, self.subsets.place]

    def log_visits(self) -> Tensor:
        """(groups, 2^n): log nu(T), the probability that an order of S passes through T, given S."""
        log_g = torch.zeros_like(self.log_f)  # of ending in S from T
        for elements, before, _ in reversed(self.subsets.levels):
            after = before + (1 << elements)
            ways = (self.kept[:, elements] - self.log_rest[:, before] + log_g[:, after]).flatten(1)
            # A set is left for several larger ones, the same number for each: a sort brings its ways together.
            lower, counts = before.unique(return_counts=True)
            order = before.flatten().argsort(stable=True)
            log_g[:, lower] = ways[:, order].reshape(len(ways), len(lower), int(counts[0])).logsumexp(2)
        return self.log_f + log_g - self.log_f[:, -1:]


def _score_of_many(logits: Tensor, mask: Tensor, n: int) -> Tensor:
    kept, dropped = _split(logits, mask, n)
    recursion = _Recursion(kept, dropped)
    log_weight = (recursion.log_visits() - recursion.log_rest)[:, :-1]  # S itself draws no more
    without = ~recursion.subsets.holds[:-1]  # (2^n - 1, n)
    for_kept = torch.where(without, log_weight.unsqueeze(2), -torch.inf).logsumexp(1)  # (groups, n)
    gradient = torch.empty_like(logits)
    gradient[mask] = (1 - (kept + for_kept).exp()).flatten()
    gradient[~mask] = -(dropped + log_weight.logsumexp(1, keepdim=True)).exp().flatten()
    return gradient


def _split(logits: Tensor, mask: Tensor, n: int) -> tuple[Tensor, Tensor]:
    groups, size = logits.shape
    return logits[mask].reshape(groups, n), logits[~mask].reshape(groups, size - n)


def _chunks(logits: Tensor, mask: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
    rows = max(1, _CHUNK_ELEMENTS // ((1 << n) * n))
    return list(zip(logits.split(rows), mask.split(rows), strict=True))


def _largest(keys: Tensor, n: int) -> Tensor:
    columns = keys.argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros(keys.shape, dtype=torch.bool, device=keys.device).scatter_(1, columns, True)


def _check_logits(logits: Tensor, n: int) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"policy: expected floating-point logits (groups, M), found {logits.dtype} {tuple(logits.shape)}"
        )
    if not 1 <= n <= logits.shape[1]:
        raise ValueError(f"policy: expected 1 to {logits.shape[1]} kept of {logits.shape[1]}, found {n}")
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("policy: a logit is not finite")


def _check_mask(logits: Tensor, mask: Tensor) -> int:
    if mask.dtype != torch.bool or mask.shape != logits.shape:
        raise ValueError(
            f"policy: expected a boolean mask of shape {tuple(logits.shape)}, found {mask.dtype} {tuple(mask.shape)}"
        )
    counts = mask.sum(1)
    n = int(counts[0]) if len(counts) else 1
    if bool((counts != n).any()):
        raise ValueError(
            f"policy: masks keep {int(counts.min())} to {int(counts.max())} weights; expected all the same"
        )
    _check_logits(logits, n)
    if logits.shape[1] > MAX_GROUP:
        raise ValueError(f"policy: expected groups of at most {MAX_GROUP}, found {logits.shape[1]}")
    return n
