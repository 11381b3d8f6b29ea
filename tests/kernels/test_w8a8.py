"""Weights and activations of 8 bits: the reference from its definition, and cuSPARSELt's way against the reference.

cuSPARSELt itself runs on a GPU only. Elsewhere its two operators are stood in for by what their contract says, so that
what is ours is tested: the buffer, the padding, and which number is applied where.
"""

from __future__ import annotations

import pytest
import torch
from fake_gpu import rounded_and_padded

from maskpro_kernels import NMPattern, NMWeight, pack, to_int8, unpack
from maskpro_kernels.activations import LARGEST, EightBitInputs
from maskpro_kernels.bits import pack_bits, unpack_bits
from maskpro_kernels.cuda import semi_structured
from maskpro_kernels.reference import nm_linear_reference, nm_linear_w8a8_reference

INT8, FP8 = torch.int8, torch.float8_e4m3fn
EIGHT = pytest.mark.parametrize("dtype", [INT8, FP8], ids=str)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(8)


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
    assert scale.shape == ((1, 1) if static and dtype == FP8 else (7, 1))
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
    assert torch.equal(EightBitInputs(dtype).simulated(x.reshape(3, 3, 128)).reshape(9, 128), levels.float() * scale)
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
@pytest.mark.parametrize("scale", [None, 0.5])
def test_what_is_not_a_number_stays_none(dtype, scale):
    x = torch.ones(3, 8)
    x[0, 3], x[1, 3] = torch.nan, torch.inf
    found = EightBitInputs(dtype, None if scale is None else torch.tensor(scale)).simulated(x)
    assert found[0, 3].isnan()
    assert found[1, 3].isnan() == (scale is None)  # or clipped
    assert (found[2] == 1).all()


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
    expected = (x.double() @ dense_levels(weight).double().T) * weight.scale
    y = nm_linear_reference(x.double(), weight.values, weight.bitmask, weight.scale, None)
    assert torch.allclose(y, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(unpack(weight), dense_levels(weight) * weight.scale[:, None])


def test_refusals():
    with pytest.raises(ValueError, match=r"activations: expected one of \(torch\.int8, .* found torch\.uint8"):
        EightBitInputs(torch.uint8)
    with pytest.raises(ValueError, match=r"activations: scale: expected one number of torch\.float32, found .* \(2,\)"):
        EightBitInputs(INT8, torch.ones(2))
    weight = eight_bit_weight(FP8, (2, 8))
    with pytest.raises(ValueError, match=r"scale: expected one with values of torch\.float8_e4m3fn, found none"):
        NMWeight(weight.values, weight.bitmask, weight.shape, weight.pattern)


class CuSparseLt:
    """What torch.ops.aten._cslt_compress and _cslt_sparse_mm are said to do with 8 bits, and what they refuse."""

    @staticmethod
    def compress(sparse: torch.Tensor) -> torch.Tensor:
        """Values, and behind them the positions in some order of its own: here, those of the bitmask."""
        rows, columns = sparse.shape
        assert rows % 32 == columns % 32 == 0
        mask = sparse.float() != 0
        values = sparse.view(torch.uint8)[mask]
        return torch.cat([values, pack_bits(mask).flatten()]).view(sparse.dtype).reshape(rows, columns * 5 // 8)

    @staticmethod
    def multiply(buffer, dense, bias=None, alpha=None, out_dtype=None, transpose_result=False):
        columns, tokens = dense.shape
        rows = buffer.shape[0]
        assert buffer.dtype == dense.dtype
        assert tokens % 16 == 0
        assert dense.t().is_contiguous()  # int8 and fp8 tensor cores read both operands along the columns of W
        assert alpha.dtype == torch.float32
        assert alpha.shape == (rows,)
        assert alpha.is_contiguous()
        assert bias is None  # it would be added before a token's scale
        assert transpose_result
        values, bits = buffer.view(torch.uint8).flatten().tensor_split([rows * columns // 2])
        mask = unpack_bits(bits.reshape(rows, columns // 8), columns)
        weight = torch.zeros((rows, columns), dtype=torch.uint8).masked_scatter_(mask, values).view(buffer.dtype)
        product = weight.double() @ dense.double()
        return (product.float() * alpha[:, None]).to(out_dtype).t().contiguous()


@pytest.fixture
def cusparselt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_cslt_compress", CuSparseLt.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", CuSparseLt.multiply)
    monkeypatch.setattr("maskpro_kernels.triton.round_inputs.round_inputs", rounded_and_padded)


def check_w8a8(x: torch.Tensor, weight: NMWeight, inputs: EightBitInputs, bias: torch.Tensor | None) -> None:
    """cuSPARSELt's way against the reference: two roundings to 16 bits, one before and one after a token's scale."""
    buffer = semi_structured.cusparselt_buffer(weight.values, weight.bitmask, weight.shape[1])
    assert torch.equal(
        semi_structured.values_of_buffer(buffer, weight.values.shape).view(torch.uint8), weight.values.view(torch.uint8)
    )
    eight_bit = semi_structured.eight_bit_weight(buffer, weight.scale, inputs)
    y = semi_structured.w8a8_linear(x, eight_bit, bias)
    assert y.dtype == x.dtype
    assert y.shape == (x.shape[0], weight.shape[0])
    arguments = (weight.values, weight.bitmask, weight.scale)
    without = nm_linear_w8a8_reference(x.float(), *arguments, None, inputs)
    exact = without if bias is None else without + bias.float()
    eps = torch.finfo(x.dtype).eps
    assert torch.isfinite(exact).all()
    assert ((y.float() - exact).abs() <= 0.51 * eps * (without.abs() + exact.abs()) + 1e-5).all()


@pytest.mark.parametrize("activation", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("tokens", "biased"), [(1, False), (16, True), (37, True)])
@EIGHT
def test_cusparselt_is_given_what_it_wants(cusparselt, dtype, tokens, biased, static, activation):
    weight = eight_bit_weight(dtype, (64, 96))
    weight.values.view(torch.uint8)[:, ::5] = 0  # a kept value may be zero
    bias = torch.randn(64).to(activation) if biased else None
    inputs = EightBitInputs(dtype, torch.tensor([0.01]) if static else None)
    check_w8a8(torch.randn(tokens, 96).to(activation), weight, inputs, bias)


@EIGHT
def test_float16_holds_what_lies_between(cusparselt, dtype):
    """1,024 weights of 1 and small activations: without the token's share in alpha it would be 127 * 1,024."""
    weight = eight_bit_weight(dtype, (32, 2048), per_tensor=True)
    weight.values[:] = torch.full(weight.values.shape, LARGEST[dtype]).to(dtype)
    ones = NMWeight(weight.values, weight.bitmask, weight.shape, weight.pattern, torch.full((32,), 1 / LARGEST[dtype]))
    check_w8a8(torch.full((16, 2048), 0.01).half(), ones, EightBitInputs(dtype), None)


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


class TestOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("tokens", [1, 64, 513])
    @pytest.mark.parametrize("static", [False, True])
    @EIGHT
    def test_cusparselt_against_the_reference(self, dtype, static, tokens):
        """e4m3 sums have fewer bits on some tensor cores, so the norm is compared."""
        if dtype == FP8 and torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("needs compute capability 8.9")
        weight = eight_bit_weight(dtype, (256, 512))
        values, bitmask, scale = weight.values.cuda(), weight.bitmask.cuda(), weight.scale.cuda()
        inputs = EightBitInputs(dtype, torch.tensor([0.02], device="cuda") if static else None)
        buffer = semi_structured.cusparselt_buffer(values, bitmask, 512)
        eight_bit = semi_structured.eight_bit_weight(buffer, scale, inputs)
        x, bias = torch.randn((tokens, 512), device="cuda").bfloat16(), torch.randn(256, device="cuda").bfloat16()
        for given in (None, bias):
            y = semi_structured.w8a8_linear(x, eight_bit, given).float()
            expected = nm_linear_w8a8_reference(x.float(), values, bitmask, scale, given, inputs)
            assert (y - expected).norm() <= 2**-7 * expected.norm()
