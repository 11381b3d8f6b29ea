"""Kept values in 8 bits: how far off they are, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskpro_kernels import NMPattern, pack, to_int8, unpack
from maskpro_kernels.int8 import rows_to_int8


@given(
    rows=st.integers(1, 9),
    exponent=st.integers(-44, 37),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=150)
def test_a_value_is_off_by_half_a_level_at_most(rows, exponent, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn((rows, 32), generator=generator).double() * 10.0**exponent
    largest = torch.finfo(dtype).max
    weight = pack(dense.clamp(-largest, largest).to(dtype), NMPattern(2, 4))
    rounded = to_int8(weight)
    assert torch.equal(rounded.bitmask, weight.bitmask)
    assert rounded.values.abs().max() <= 127
    assert (rounded.scale >= torch.finfo(torch.float32).tiny).all()
    exact = rounded.values.double() * rounded.scale.double().unsqueeze(1)
    bound = rounded.scale.double().unsqueeze(1) * (0.5 + 1e-5)
    assert ((exact - weight.values.double()).abs() <= bound).all()


def test_levels_come_back_exactly():
    levels = torch.randint(-127, 128, (6, 32)).float()
    levels[:, 0] = 127
    weight = pack(levels * 0.5, NMPattern(4, 4))
    assert torch.equal(unpack(to_int8(weight)), levels * 0.5)


def test_a_row_of_zeros():
    rounded = to_int8(pack(torch.zeros(2, 8), NMPattern(2, 4)))
    assert torch.equal(rounded.scale, torch.ones(2))
    assert not unpack(rounded).any()


def test_rows_are_rounded_some_at_a_time():
    """More of them than are rounded at once, and not side by side in memory."""
    weight = (torch.randn((20_000, 8)) * torch.logspace(-9, 9, 20_000).unsqueeze(1)).bfloat16()[::2]
    levels, scale = rows_to_int8(weight)
    for row in (0, 4095, 4096, len(weight) - 1):
        alone, its = rows_to_int8(weight[row : row + 1])
        assert torch.equal(levels[row], alone[0])
        assert scale[row] == its[0] == weight[row].float().abs().max() / 127


def test_refusals():
    weight = pack(torch.randn(2, 8), NMPattern(2, 4))
    with pytest.raises(ValueError, match=r"expected values without a scale, found torch\.int8 with one"):
        to_int8(to_int8(weight))
    weight.values[1, 1] = torch.inf
    with pytest.raises(ValueError, match="expected finite values, found inf or NaN"):
        to_int8(weight)
