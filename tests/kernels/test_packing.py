"""The packed layout: exact for every pattern, strict about what it accepts, and pinned byte for byte."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import PATTERNS
from hypothesis import given, settings
from hypothesis import strategies as st

from maskpro_kernels import NMPattern, NMWeight, _cpu, pack, unpack
from maskpro_kernels.bits import count_bits, pack_bits, unpack_bits
from maskpro_kernels.errors import NativeLibraryError
from maskpro_kernels.packing import check_bitmask, check_mask, magnitude_mask, pack_under

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def random_mask(rows: int, groups: int, pattern: NMPattern, seed: int) -> torch.Tensor:
    scores = torch.rand((rows * groups, pattern.m), generator=torch.Generator().manual_seed(seed))
    return (
        torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(pattern.n).indices, True).reshape(rows, -1)
    )


@given(PATTERNS, st.integers(1, 5), st.integers(1, 9), DTYPES, st.integers(0, 2**31))
@settings(max_examples=150)
def test_unpack_restores_kept_weights_bit_for_bit(pattern, rows, groups, dtype, seed):
    # Random bit patterns, so that NaN payloads, infinities and -0.0 are among the kept weights.
    generator = torch.Generator().manual_seed(seed)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    info = torch.iinfo(integer)
    dense = torch.randint(info.min, info.max, (rows, groups * pattern.m), generator=generator, dtype=torch.int64).to(
        integer
    )
    mask = random_mask(rows, groups, pattern, seed)
    weight = pack(dense.view(dtype), pattern, mask)
    assert torch.equal(unpack(weight).view(integer), torch.where(mask, dense, 0).to(integer))
    assert torch.equal(unpack_bits(weight.bitmask, dense.shape[1]), mask)
    assert weight.nbytes == rows * (groups * pattern.n * dtype.itemsize + (groups * pattern.m + 7) // 8)


@given(PATTERNS, st.integers(0, 2**31))
@settings(max_examples=60)
def test_permuting_groups_permutes_the_packed_groups(pattern, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn((3, 6, pattern.m), generator=generator)
    order = torch.randperm(6, generator=generator)
    values = pack(dense.flatten(1), pattern).values.reshape(3, 6, pattern.n)
    permuted = pack(dense[:, order].flatten(1), pattern).values.reshape(3, 6, pattern.n)
    assert torch.equal(permuted, values[:, order])


@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**31))
def test_bits_round_trip_at_any_width(rows, columns, seed):
    mask = torch.rand((rows, columns), generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack_bits(mask)
    assert torch.equal(unpack_bits(packed, columns), mask)
    for group in (4, 8, 16, 32):
        whole = 8 * packed.shape[1] // group
        padded = torch.nn.functional.pad(mask, (0, 8 * packed.shape[1] - columns))
        expected = padded[:, : whole * group].reshape(rows, whole, group).sum(-1)
        assert torch.equal(count_bits(packed, group).long(), expected)


@pytest.mark.golden
def test_packed_bytes(golden):
    dense = torch.tensor([[0, 5, 0, -3, 1, 0, 0, 2], [7, -7, 7, 7, 0, 0, 0, 0]], dtype=torch.bfloat16)
    weight = pack(dense, NMPattern.parse("2:4"))
    # Worked by hand in FORMAT.md (first row) and by the tie rule (second).
    assert weight.bitmask.tolist() == [[0b10011010], [0b00110011]]
    assert weight.values.tolist() == [[5, -3, 1, 2], [7, -7, 0, 0]]
    content = weight.values.view(torch.uint8).numpy().tobytes() + weight.bitmask.numpy().tobytes()
    golden("packed-2x8-2to4-bf16.bin", content)


def test_magnitude_ties_go_to_the_lower_column():
    mask = magnitude_mask(torch.tensor([[1.0, -1.0, 1.0, 1.0, 0.0, 2.0, -2.0, 2.0]]), NMPattern(2, 4))
    assert mask.tolist() == [[True, True, False, False, False, True, True, False]]


def test_bits_per_weight():
    assert NMPattern.parse("2:4").bits_per_weight(torch.bfloat16) == 9
    assert NMPattern.parse("2:8").bits_per_weight(torch.bfloat16) == 5
    assert NMPattern.parse("4:8").bits_per_weight(torch.float32) == 17


@pytest.mark.parametrize("text", ["", "2", "2:5", "5:4", "0:4", "2:4 ", "-1:4", "2:64", "a:b", None])
def test_unknown_patterns_are_named(text):
    with pytest.raises(ValueError, match="pattern"):
        NMPattern.parse(text)


def test_a_mask_that_is_not_strict_is_located():
    mask = torch.tensor([[True, True, False, False]] * 3).repeat(1, 4)
    mask[1, 9] = False
    mask[2, 2] = True
    with pytest.raises(
        ValueError, match=r"row 1, group 2 \(columns 8 to 11\) keeps 1 of 4, expected 2; 2 of 12 groups"
    ):
        check_mask(mask, NMPattern(2, 4))


def test_pack_refuses_what_it_cannot_keep():
    pattern = NMPattern(2, 4)
    with pytest.raises(ValueError, match="4 does not divide in_features = 6"):
        pack(torch.ones(2, 6), pattern)
    with pytest.raises(ValueError, match="found shape"):
        pack(torch.ones(8), pattern)
    with pytest.raises(ValueError, match="float64"):
        pack(torch.ones(2, 8, dtype=torch.float64), pattern)
    with pytest.raises(ValueError, match="NaN"):
        pack(torch.full((1, 4), torch.nan), pattern)
    with pytest.raises(ValueError, match=r"expected torch\.bool \(2, 8\)"):
        pack(torch.ones(2, 8), pattern, torch.ones(2, 4, dtype=torch.bool))


def test_weight_parts_must_agree():
    weight = pack(torch.randn(4, 16), NMPattern(2, 4))
    for change in (
        {"values": weight.values[:, :-1]},
        {"bitmask": weight.bitmask[:-1]},
        {"bitmask": weight.bitmask.to(torch.int8)},
        {"values": weight.values.double()},
        {"pattern": NMPattern(1, 4)},
        {"shape": (4, 20)},
    ):
        with pytest.raises(ValueError, match="expected"):
            dataclasses.replace(weight, **change)


@pytest.mark.parametrize(("pattern", "columns"), [("2:4", 12), ("2:4", 16), ("3:8", 16), ("8:16", 32), ("5:32", 64)])
def test_every_flipped_bit_is_found(pattern, columns):
    weight = pack(torch.randn(2, columns), NMPattern.parse(pattern))
    check_bitmask(weight)
    for byte in range(weight.bitmask.shape[1]):
        for bit in range(8):
            bitmask = weight.bitmask.clone()
            bitmask[1, byte] ^= 1 << bit
            broken = NMWeight(weight.values, bitmask, weight.shape, weight.pattern)
            with pytest.raises(ValueError, match=r"row 1, group|past column"):
                check_bitmask(broken)


@given(PATTERNS, st.integers(1, 3), st.integers(1, 9), DTYPES, st.sampled_from([0x00, 0x01, 0x80, 0xFF]))
def test_a_wrong_bitmask_reaches_no_memory_of_others(pattern, rows, groups, dtype, byte):
    """Which the sanitizers see: whatever the bits say, as many values as the pattern has are made."""
    dense = torch.arange(rows, dtype=dtype).unsqueeze(1).repeat(1, groups * pattern.m)
    bitmask = torch.full((rows, (dense.shape[1] + 7) // 8), byte, dtype=torch.uint8)
    values = _cpu.kept_values(dense, bitmask, pattern.n, pattern.m)
    assert values.shape == (rows, groups * pattern.n)
    if byte == 0xFF:
        assert torch.equal(values, dense[:, : groups * pattern.n])


def test_a_bitmask_of_another_shape_is_refused_before_it_is_read():
    pattern, dense = NMPattern(2, 4), torch.ones(3, 16)
    bitmask = pack_bits(magnitude_mask(dense, pattern))
    assert torch.equal(pack_under(bitmask, dense, pattern).values, torch.ones(3, 8))
    for wrong in (bitmask[:2], bitmask[:, :1], bitmask.to(torch.int8)):
        with pytest.raises(ValueError, match=r"bitmask: expected torch\.uint8 \(3, 2\) on cpu, found"):
            pack_under(wrong, dense, pattern)
    with pytest.raises(ValueError, match="float64"):
        pack_under(bitmask, dense.double(), pattern)


def test_packing_needs_no_native_library(monkeypatch):
    def missing():
        raise NativeLibraryError("not built")

    dense = torch.randn(3, 36).bfloat16()
    weight = pack(dense, NMPattern(2, 4))
    monkeypatch.setattr(_cpu, "library", missing)
    again = pack(dense, NMPattern(2, 4))
    assert torch.equal(again.values, weight.values)
    assert torch.equal(again.bitmask, weight.bitmask)
