"""The mask distribution against brute force, finite differences and frequencies."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskpro_learner.policy import log_prob, most_likely, sample, score

ALL_UP_TO_8 = [(n, m) for m in range(2, 9) for n in range(1, m)]


def every_mask(n: int, m: int) -> torch.Tensor:
    """Boolean (C(m, n), m)."""
    masks = torch.zeros((math.comb(m, n), m), dtype=torch.bool)
    for row, columns in enumerate(itertools.combinations(range(m), n)):
        masks[row, list(columns)] = True
    return masks


def enumerated(logits: torch.Tensor, mask: torch.Tensor) -> float:
    """P(mask) as the definition says: a sum over n! orders."""
    p = logits.double().softmax(0).tolist()
    total = 0.0
    for order in itertools.permutations(mask.nonzero().flatten().tolist()):
        product, left = 1.0, 1.0
        for column in order:
            product *= p[column] / left
            left -= p[column]
        total += product
    return total


@pytest.mark.parametrize(("n", "m"), ALL_UP_TO_8, ids=[f"{n}:{m}" for n, m in ALL_UP_TO_8])
def test_log_prob_equals_enumeration(n, m):
    masks = every_mask(n, m)[:40]
    logits = torch.randn((len(masks), m), dtype=torch.float64, generator=torch.Generator().manual_seed(n * 9 + m))
    expected = [enumerated(row, mask) for row, mask in zip(logits, masks, strict=True)]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(log_prob(logits, masks).exp(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("n", "m"), [*ALL_UP_TO_8, (4, 16), (8, 16), (13, 16)])
def test_probabilities_of_all_masks_sum_to_one(n, m):
    masks = every_mask(n, m)
    logits = 3 * torch.randn(m, dtype=torch.float64, generator=torch.Generator().manual_seed(m)).expand(len(masks), m)
    torch.testing.assert_close(log_prob(logits, masks).logsumexp(0), torch.tensor(0.0).double(), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("n", "m"), [*ALL_UP_TO_8, (3, 16), (8, 16)])
def test_score_equals_finite_differences(n, m):
    generator = torch.Generator().manual_seed(n + 31 * m)
    logits = torch.randn((6, m), dtype=torch.float64, generator=generator)
    mask = sample(logits, n, generator)
    step = 1e-5
    columns = []
    for column in range(m):
        nudge = torch.zeros(m, dtype=torch.float64)
        nudge[column] = step
        # fourth order: the truncation error is of the order of step^4
        near = log_prob(logits + nudge, mask) - log_prob(logits - nudge, mask)
        far = log_prob(logits + 2 * nudge, mask) - log_prob(logits - 2 * nudge, mask)
        columns.append((8 * near - far) / (12 * step))
    torch.testing.assert_close(score(logits, mask), torch.stack(columns, dim=1), rtol=0, atol=1e-9)


@given(st.integers(2, 16).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))), st.integers(0, 2**31))
@settings(max_examples=60)
def test_score_is_the_gradient_and_its_mean_is_zero(pattern, seed):
    n, m = pattern
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn((3, m), dtype=torch.float64, generator=generator)).requires_grad_()
    mask = sample(logits.detach(), n, generator)
    (gradient,) = torch.autograd.grad(log_prob(logits, mask).sum(), logits)
    torch.testing.assert_close(score(logits, mask), gradient, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(score(logits, mask).sum(1), torch.zeros(3).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (2, 8), (4, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_of_a_hundred_are_safe(n, m, dtype):
    logits = torch.full((1, m), -100.0, dtype=dtype)
    logits[0, :n] = 100.0
    likely, unlikely = most_likely(logits, n), most_likely(-logits, n)
    assert float(log_prob(logits, likely)) == pytest.approx(0, abs=1e-6)
    lowest = float(log_prob(logits, unlikely))
    assert math.isfinite(lowest)
    assert lowest < -190
    for mask in (likely, unlikely):
        assert bool(torch.isfinite(score(logits, mask)).all())
        assert float(score(logits, mask).abs().max()) <= n


# 99.99% quantiles of chi-square with 3, 5 and 69 degrees of freedom: one seed in ten thousand fails a right sampler.
@pytest.mark.parametrize(("n", "m", "limit"), [(1, 4, 21.1), (2, 4, 25.7), (4, 8, 122.0)])
def test_frequencies_pass_a_chi_square_test(n, m, limit):
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn((1, m), dtype=torch.float64, generator=generator)
    masks = every_mask(n, m)
    draws = 200_000
    drawn = sample(logits.expand(draws, m), n, generator)
    weights = 1 << torch.arange(m)
    codes, counts = (drawn * weights).sum(1).unique(return_counts=True)
    expected = draws * log_prob(logits.expand(len(masks), m), masks).exp()
    observed = torch.zeros(1 << m, dtype=torch.float64).index_put_((codes,), counts.double())[(masks * weights).sum(1)]
    assert observed.sum() == draws
    assert float(((observed - expected) ** 2 / expected).sum()) < limit


def test_most_likely_gives_ties_to_the_lower_column():
    logits = torch.tensor([[0.0, 1, 1, 1], [5, 5, 5, 5], [-1, 3, 2, 3]])
    expected = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0], [0, 1, 0, 1]]).bool()
    assert torch.equal(most_likely(logits, 2), expected)


def test_the_most_likely_mask_is_the_likeliest():
    masks = every_mask(3, 7)
    logits = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    likeliest = masks[int(log_prob(logits.expand(len(masks), 7), masks).argmax())]
    assert torch.equal(most_likely(logits.unsqueeze(0), 3)[0], likeliest)


def test_large_groups_are_taken_in_chunks(monkeypatch):
    logits = torch.randn((50, 8), dtype=torch.float64)
    mask = sample(logits, 4)
    whole = log_prob(logits, mask), score(logits, mask)
    monkeypatch.setattr("maskpro_learner.policy._CHUNK_ELEMENTS", 1000)
    assert torch.equal(log_prob(logits, mask), whole[0])
    assert torch.equal(score(logits, mask), whole[1])


@pytest.mark.parametrize(
    ("logits", "mask", "message"),
    [
        (torch.zeros(2, 4), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool(), "keep 1 to 2 weights"),
        (torch.zeros(2, 4), torch.zeros(2, 5).bool(), r"boolean mask of shape \(2, 4\)"),
        (torch.zeros(1, 4), torch.zeros(1, 4).bool(), "expected 1 to 4 kept of 4, found 0"),
        (torch.full((1, 4), torch.nan), torch.tensor([[1, 1, 0, 0]]).bool(), "not finite"),
        (torch.zeros(1, 17), torch.eye(17).bool()[:1], "at most 16, found 17"),
        (torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[1, 1, 0, 0]]).bool(), "floating-point logits"),
    ],
)
def test_impossible_arguments(logits, mask, message):
    with pytest.raises(ValueError, match=message):
        log_prob(logits, mask)
    with pytest.raises(ValueError, match=message):
        score(logits, mask)
