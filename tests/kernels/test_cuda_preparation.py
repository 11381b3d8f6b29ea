"""A weight made ready for a GPU that is only described: which metadata it gets, and whether activations are rounded."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from fake_gpu import AMPERE, BF16, EIGHT_BIT, FP8, HOPPER, INT8, TIMES, FakeGPU, packed

from maskpro_kernels.activations import EightBitInputs
from maskpro_kernels.cuda import Device, dispatch, preparation, prepare, semi_structured
from maskpro_kernels.cuda.dispatch import Dispatcher
from maskpro_kernels.cuda.plans import PlanTable
from maskpro_kernels.reference import nm_linear_w8a8_reference

pytestmark = pytest.mark.usefixtures("every_library")


@pytest.fixture
def prepared_here(monkeypatch, tmp_path):
    """prepare() on tensors of the CPU, as if a GPU that is given held them; cuSPARSELt's buffer is values and bits."""

    def start(device: Device, times: dict[str, float] = TIMES) -> FakeGPU:
        gpu = FakeGPU(monkeypatch, times)
        choices = Dispatcher(device, PlanTable(device, tmp_path), gpu.measure)
        for module in (dispatch, preparation):
            monkeypatch.setattr(module, "device_of", lambda tensor: device)
            monkeypatch.setattr(module, "dispatcher", lambda of: choices)
        return gpu

    def buffer(values, bitmask, in_features):
        behind = torch.zeros_like(bitmask).view(values.dtype)
        return torch.cat([values.flatten(), behind.flatten()]).reshape(values.shape[0], -1)

    monkeypatch.setattr(semi_structured, "cusparselt_buffer", buffer)
    return start


@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
def test_a_prepared_weight_rounds_activations_where_it_may(dtype, prepared_here, caplog):
    gpu = prepared_here(HOPPER)
    weight, x = packed(dtype=dtype), torch.randn(100, 128).bfloat16()
    inputs = EightBitInputs(dtype)
    prepared = prepare(weight, BF16, 100, inputs)
    assert prepared.backends == (EIGHT_BIT[dtype],)
    assert prepared.nbytes == weight.nbytes + weight.bitmask.nbytes + 4 * 64  # metadata, and alpha
    kept = prepared.weight
    assert torch.equal(kept.values.view(torch.uint8), weight.values.view(torch.uint8))
    y = dispatch.nm_linear(x, kept.values, kept.bitmask, kept.scale, None, kept.pattern)
    assert torch.equal(y, nm_linear_w8a8_reference(x, weight.values, weight.bitmask, weight.scale, None, inputs))
    assert not caplog.records
    gpu.ran.clear()
    free = prepare(packed(dtype=dtype), BF16, 100)  # nobody said that they may
    assert free.backends == ("triton",)
    assert free.metadata.parts == ()
    with pytest.raises(
        ValueError, match=r"prepare: inputs: expected torch\.bfloat16, the weight's, found torch\.(int|fl)"
    ):
        prepare(packed(), BF16, 100, inputs)


def test_metadata_that_loses_is_dropped(prepared_here):
    prepared_here(HOPPER, TIMES | {"cusparselt-int8": 11.0})
    weight = packed(dtype=INT8)
    prepared = prepare(weight, BF16, 100, EightBitInputs(INT8))
    assert prepared.backends == ("triton",)
    assert prepared.weight.values is weight.values
    assert prepared.nbytes == weight.nbytes


@pytest.mark.parametrize(
    ("device", "version", "rows", "kernel", "reason"),
    [
        (AMPERE, 801, 64, "auto", "cusparselt-fp8: needs compute capability 8.9, found 8.0"),
        (HOPPER, 502, 64, "auto", "cusparselt-fp8: needs cuSPARSELt 0.6.2 for fp8, found 502"),
        (HOPPER, 801, 48, "auto", "cusparselt-fp8: takes multiples of (32, 32)"),
        (HOPPER, 801, 64, "triton", "cusparselt-fp8: MASKPRO_KERNEL asks for another"),
    ],
)
def test_why_activations_stay_in_16_bits_is_said_once(
    device, version, rows, kernel, reason, prepared_here, monkeypatch, caplog
):
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: version)
    monkeypatch.setenv("MASKPRO_KERNEL", kernel)
    prepared_here(device)
    for _ in range(2):
        assert prepare(packed(dtype=FP8, rows=rows), BF16, 100, EightBitInputs(FP8)).backends == ("triton",)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        f"2:4 float8_e4m3fn weight of {rows} x 128: activations stay in 16 bits: {reason}"
    ]


def test_int8_needs_no_more_than_an_a100(prepared_here):
    prepared_here(AMPERE)
    assert prepare(packed(dtype=INT8), BF16, 16, EightBitInputs(INT8)).backends == ("cusparselt-int8",)


def test_16_bit_values_with_a_scale_stay_off_operators_that_apply_none(prepared_here):
    gpu = prepared_here(HOPPER)
    plain = packed(rows=32)
    assert prepare(plain, BF16, 16).backends == ("cusparselt",)
    gpu.ran.clear()
    scaled = replace(plain, scale=torch.rand(32))
    assert prepare(scaled, BF16, 16).backends == ("triton",)
