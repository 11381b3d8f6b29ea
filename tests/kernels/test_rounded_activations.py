"""Activations rounded to 8 bits on a CPU (W8A8): against the reference, whose sums are exact."""

from __future__ import annotations

import pytest
import torch
from cases import at_once
from hypothesis import given, settings
from hypothesis import strategies as st

from maskpro_kernels import NMPattern, NMWeight, UnsupportedKernelError, _cpu, nm_linear, pack, support, to_int8
from maskpro_kernels.activations import EightBitInputs
from maskpro_kernels.interleaved import MOST_ROUNDED, InterleavedWeight, interleave, interleave_dense
from maskpro_kernels.reference import nm_linear_reference, nm_linear_w8a8_reference
from maskpro_kernels.support import select_backend

VNNI = "avx512-vnni"
PATTERN = NMPattern(2, 4)
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
EACH_TOKEN = EightBitInputs(torch.int8)
needs_vnni = pytest.mark.skipif(not _cpu.isa_available(VNNI), reason=f"this machine has no {VNNI}")


@pytest.fixture(autouse=True)
def _kernel(monkeypatch) -> None:
    """Where tiles are faster, activations are rounded only if asked for."""
    monkeypatch.setenv("MASKPRO_KERNEL", f"cpu-{VNNI}")


def int8_weight(rows: int, columns: int, seed: int = 0) -> NMWeight:
    return to_int8(pack(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), PATTERN))


def check(
    x: torch.Tensor, weight: NMWeight, bias: torch.Tensor | None, inputs: EightBitInputs, y: torch.Tensor
) -> None:
    """The sums of both are exact. The rest is four roundings to float32 at most, the reference's and ours, and one."""
    expected = nm_linear_w8a8_reference(x.float(), weight.values, weight.bitmask, weight.scale, bias, inputs).double()
    magnitude = expected.abs() if bias is None else expected.abs() + 2 * bias.double().abs()
    unit = torch.finfo(torch.float32).eps / 2
    tolerance = 8 * unit * magnitude + torch.finfo(x.dtype).eps / 2 * (1 + 8 * unit) * expected.abs()
    tolerance = tolerance + torch.finfo(x.dtype).smallest_normal
    error = (y.double() - expected).abs()
    assert not torch.isnan(y).any(), "an output was not written"
    assert (error <= tolerance).all(), f"error {error.max():.3g}, {(error / tolerance).max():.2f} of the bound"


def run(x: torch.Tensor, order: InterleavedWeight, bias: torch.Tensor | None, threads: int) -> torch.Tensor:
    """Calls the C function on an output of NaN, so that what is not written shows."""
    codes = _cpu._DTYPE_CODES
    y = torch.full((x.shape[0], order.shape[0]), torch.nan, dtype=x.dtype)
    assert order.scale is not None
    status = _cpu.library().maskpro_nm_linear(
        y.data_ptr(), x.data_ptr(), order.data.data_ptr(), order.scale.data_ptr(),
        None if order.x_scale is None else order.x_scale.data_ptr(), None if bias is None else bias.data_ptr(),
        x.shape[0], order.shape[1], order.shape[0], 2, 4, codes[x.dtype], codes[torch.int8],
        0 if bias is None else codes[bias.dtype], order.isa, threads,
    )  # fmt: skip
    assert status == 0
    return y


@needs_vnni
@given(
    groups=st.integers(1, 20) | st.integers(240, 270) | st.integers(500, 530),
    rows=st.integers(1, 70),
    tokens=st.integers(1, 40) | st.sampled_from([64, 255, 256, 257, 520]),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    with_bias=st.booleans(),
    static=st.booleans(),
    threads=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=200)
