"""Who multiplies the output head: our kernel where it is ahead, vLLM's method otherwise."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import Parameter

from maskpro_kernels import _cpu
from maskpro_serve.quantization import head

pytestmark = pytest.mark.vllm

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OUT, IN = 80, 64


@pytest.fixture
def loaded(monkeypatch):
    """A head after loading, for dtypes of activations and checkpoint; maybe tied to an embedding."""

    def load(activation, stored, weight=None, *, tied=False, head_dtype=None, speculative=None, may_round=False):
        model = SimpleNamespace(dtype=activation, head_dtype=head_dtype or activation)
        config = SimpleNamespace(model_config=model, speculative_config=speculative)
        monkeypatch.setattr(head, "get_current_vllm_config", lambda: config)
        if weight is None:
            weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)).to(stored).to(activation)
        layer = torch.nn.Module()
        layer.weight = Parameter(weight, requires_grad=False)
        method = head.HeadMethod(stored, may_round=may_round)
        if tied:
            embedding = torch.nn.Module()
            embedding.weight = layer.weight
            layer = method.tie_weights(layer, embedding)
        method.process_weights_after_loading(layer)
        return method, layer

    return load


@pytest.mark.parametrize(
    ("activation", "stored", "most"),
    [(F32, BF16, 32), (F32, F16, 32), (F32, F32, 0), (F16, F16, 0), (BF16, F16, 0)],
    ids=str,
)
def test_few_rows_are_ours_and_both_give_the_product(loaded, activation, stored, most):
    method, layer = loaded(activation, stored)
    assert hasattr(layer, "maskpro_head") == (most > 0)
    inputs = [torch.randn(rows, IN).to(activation) for rows in (1, 2, 3, 32, 33)]
    none = [torch.empty(0, IN)] if activation == F32 else []  # vLLM's method of 16 bits cannot
    for x in (*inputs, *none):
        check(method.apply(layer, x), x, layer.weight)
    if most:
        layer.maskpro_head.data.zero_()  # now our kernel's answer shows
        assert [len(x) for x in inputs if not method.apply(layer, x).any()] == [1, 2, 3, most]


@pytest.mark.parametrize(
    ("more", "read"),
    [({}, False), ({"tied": True}, True), ({"speculative": SimpleNamespace()}, True)],
    ids=["alone", "tied", "draft model"],
)
def test_bfloat16_activations_are_ours_where_there_is_amx(loaded, more, read):
    """What the kernel reads is all that stays, but where somebody else reads the weight."""
    weight = torch.randn(OUT, IN).bfloat16()
    method, layer = loaded(BF16, BF16, weight, **more)
    amx = "amx-bf16" in _cpu.available_isas()
    assert hasattr(layer, "maskpro_head") == amx
    assert layer.weight.numel() == (0 if amx and not read else weight.numel())
    method.process_weights_after_loading(layer)  # once more changes nothing
    bias = torch.randn(OUT).bfloat16()
    for rows in (*([0] if amx else []), 1, 2, 32, 33, 300):
        x = torch.randn(rows, IN).bfloat16()
        check(method.apply(layer, x), x, weight)
        check(method.apply(layer, x, bias), x, weight, bias)
    if amx:
        layer.maskpro_head.data.zero_()
        assert not any(method.apply(layer, torch.randn(rows, IN).bfloat16()).any() for rows in (1, 33, 300))


@pytest.mark.parametrize("stored", [BF16, F32], ids=str)
@pytest.mark.parametrize("activation", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    ("more", "read"),
    [({}, False), ({"tied": True}, True), ({"speculative": SimpleNamespace()}, True)],
    ids=["alone", "tied", "draft model"],
)
def test_a_head_that_may_be_rounded_is_for_any_number_of_rows(loaded, activation, stored, more, read):
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)).to(stored).to(activation)
    weight[7] = 0
    method, layer = loaded(activation, stored, weight, may_round=True, **more)
    assert layer.maskpro_head.nbytes == OUT * IN
    assert layer.weight.numel() == (weight.numel() if read else 0)
    assert not read or torch.equal(layer.weight, weight)
    method.process_weights_after_loading(layer)  # once more changes nothing
    scale = weight.float().abs().amax(1, keepdim=True) / 127  # as FORMAT.md says; a half of it is a tie
    rounded = torch.where(scale > 0, (weight.float() / scale).round().double() * scale, 0)
    bias = torch.randn(OUT).to(activation)
    for rows in (0, 1, 2, 32, 33, 300):
        x = torch.randn(rows, IN).to(activation)
        check(method.apply(layer, x), x, rounded)
        check(method.apply(layer, x, bias), x, rounded, bias)
    assert not torch.equal(weight.double(), rounded)


@pytest.mark.parametrize(
    "more",
    [
        {"head_dtype": torch.float64},
        {"weight": torch.randn(OUT, 66).bfloat16()},
        {"weight": torch.full((OUT, IN), torch.nan).bfloat16()},
    ],
    ids=["head of another dtype", "no groups of four", "NaN"],
)
def test_where_our_kernels_cannot_a_head_is_not_rounded(loaded, more):
    _, layer = loaded(BF16, BF16, may_round=True, **more)
    assert not hasattr(layer, "maskpro_head")


def check(found, x, weight, bias=None):
    product = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert found.dtype == x.dtype
    torch.testing.assert_close(found.double(), product, rtol=2**-7 if x.dtype == BF16 else 2**-9, atol=2**-8)


@pytest.mark.parametrize("activation", [F32, BF16], ids=str)
def test_another_dtype_of_the_head_is_vllms(loaded, activation):
    """It reads the weight then, and widens it for every product."""
    method, layer = loaded(activation, BF16, head_dtype=torch.float64)
    assert not hasattr(layer, "maskpro_head")
    assert layer.weight.shape == (OUT, IN)
    x = torch.randn(3, IN).to(activation)
    check(method.apply(layer, x), x, layer.weight)


def test_a_head_of_more_bits_than_the_checkpoint_says_stays_whole(loaded):
    _, layer = loaded(F32, BF16, torch.full((OUT, IN), 1 + 2**-12))
    assert not hasattr(layer, "maskpro_head")


@pytest.mark.parametrize("may_round", [False, True])
def test_the_reference_has_no_order_for_it(loaded, monkeypatch, may_round):
    monkeypatch.setenv("MASKPRO_KERNEL", "reference")
    assert not hasattr(loaded(F32, BF16, may_round=may_round)[1], "maskpro_head")
