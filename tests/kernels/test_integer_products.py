"""2:4 with int8 values on AMX, few tokens: activations become integers, and sums of a digit's products are exact."""

from __future__ import annotations

import pytest
import torch
from exact import exact_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from maskpro_kernels import NMPattern, NMWeight, _cpu, pack, to_int8
from maskpro_kernels.interleaved import interleave

MOST_TOKENS = 5
UNIT = torch.finfo(torch.float32).eps / 2
HALF_ULP = torch.finfo(torch.bfloat16).eps / 2

pytestmark = pytest.mark.skipif("amx-bf16" not in _cpu.available_isas(), reason="this machine has no amx-bf16")


def run(x: torch.Tensor, weight: NMWeight) -> torch.Tensor:
    order = interleave(weight)
    rows, columns = weight.shape
    return torch.ops.maskpro.nm_linear_interleaved(
        x, order.data, weight.scale, None, rows, columns, 2, 4, torch.int8, _cpu.ISA_CODES["amx-bf16"]
    )


def levels(dense: torch.Tensor) -> NMWeight:
    """A weight whose int8 values are those of ``dense``, of scale 1."""
    weight = pack(dense.float(), NMPattern(2, 4))
    return NMWeight(weight.values.to(torch.int8), weight.bitmask, weight.shape, weight.pattern, torch.ones(len(dense)))


def random_bfloat16(shape: tuple[int, ...], least: int, most: int, generator: torch.Generator) -> torch.Tensor:
    """Eight random bits, times two to any power from ``least`` to ``most``."""
    significand = torch.randint(128, 256, shape, generator=generator) * (
        1 - 2 * torch.randint(0, 2, shape, generator=generator)
    )
    return torch.ldexp(significand.double(), torch.randint(least - 7, most - 6, shape, generator=generator)).bfloat16()


SHAPES = {
    "rows": st.integers(1, 70),
    "groups": st.integers(1, 40) | st.integers(41, 700),
    "tokens": st.integers(1, MOST_TOKENS),
    "seed": st.integers(0, 2**31),
}


@given(**SHAPES, offset=st.integers(-90, 100))
@settings(max_examples=80)
def test_sums_are_exact_where_no_activation_is_far_below_the_largest(rows, groups, tokens, seed, offset):
    """The error does not grow with the number of terms: a float32 or two of each digit, and y's own rounding."""
    generator = torch.Generator().manual_seed(seed)
    weight = to_int8(pack(torch.randn((rows, 4 * groups), generator=generator), NMPattern(2, 4)))
    x = random_bfloat16((tokens, 4 * groups), offset - 14, offset, generator)
    dense = exact_weight(weight)
    exact = x.double() @ dense.T
    error = (run(x, weight).double() - exact).abs()
    assert (error <= HALF_ULP * exact.abs() + 6 * UNIT * (x.double().abs() @ dense.abs().T)).all()


@given(**SHAPES)
@settings(max_examples=80)
def test_what_is_far_below_the_largest_is_rounded_to_a_fraction_of_it(rows, groups, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = levels(torch.randint(-127, 128, (rows, 4 * groups), generator=generator))
    x = random_bfloat16((tokens, 4 * groups), -40, 10, generator)
    dense = exact_weight(weight)
    exact = x.double() @ dense.T
    rounded = 2.0**-23 * (256 / 255) * x.double().abs().amax(1, keepdim=True) * dense.abs().sum(1)
    error = (run(x, weight).double() - exact).abs()
    assert (error <= HALF_ULP * exact.abs() + rounded + 6 * UNIT * (x.double().abs() @ dense.abs().T)).all()


@pytest.mark.parametrize("place", range(4))
def test_every_bfloat16_but_the_smallest_is_taken_exactly(place):
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = patterns[torch.isfinite(patterns)]
    x = torch.zeros(len(finite), 4).bfloat16()
    x[:, place] = finite
    one = torch.zeros(1, 4)
    one[0, place] = 1
    y = torch.cat([run(some, levels(one)) for some in x.split(MOST_TOKENS)])[:, 0]
    exact = finite.abs() >= 2.0**-119
    assert torch.equal(y[exact], finite[exact])
    assert ((y - finite).float().abs() <= torch.finfo(torch.bfloat16).smallest_normal / 2).all()


@pytest.mark.parametrize("columns", [4, 60, 64, 68, 2048])
def test_the_largest_values_and_activations_there_are(columns):
    """Levels of -128, which only other packers write, and activations that would round up to a digit of 128."""
    kept = torch.tensor([-128.0, 0, 127, 0]).repeat(18, columns // 4)
    for largest in (255 / 128, 254 / 128, 1.0, -255 / 128):
        x = torch.full((5, columns), largest).bfloat16()
        x[:, ::4] *= -1
        expected = x.double() @ kept.double().T
        assert torch.equal(run(x, levels(kept)), expected.bfloat16())


def test_what_float32_sums_would_lose():
    kept = torch.tensor([127.0, 127, 0, 0]).repeat(3, 1024)
    kept[:, 2048:] *= -1
    x = torch.ones(2, 4096).bfloat16()
    for place in (0, 2047, 2048, 4095):
        group = slice(place // 4 * 4, place // 4 * 4 + 4)
        mirror = slice(4092 - group.start, 4096 - group.start)
        weight, activations = kept.clone(), x.clone()
        weight[:, group] = weight[:, mirror] = 0
        weight[:, place] = 1
        activations[:, place] = 2.0**-14
        assert torch.equal(run(activations, levels(weight)), torch.full((2, 3), 2.0**-14).bfloat16())


@pytest.mark.parametrize("columns", [4 * (1 << 16) - 4, 4 * (1 << 16)])
def test_the_longest_sums_do_not_overflow(columns):
    """The most columns whose sums fit 32 bits, and four more, which are multiplied otherwise."""
    for level, activation in ((-128.0, -128.0), (127.0, -32768.0), (-128.0, 127 * 65536.0)):
        kept = torch.tensor([level, level, 0, 0]).repeat(1, columns // 4)
        x = torch.full((1, columns), activation).bfloat16()
        x[0, -1] = 2.0**22  # meets no kept value; makes a digit's unit 1
        assert torch.equal(run(x, levels(kept)), (x.double() @ kept.double().T).bfloat16())


@pytest.mark.parametrize("tokens", [1, MOST_TOKENS])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_token_that_is_not_finite_gives_nan_and_leaves_the_others_alone(tokens, value):
    weight = levels(torch.randint(-127, 128, (40, 132)))
    x = torch.randn(tokens, 132).bfloat16()
    expected = run(x, weight)
    x[tokens // 2, 131] = value
    y = run(x, weight)
    assert torch.isnan(y[tokens // 2]).all()
    others = torch.arange(tokens) != tokens // 2
    assert torch.equal(y[others], expected[others])


def test_a_token_of_zeros():
    x = torch.zeros(3, 64).bfloat16()
    x[1] = 1
    y = run(x, levels(torch.ones(20, 64)))
    assert torch.equal(y, torch.tensor([0.0, 32, 0]).bfloat16().unsqueeze(1).expand(3, 20))