def test_equals_the_reference(groups, rows, tokens, dtypes, with_bias, static, threads, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = int8_weight(rows, 4 * groups, seed)
    x = (torch.randn(tokens, 4 * groups, generator=generator) * 3).to(dtypes[0])
    bias = torch.randn(rows, generator=generator).to(dtypes[1]) if with_bias else None
    inputs = EightBitInputs(torch.int8, torch.tensor([0.03]) if static else None)
    check(x, weight, bias, inputs, run(x, interleave(weight, inputs), bias, threads))


@needs_vnni
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale", [None, 2.0**-6], ids=["each token", "calibrated"])
def test_activations_are_rounded_as_the_reference_rounds_them(dtype, scale):
    """To the bit, ties to even: each column alone, by weights of one."""
    anything = torch.randn(48, 64) * torch.tensor([1e-30, 1e-3, 1.0, 900.0]).repeat(12)[:, None]
    ties = torch.arange(-512, 512).reshape(16, 64) * 2.0**-7
    x = torch.cat([anything, ties, torch.zeros(1, 64)]).to(dtype)
    inputs = EightBitInputs(torch.int8, None if scale is None else torch.tensor([scale]))
    levels, step = inputs.rounded(x)
    for kept in (slice(0, None, 2), slice(1, None, 2)):
        columns = torch.arange(64)[kept]
        one = torch.zeros(32, 64)
        one[torch.arange(32), columns] = 127
        weight = to_int8(pack(one, PATTERN))
        assert weight.scale is not None
        assert (weight.scale == 1).all()
        order = interleave(weight, inputs)
        y = nm_linear(x.float(), order)
        assert torch.equal(y, (levels[:, columns] * torch.tensor(127.0)) * step)


@needs_vnni
def test_the_largest_sums_there_are():
    columns, rows = MOST_ROUNDED, 17
    bits = torch.full((rows, (columns + 7) // 8), 0x33, dtype=torch.uint8)
    bits[:, -1] = 0x03  # of half a byte
    values = torch.full((rows, columns // 2), -128, dtype=torch.int8)
    weight = NMWeight(values, bits, (rows, columns), PATTERN, torch.ones(rows))
    inputs = EightBitInputs(torch.int8, torch.tensor([1.0]))
    x = torch.tensor([[-1000.0], [1000.0], [-1.0]]).expand(3, columns).contiguous()
    y = nm_linear(x, interleave(weight, inputs))
    kept = columns // 2
    expected = torch.tensor([128.0 * 128 * kept, -128.0 * 127 * kept, 128.0 * kept])
    assert torch.equal(y, expected[:, None].expand(3, rows))


@needs_vnni
def test_bits_do_not_depend_on_threads_nor_on_the_other_tokens():
    order = interleave(int8_weight(200, 2100), EACH_TOKEN)
    x = torch.randn(300, 2100).bfloat16()
    together = run(x, order, None, 1)
    for threads in (2, 3, 5):
        assert torch.equal(run(x, order, None, threads), together)
    for tokens in (1, 7, 16, 33):
        assert torch.equal(torch.cat([nm_linear(some, order) for some in x.split(tokens)]), together)


@needs_vnni
@pytest.mark.parametrize("tokens", [3, 40])
def test_what_is_no_number_stays_with_its_token(tokens):
    weight = int8_weight(20, 96)
    x = torch.randn(tokens, 96).bfloat16()
    x[0, 5], x[1, 95] = torch.nan, -torch.inf
    for inputs in (EACH_TOKEN, EightBitInputs(torch.int8, torch.tensor([0.02]))):
        y = nm_linear(x, interleave(weight, inputs))
        assert torch.isnan(y[0]).all()
        clipped = x[1:].clamp(-1e30, 1e30)
        if inputs.scale is None:
            assert torch.isnan(y[1]).all()
            check(x[2:], weight, None, inputs, y[2:])
        else:  # clipped, as any number of that size
            check(clipped, weight, None, inputs, y[1:])


@needs_vnni
def test_calls_from_several_threads_at_once():
    order = interleave(int8_weight(128, 512), EACH_TOKEN)
    inputs = [torch.randn(tokens, 512).bfloat16() for tokens in (1, 9, 40, 300)]
    expected = [nm_linear(x, order) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            if not torch.equal(nm_linear(inputs[i], order), expected[i]):
                wrong.append(i)

    at_once(work, 4)
    assert not wrong


@needs_vnni
@pytest.mark.parametrize("scale", [None, 0.02], ids=["each token", "calibrated"])
def test_opcheck(scale):
    inputs = EightBitInputs(torch.int8, None if scale is None else torch.tensor([scale]))
    order = interleave(int8_weight(16, 64), inputs)
    arguments = (
        torch.randn(2, 5, 64).bfloat16(), order.data, order.scale, torch.randn(16), 16, 64, 2, 4, torch.int8, order.isa,
        order.x_scale,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.maskpro.nm_linear_interleaved.default, arguments)


def test_activations_are_rounded_only_where_that_is_allowed(monkeypatch):
    weight, x = int8_weight(16, 64), torch.randn(3, 64)
    exact = nm_linear_reference(x, weight.values, weight.bitmask, weight.scale, None)
    best = f"cpu-{_cpu.available_isas()[0]}"
    if _cpu.isa_available(VNNI):
        assert interleave(weight, EACH_TOKEN).backend == f"cpu-{VNNI}"
        # What may not be rounded, or has no kernel for it, is multiplied as if nothing had been asked for.
        for inputs in (None, EightBitInputs(torch.float8_e4m3fn)):
            assert interleave(weight, inputs).backend == best
        assert interleave(int8_weight(1, MOST_ROUNDED + 4), EACH_TOKEN).backend == best
        assert interleave(to_int8(pack(torch.randn(4, 64), NMPattern(4, 8))), EACH_TOKEN).backend == best
        assert interleave_dense(torch.randn(4, 64).bfloat16()).backend == best
    else:
        with pytest.raises(UnsupportedKernelError, match="cpu-avx512-vnni: this machine has no avx512-vnni"):
            interleave(weight, EACH_TOKEN)
    for request in ("auto", "cpu", best):
        monkeypatch.setenv("MASKPRO_KERNEL", request)
        rounds = request != best and _cpu.isa_available(VNNI) and best != "cpu-amx-bf16"
        assert interleave(weight, EACH_TOKEN).backend == (f"cpu-{VNNI}" if rounds else best)
        order = interleave(weight)
        assert order.backend == best
        torch.testing.assert_close(nm_linear(x, order), exact, rtol=1e-5, atol=1e-5)
        assert select_backend(PATTERN, torch.bfloat16, torch.int8, "cpu").name == best


@pytest.mark.parametrize(
    ("isas", "vnni", "request_", "chosen"),
    [
        (("amx-bf16", "avx512"), True, "auto", "cpu-amx-bf16"),
        (("amx-bf16", "avx512"), True, "cpu", "cpu-amx-bf16"),
        (("amx-bf16", "avx512"), True, "cpu-avx512-vnni", "cpu-avx512-vnni"),
        (("avx512-bf16", "avx512"), True, "auto", "cpu-avx512-vnni"),
        (("avx512", "avx512-bf16"), True, "auto", "cpu-avx512-vnni"),
        (("avx512", "avx512-bf16"), True, "cpu-avx512-bf16", "cpu-avx512-bf16"),
        (("avx512", "avx2"), False, "auto", "cpu-avx512"),
    ],
)
def test_what_other_machines_choose(monkeypatch, isas, vnni, request_, chosen):
    monkeypatch.setattr(_cpu, "available_isas", lambda: isas)
    monkeypatch.setattr(_cpu, "isa_available", lambda isa: isa in isas or (vnni and isa == VNNI))
    monkeypatch.setenv("MASKPRO_KERNEL", request_)
    support._candidates.cache_clear()
    try:
        assert select_backend(PATTERN, torch.bfloat16, torch.int8, "cpu", may_round=True).name == chosen
        exact = chosen if chosen != f"cpu-{VNNI}" else f"cpu-{isas[0]}"
        assert select_backend(PATTERN, torch.bfloat16, torch.int8, "cpu").name == exact
        assert select_backend(PATTERN, torch.bfloat16, torch.bfloat16, "cpu", may_round=True).name == exact
    finally:
        support._candidates.cache_clear()


@pytest.mark.usefixtures("every_library")
@pytest.mark.parametrize("may_round", [False, True])
def test_a_kernel_of_another_device_is_refused(monkeypatch, may_round):
    monkeypatch.setenv("MASKPRO_KERNEL", "cusparselt-int8")
    with pytest.raises(UnsupportedKernelError, match="cusparselt-int8: covers cuda only"):
        select_backend(PATTERN, torch.bfloat16, torch.int8, "cpu", may_round=may_round)


def test_one_list_of_instruction_sets_whose_kernels_round():
    assert {backend.isa for backend in support.BACKENDS if backend.isa and backend.rounds} == set(_cpu.ROUNDING_ISAS)


@pytest.mark.parametrize("name", _cpu.ROUNDING_ISAS)
def test_kernels_that_round_are_no_others(name):
    """The learning step has none; on a machine that lacks the instructions there are none at all."""
    logits = torch.zeros(8, 4)
    with pytest.raises(RuntimeError, match="native policy_step failed: instruction set not available"):
        _cpu.policy_step(logits, None, None, None, None, 2, 4, (), 0, 0, 0, name, 1)
    if not _cpu.isa_available(name):
        order = interleave_as_they_are(int8_weight(16, 64))
        arguments = (torch.randn(3, 64), order.data, order.scale, None, 16, 64, 2, 4, torch.int8, _cpu.ISA_CODES[name])
        with pytest.raises(RuntimeError, match="native nm_linear failed: instruction set not available"):
            torch.ops.maskpro.nm_linear_interleaved(*arguments)


@pytest.mark.parametrize("name", _cpu.ROUNDING_ISAS)
def test_kernels_that_round_multiply_no_other_weights(name):
    assert name not in _cpu.available_isas()
    isa = _cpu.ISA_CODES[name]
    run = torch.ops.maskpro.nm_linear_interleaved
    order, x = interleave_as_they_are(int8_weight(16, 64)), torch.randn(3, 64)
    four_of_eight = interleave_as_they_are(to_int8(pack(torch.randn(16, 64), NMPattern(4, 8))))
    with pytest.raises(
        ValueError, match=r"2:4 int8 weight .* for activations of 8 bits, found 4:8 torch\.int8 with 64"
    ):
        run(x, four_of_eight.data, four_of_eight.scale, None, 16, 64, 4, 8, torch.int8, isa)
    floats = interleave_as_they_are(pack(torch.randn(16, 64), PATTERN))
    with pytest.raises(ValueError, match=r"found 2:4 torch\.float32 with 64"):
        run(x, floats.data, None, None, 16, 64, 2, 4, torch.float32, isa)
    with pytest.raises(ValueError, match="x_scale: expected none with instruction set 0, which does not round"):
        run(x, order.data, order.scale, None, 16, 64, 2, 4, torch.int8, 0, torch.ones(1))
    for scale in (torch.ones(2), torch.ones(1).double()):
        with pytest.raises(ValueError, match=r"x_scale: expected one number of torch\.float32 on cpu, found torch\."):
            run(x, order.data, order.scale, None, 16, 64, 2, 4, torch.int8, isa, scale)


def interleave_as_they_are(weight: NMWeight) -> InterleavedWeight:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKPRO_KERNEL", "cpu-portable")
        return interleave(weight)
