"""Weights and activations of 8 bits: what the reference computes, in integers and from the definition."""

from __future__ import annotations

import pytest
import torch

from maskpro_kernels import NMPattern, NMWeight, pack, to_int8, unpack
from maskpro_kernels.activations import LARGEST, EightBitInputs
from maskpro_kernels.bits import unpack_bits
from maskpro_kernels.reference import nm_linear_reference, nm_linear_w8a8_reference

INT8, FP8 = torch.int8, torch.float8_e4m3fn
EIGHT = pytest.mark.parametrize("dtype", [INT8, FP8], ids=str)


def eight_bit_weight(dtype: torch.dtype, shape: tuple[int, int], per_tensor: bool = False) -> NMWeight:
    """A 2:4 weight; as many of its levels as fit are used."""
    packed = pack(torch.randn(shape), NMPattern(2, 4))
    if dtype == INT8 and not per_tensor:
        return to_int8(packed)
    scale = packed.values.abs().amax(dim=1, keepdim=True) / LARGEST[dtype]
    scale = scale.amax().expand(shape[0], 1) if per_tensor else scale
    levels = packed.values / scale
    levels = (levels.round() if dtype == INT8 else levels).to(dtype)
    return NMWeight(levels, packed.bitmask, packed.shape, packed.pattern, scale.flatten().contiguous())


def dense_levels(weight: NMWeight) -> torch.Tensor:
    """(out_features, in_features), float32, without the scale."""
    mask = unpack_bits(weight.bitmask, weight.shape[1])
    return torch.zeros(weight.shape).masked_scatter_(mask, weight.values.float())


@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("static", [False, True])
@EIGHT
def test_the_reference_is_the_definition(dtype, static, per_tensor):
    """acc * s_x * s_w + bias, with acc of int32 for int8; of float32 for fp8, whose few small products are exact."""
    weight = eight_bit_weight(dtype, (24, 64), per_tensor)
    x, bias = torch.randn(7, 64).bfloat16(), torch.randn(24).bfloat16()
    inputs = EightBitInputs(dtype, torch.tensor([0.021]) if static else None)
    levels, scale = inputs.rounded(x)
    assert levels.dtype == dtype
    assert scale.shape == ((1, 1) if static else (7, 1))
    dense = dense_levels(weight)
    if dtype == INT8:
        acc = levels.int() @ dense.int().T
        assert acc.dtype == torch.int32
    else:
        acc = (levels.double() @ dense.double().T).float()
        assert torch.allclose(acc, levels.float() @ dense.T, rtol=1e-5, atol=1e-2)
    expected = (acc.float() * scale * weight.scale + bias.float()).bfloat16()
    y = nm_linear_w8a8_reference(x, weight.values, weight.bitmask, weight.scale, bias, inputs)
    assert torch.equal(y, expected)
    without = nm_linear_w8a8_reference(x, weight.values, weight.bitmask, weight.scale, None, inputs)
    assert torch.equal(without, (acc.float() * scale * weight.scale).bfloat16())


@pytest.mark.parametrize("exponent", [-38, -3, 0, 3, 37])
@EIGHT
def test_a_dynamic_activation_is_off_by_half_a_step(dtype, exponent):
    x = (torch.randn(9, 128).double() * 10.0**exponent).clamp(-3e38, 3e38).float()
    levels, scale = EightBitInputs(dtype).rounded(x)
    assert torch.isfinite(scale).all()
    assert (scale >= torch.finfo(torch.float32).tiny).all()
    step = torch.ones_like(x) if dtype == INT8 else (levels.double().abs() / 8).clamp_min(2.0**-9)
    error = (levels.double() * scale.double() - x.double()).abs()
    assert (error <= step.double() * scale.double() * (0.5 + 1e-5)).all()
    if exponent > -38:  # a scale that is a normal number: the largest of each token is the largest level
        assert (levels.double().abs().amax(1) == LARGEST[dtype]).all()


@EIGHT
def test_static_activations_are_clipped(dtype):
    x = torch.tensor([[1000.0, -1000.0, 0.3, 0.0]])
    levels, scale = EightBitInputs(dtype, torch.tensor(0.5)).rounded(x)
    lowest = -128.0 if dtype == INT8 else -448.0
    expected = [LARGEST[dtype], lowest, 1.0 if dtype == INT8 else 0.625, 0.0]
    assert levels.float().tolist() == [expected]
    assert scale.item() == 0.5


@EIGHT
def test_a_token_of_zeros(dtype):
    levels, scale = EightBitInputs(dtype).rounded(torch.zeros(2, 8))
    assert not levels.float().any()
    assert torch.isfinite(scale).all()


@EIGHT
def test_kept_values_of_8_bits_without_quantized_activations(dtype):
    """W8A16: the same weight, activations as they are; e4m3 values are taken for what they are."""
    weight = eight_bit_weight(dtype, (5, 32))
    x = torch.randn(3, 32)
    expected = x.double() @ unpack(weight).double().T
    y = nm_linear_reference(x.double(), weight.values, weight.bitmask, weight.scale, None)
    assert torch.allclose(y, expected, rtol=1e-6)
    assert torch.equal(unpack(weight), dense_levels(weight) * weight.scale[:, None])


def test_refusals():
    with pytest.raises(ValueError, match=r"activations: expected one of \(torch\.int8, .* found torch\.uint8"):
        EightBitInputs(torch.uint8)
    with pytest.raises(ValueError, match=r"activations: scale: expected one number of torch\.float32, found .* \(2,\)"):
        EightBitInputs(INT8, torch.ones(2))
    weight = eight_bit_weight(FP8, (2, 8))
    with pytest.raises(ValueError, match=r"scale: expected one with values of torch\.float8_e4m3fn, found none"):
        NMWeight(weight.values, weight.bitmask, weight.shape, weight.pattern)
