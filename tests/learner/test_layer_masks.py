"""Masks of one layer, against brute force and direct least squares."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskpro_kernels import NMPattern
from maskpro_kernels.packing import check_mask, magnitude_mask
from maskpro_learner.initial_masks import random_mask, wanda_mask
from maskpro_learner.mask_search import swap_search
from maskpro_learner.sparsegpt import sparsegpt

PATTERNS = ["1:4", "2:4", "4:8", "2:8", "8:16"]


def correlated_inputs(tokens: int, features: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs with correlated columns of unequal size, as in a language model."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn((features, features), generator=generator, dtype=dtype)
    scale = torch.rand(features, generator=generator, dtype=dtype) ** 2
    noise = torch.randn((tokens, features), generator=generator, dtype=dtype)
    return (
        torch.randn((tokens, features), generator=generator, dtype=dtype) @ (mix * scale) / features**0.5 + 0.1 * noise
    )


def weights(rows: int, features: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((rows, features), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def error(x: Tensor, w: Tensor, pruned: Tensor) -> float:
    """||X (W - W')^T||^2."""
    return float((x @ (w - pruned).T).double().square().sum())


@settings(max_examples=30)
@given(st.sampled_from(PATTERNS), st.integers(1, 3), st.integers(1, 3), st.integers(0, 10**6))
def test_wanda_is_the_best_of_all_masks_by_its_score(text: str, rows: int, groups: int, seed: int) -> None:
    pattern = NMPattern.parse(text)
    if pattern.m == 16:
        groups = 1
    w = weights(rows, groups * pattern.m, seed)
    x = correlated_inputs(8, groups * pattern.m, seed)
    mask = wanda_mask(w, x.double().square().sum(0), pattern)
    score = w.double().abs() * x.double().norm(dim=0)
    for row, group in itertools.product(range(rows), range(groups)):
        columns = slice(group * pattern.m, (group + 1) * pattern.m)
        best = max(sum(kept) for kept in itertools.combinations(score[row, columns].tolist(), pattern.n))
        assert float(score[row, columns][mask[row, columns]].sum()) == pytest.approx(best, rel=1e-12)
    check_mask(mask, pattern)


def test_ties_go_to_the_lower_column() -> None:
    pattern = NMPattern.parse("2:4")
    ones, expected = torch.ones((2, 8)), torch.tensor([True, True, False, False] * 2).expand(2, 8)
    assert torch.equal(wanda_mask(ones, torch.ones(8), pattern), expected)
    assert torch.equal(sparsegpt(ones, torch.eye(8), pattern).mask, expected)


@pytest.mark.parametrize("text", PATTERNS)
def test_every_method_is_strict(text: str) -> None:
    pattern = NMPattern.parse(text)
    x, w = correlated_inputs(200, 48), weights(5, 48)
    gram = x.T @ x
    result = sparsegpt(w, gram, pattern, block=16)
    start = wanda_mask(w, gram.diagonal(), pattern)
    for mask in (result.mask, start, swap_search(w, gram, start, pattern, block=16)):
        check_mask(mask, pattern)
    check_mask(random_mask((5, 48), pattern, torch.Generator().manual_seed(0)), pattern)
    assert torch.equal(result.refit != 0, result.mask)


@pytest.mark.parametrize("text", PATTERNS)
def test_sparsegpt_refit_beats_magnitude_and_its_own_mask_without_refit(text: str) -> None:
    pattern = NMPattern.parse(text)
    x, w = correlated_inputs(1000, 96), weights(40, 96)
    result = sparsegpt(w, x.T @ x, pattern)
    assert error(x, w, result.refit) < error(x, w, w * result.mask)
    assert error(x, w, result.refit) < error(x, w, w * magnitude_mask(w, pattern))


@pytest.mark.parametrize("block", [4, 8, 128])
def test_every_obs_update_is_the_least_squares_one(block: int) -> None:
    """SparseGPT moves, at a dropped column, exactly the columns to its right, and to their least-squares optimum."""
    pattern = NMPattern.parse("2:4")
    x, w = correlated_inputs(200, 24, dtype=torch.float64), weights(6, 24, dtype=torch.float64)
    result = sparsegpt(w, x.T @ x, pattern, damping=0.0, block=block)
    for row in range(len(w)):
        expected = w[row].clone()
        for j in range(w.shape[1]):
            if not result.mask[row, j]:
                # min over z of || x_j w_j - X_right z ||: what the right columns must take over
                if j + 1 < w.shape[1]:
                    expected[j + 1 :] += torch.linalg.lstsq(x[:, j + 1 :], x[:, j] * expected[j]).solution
                expected[j] = 0
        torch.testing.assert_close(result.refit[row], expected, rtol=1e-8, atol=1e-10)


def test_sparsegpt_is_exact_least_squares_where_all_kept_columns_come_last() -> None:
    pattern = NMPattern.parse("1:4")
    x = correlated_inputs(100, 4, dtype=torch.float64)
    w = torch.tensor([[1e-3, -2e-3, 1e-3, 5.0]], dtype=torch.float64)
    result = sparsegpt(w, x.T @ x, pattern, damping=0.0)
    assert result.mask.tolist() == [[False, False, False, True]]
    solution = torch.linalg.lstsq(x[:, 3:], x @ w.T).solution
    torch.testing.assert_close(result.refit[:, 3:], solution.T, rtol=1e-9, atol=0)


def test_sparsegpt_survives_inputs_that_are_always_zero() -> None:
    x = correlated_inputs(3, 16)  # fewer tokens than features, so H is singular
    x[:, 5] = 0
    for gram in (x.T @ x, torch.zeros((16, 16))):
        result = sparsegpt(weights(2, 16), gram, NMPattern.parse("2:4"))
        check_mask(result.mask, NMPattern.parse("2:4"))
        assert torch.isfinite(result.refit).all()


@pytest.mark.parametrize("text", PATTERNS)
def test_swap_search_only_lowers_the_error_of_a_mask(text: str) -> None:
    pattern = NMPattern.parse(text)
    x, w = correlated_inputs(500, 64, dtype=torch.float64), weights(30, 64, dtype=torch.float64)
    gram = x.T @ x
    start = wanda_mask(w, gram.diagonal(), pattern)
    errors = [error(x, w, w * start)]
    for sweeps in (1, 2, 20):
        errors.append(error(x, w, w * swap_search(w, gram, start, pattern, sweeps=sweeps, block=32)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]


def test_swap_search_ends_where_no_single_swap_helps() -> None:
    pattern = NMPattern.parse("2:4")
    x, w = correlated_inputs(100, 12, dtype=torch.float64), weights(4, 12, dtype=torch.float64)
    gram = x.T @ x
    mask = swap_search(w, gram, magnitude_mask(w, pattern), pattern, sweeps=100, block=4)
    for row in range(4):
        reached = error(x, w[row : row + 1], w[row : row + 1] * mask[row])
        for i, j in itertools.product(range(12), range(12)):
            if i // 4 == j // 4 and mask[row, i] and not mask[row, j]:
                other = mask[row].clone()
                other[i], other[j] = False, True
                assert error(x, w[row : row + 1], w[row : row + 1] * other) > reached * (1 - 1e-4)


def test_random_masks_follow_the_seed_and_cover_all_states() -> None:
    pattern = NMPattern.parse("2:4")
    draw = lambda seed: random_mask((64, 64), pattern, torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    states = draw(1).reshape(-1, 4).unique(dim=0, return_counts=True)
    assert len(states[1]) == 6
    # 1024 groups, 6 equal states: mean 170.7, deviation 11.9; five deviations
    assert all(abs(int(count) - 1024 / 6) < 60 for count in states[1])
