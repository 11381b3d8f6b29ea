"""The fused learning step: its draws against Philox in Python, its update against the exact score."""

from __future__ import annotations

import math

import pytest
import torch
from cases import ISAS
from hypothesis import given, settings
from hypothesis import strategies as st

from maskpro_kernels import NMPattern, _cpu
from maskpro_kernels.policy_step import policy_step
from maskpro_learner.policy import log_prob, most_likely, score

PATTERNS = st.sampled_from([4, 8]).flatmap(lambda m: st.builds(NMPattern, st.integers(1, m), st.just(m)))


def run(logits, pattern, *, isa, threads=1, updates=(), gains=None, draw=0, seed=1, stream=0, dtype=torch.float32):
    """New logits, and the mask of the next draw."""
    logits = logits.clone()
    weight = torch.ones(logits.shape, dtype=dtype)
    masked = torch.full_like(weight, 7)
    _cpu.policy_step(
        logits, weight, masked, gains, None, pattern.n, pattern.m, updates, draw, seed, stream, isa, threads
    )
    assert bool(((masked == 0) | (masked == 1)).all()), "an element was not written"
    return logits, masked != 0


def philox(counter: tuple[int, int, int, int], key: int) -> list[int]:
    """Philox 4x32-10 as its paper defines it (Salmon et al., SC 2011)."""
    c, k = list(counter), [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_known_answers():
    """The vectors published with Random123."""
    assert philox((0, 0, 0, 0), 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert philox((ones,) * 4, ones << 32 | ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("isa", ISAS)
def test_draws_are_gumbel_top_n_of_philox(isa):
    if isa not in _cpu.available_isas():
        pytest.skip(f"this machine has no {isa}")
    pattern, seed, stream, draw = NMPattern(3, 8), 0x123456789ABCDEF0, 77, (5 << 32) + 9
    logits = torch.randn((3, 40), generator=torch.Generator().manual_seed(0))
    _, mask = run(logits, pattern, isa=isa, draw=draw, seed=seed, stream=stream)
    for group, (row, found) in enumerate(zip(logits.reshape(-1, 8).tolist(), mask.reshape(-1, 8), strict=True)):
        words = []
        for block in range(2):
            words += philox((group, stream << 2 | block, draw & 0xFFFFFFFF, draw >> 32), seed)
        uniform = [((word >> 9) + 0.5) * 2.0**-23 for word in words]
        keys = [logit - math.log(-math.log(u)) for logit, u in zip(row, uniform, strict=True)]
        largest = sorted(range(8), key=lambda column: -keys[column])[:3]
        assert sorted(found.nonzero().flatten().tolist()) == sorted(largest)


@pytest.mark.parametrize("isa", ISAS)
def test_two_of_four_are_drawn_by_one_word_from_the_masks_probabilities(isa):
    if isa not in _cpu.available_isas():
        pytest.skip(f"this machine has no {isa}")
    seed, stream, draw = 0x123456789ABCDEF0, 77, (5 << 32) + 9
    logits = 2 * torch.randn((4, 400), generator=torch.Generator().manual_seed(0))
    _, mask = run(logits, NMPattern(2, 4), isa=isa, draw=draw, seed=seed, stream=stream)
    for group, (row, found) in enumerate(zip(logits.double().reshape(-1, 4), mask.reshape(-1, 4), strict=True)):
        counter = (group // 32 * 8 + group % 8, stream << 2, draw & 0xFFFFFFFF, draw >> 32)
        word = philox(counter, seed)[group % 32 // 8]
        uniform = ((word >> 9) + 0.5) * 2.0**-23
        order = row.argsort(descending=True).tolist()
        pairs = [(order[a], order[b]) for a, b in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))]
        masks = torch.zeros(6, 4, dtype=torch.bool)
        for state, pair in enumerate(pairs):
            masks[state, list(pair)] = True
        below = log_prob(row.expand(6, 4), masks).exp().cumsum(0)
        assert float((below - uniform).abs().min()) > 1e-6  # so that rounding cannot choose another one
        assert torch.equal(found, masks[int((below < uniform).sum())])


@pytest.mark.parametrize("isa", ISAS)
@given(
    pattern=PATTERNS,
    shape=st.tuples(st.integers(1, 7), st.integers(1, 40)),
    scale=st.sampled_from([0.0, 1.0, 5.0, 50.0]),
    seed=st.integers(0, 2**64 - 1),
    draws=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=100)
def test_update_adds_the_score_of_each_draw(isa, pattern, shape, scale, seed, draws, dtype):
    if isa not in _cpu.available_isas():
        pytest.skip(f"this machine has no {isa}")
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(shape[0], shape[1] * pattern.m, generator=generator).clamp(-2, 2)
    expected = torch.zeros_like(logits, dtype=torch.float64)
    updates = []
    for index, draw in enumerate(draws):
        same, mask = run(logits, pattern, isa=isa, draw=draw, seed=seed, dtype=dtype)
        assert torch.equal(same, logits)  # drawing changes nothing
        assert bool((mask.reshape(-1, pattern.m).sum(1) == pattern.n).all())
        coefficient = 0.5 + index
        updates.append((coefficient, draw))
        expected += coefficient * score(logits.double().reshape(-1, pattern.m), mask.reshape(-1, pattern.m)).reshape(
            logits.shape
        )
    updated, _ = run(logits, pattern, isa=isa, updates=updates, seed=seed)
    # float32 logits of size L have ulps of L * 2^-23, and a score sums a few exponentials of their differences.
    tolerance = 2e-6 * (1 + float(logits.abs().max())) * sum(c for c, _ in updates)
    torch.testing.assert_close(updated.double(), logits.double() + expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("isa", ISAS)
@given(pattern=PATTERNS, groups=st.integers(1, 40), count=st.integers(2, 16), seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_gains_weigh_each_group_by_what_its_draw_gains_over_the_others(isa, pattern, groups, count, seed):
    if isa not in _cpu.available_isas():
        pytest.skip(f"this machine has no {isa}")
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn((3, groups * pattern.m), generator=generator)
    gains = torch.randn(logits.shape, generator=generator)
    masks = [run(logits, pattern, isa=isa, draw=draw, seed=seed)[1].reshape(-1, pattern.m) for draw in range(count)]
    gained = torch.stack([(gains.double().reshape(-1, pattern.m) * mask).sum(1) for mask in masks])
    expected = torch.zeros_like(logits, dtype=torch.float64).reshape(-1, pattern.m)
    for mask, own in zip(masks, gained, strict=True):
        advantage = own - (gained.sum(0) - own) / (count - 1)
        expected += 0.5 * advantage.unsqueeze(1) * score(logits.double().reshape(-1, pattern.m), mask)
    updates = [(0.5, draw) for draw in range(count)]
    updated, _ = run(logits, pattern, isa=isa, updates=updates, gains=gains, seed=seed)
    difference = (updated.double() - logits.double()).reshape(-1, pattern.m) - expected
    assert float(difference.abs().max()) < 2e-5 * count


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 4), (3, 8), (8, 16)])
def test_flips_are_the_groups_whose_mask_is_not_a_most_likely_one(isa, n, m):
    if isa not in _cpu.available_isas():
        pytest.skip(f"this machine has no {isa}")
    for groups in (1, 3, 37):  # also fewer than a vector has lanes, whose unused lanes must not count
        logits = torch.randn((1, groups * m), generator=torch.Generator().manual_seed(groups))
        weight = torch.ones(logits.shape)
        masked, flips = torch.empty_like(weight), torch.tensor([100])
        arguments = [logits, weight, masked, None, flips, n, m, [(0.5, 5)], 6, 1, 0, isa, 2]
        _cpu.policy_step(*arguments)
        found, likely = masked.reshape(-1, m) != 0, most_likely(logits.reshape(-1, m), n)
        assert int(flips) == 100 + int((found != likely).any(1).sum())
        assert n == m or groups < 37 or int(flips) > 100


@pytest.mark.parametrize(("n", "m"), [(1, 16), (8, 16), (15, 16)])
def test_large_groups(n, m):
    logits = 3 * torch.randn((1, 5 * m), generator=torch.Generator().manual_seed(n))
    isa = _cpu.available_isas()[0]
    _, mask = run(logits, NMPattern(n, m), isa=isa, draw=4)
    updated, _ = run(logits, NMPattern(n, m), isa=isa, updates=[(1.0, 4)])
    expected = logits.double() + score(logits.double().reshape(-1, m), mask.reshape(-1, m)).reshape(logits.shape)
    torch.testing.assert_close(updated.double(), expected, rtol=0, atol=5e-5)  # a sum of 2^15 for 15:16


@given(pattern=PATTERNS, rows=st.integers(1, 9), groups=st.integers(1, 60), seed=st.integers(0, 2**32))
@settings(max_examples=60)
def test_every_instruction_set_and_number_of_threads_gives_the_same_bits(pattern, rows, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 6 * torch.randn(rows, groups * pattern.m, generator=generator)
    arguments = {"updates": [(0.3, 5), (-2.0, 6)], "draw": 11, "seed": seed, "stream": 3}
    if seed % 2:
        arguments["gains"] = torch.randn(logits.shape, generator=generator)
    expected = run(logits, pattern, isa="portable", **arguments)
    for isa in _cpu.available_isas():
        for threads in (1, 3):
            found = run(logits, pattern, isa=isa, threads=threads, **arguments)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(("n", "m", "limit"), [(1, 4, 21.1), (2, 4, 25.7), (2, 8, 66.5)])
def test_frequencies_pass_a_chi_square_test(n, m, limit):
    """99.99% quantiles with 3, 5 and 27 degrees of freedom."""
    draws = 1 << 18
    row = torch.randn(m, generator=torch.Generator().manual_seed(2))
    _, mask = run(row.repeat(1, draws), NMPattern(n, m), isa=_cpu.available_isas()[0], draw=3)
    masks, counts = mask.reshape(-1, m).unique(dim=0, return_counts=True)
    expected = draws * log_prob(row.double().expand(len(masks), m), masks).exp()
    assert len(masks) == math.comb(m, n)
    assert float(((counts - expected) ** 2 / expected).sum()) < limit


def test_streams_and_draws_differ():
    logits = torch.zeros(64, 64)
    pattern = NMPattern(2, 4)
    isa = _cpu.available_isas()[0]
    masks = [run(logits, pattern, isa=isa, draw=d, stream=s)[1] for d in (0, 1, 1 << 32) for s in (0, 1)]
    for i, first in enumerate(masks):
        for second in masks[:i]:
            assert 0.45 < float((first == second).float().mean()) < 0.55


@pytest.mark.parametrize("value", [100.0, -100.0])
def test_extreme_logits_stay_finite(value):
    for pattern in (NMPattern(1, 4), NMPattern(2, 4), NMPattern(4, 8)):
        logits = torch.zeros(1, 64)
        logits[0, :: pattern.m] = value
        logits[0, 1 :: pattern.m] = -value
        updated, _ = run(logits, pattern, isa=_cpu.available_isas()[0], updates=[(1.0, 0)])
        assert bool(torch.isfinite(updated).all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("updates", [1, 100])
def test_threads_keep_to_their_own_groups(isa, updates):
    """With enough groups that threads run side by side, and enough updates to fill their tables."""
    if isa not in _cpu.available_isas():
        pytest.skip(f"this machine has no {isa}")
    pattern, coefficients = NMPattern(2, 4), [(0.01, draw) for draw in range(updates)]
    logits = 3 * torch.randn((64, 4096), generator=torch.Generator().manual_seed(0))
    expected = run(logits, pattern, isa=_cpu.available_isas()[0], updates=coefficients, draw=7)
    for threads in (1, 2, 4):
        found = run(logits, pattern, isa=isa, threads=threads, updates=coefficients, draw=7)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("row", "second"),
    [
        ([100.0, -90.0, -100.0, -100.0], [0.0, 1.0, 4.5e-5, 4.5e-5]),
        ([-100.0, 100.0, -100.0, -100.0], [1 / 3, 0.0, 1 / 3, 1 / 3]),
        ([100.0, 100.0, 100.0, -100.0], [2 / 3, 2 / 3, 2 / 3, 0.0]),
    ],
    ids=str,
)
def test_the_second_of_two_is_right_however_far_the_first_is_ahead(isa, row, second):
    if isa not in _cpu.available_isas():
        pytest.skip(f"this machine has no {isa}")
    groups = 4000
    _, mask = run(torch.tensor(row).repeat(1, groups), NMPattern(2, 4), isa=isa, draw=3)
    found = mask.reshape(groups, 4).double().mean(0)
    expected = torch.tensor(second, dtype=torch.float64)
    expected[expected == 0] = (torch.tensor(row) == 100.0).double()[expected == 0]  # certain: the first
    deviation = (expected * (1 - expected) / groups).sqrt()
    assert bool(((found - expected).abs() <= 5 * deviation + 1 / groups).all()), found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": NMPattern(2, 32)}, "expected groups of"),
        ({"logits": torch.zeros(2, 16).double()}, "float32 logits"),
        ({"flips": torch.zeros(1)}, "one int64 of flips, found torch.float32"),
        ({"logits": torch.zeros(16, 2).T}, "contiguous float32 logits"),
        ({"logits": torch.zeros(2, 18)}, "4 does not divide in_features = 18"),
        ({"masked": torch.zeros(2, 8)}, r"masked of shape \(2, 16\), found \(2, 8\)"),
        ({"weight": None}, "weight of shape"),
        ({"weight": torch.zeros(2, 16).bfloat16()}, "of one dtype"),
        ({"updates": [(math.nan, 0)]}, "coefficient is nan"),
        ({"updates": [(1e39, 0)]}, r"coefficient is 1e\+39: expected one that float32 holds"),
        ({"updates": [(1.0, -1)]}, "draw: expected a number of 64 bits, found -1"),
        ({"stream": 1 << 30}, "stream: expected a number of 30 bits, found 1073741824"),
        ({"seed": 1 << 64}, "seed: expected a number of 64 bits"),
        ({"gains": torch.zeros(2, 16), "updates": [(1.0, 0)]}, "compare 2 to 16 draws, found 1"),
        ({"gains": torch.zeros(2, 8), "updates": [(1.0, 0)] * 2}, r"gains of shape \(2, 16\)"),
    ],
    ids=str,
)
def test_impossible_arguments(changes, message):
    arguments = {"logits": torch.zeros(2, 16), "pattern": NMPattern(2, 4), "weight": torch.ones(2, 16)}
    arguments |= {"masked": torch.zeros(2, 16), "seed": 0, "stream": 0} | changes
    with pytest.raises(ValueError, match=message):
        policy_step(arguments.pop("logits"), arguments.pop("pattern"), **arguments)
