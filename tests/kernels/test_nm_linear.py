"""Every instruction set against a float64 oracle, within bounds derived from the arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import EXPANDED, ISAS, PATTERNS, at_once
from exact import exact_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from maskpro_kernels import NMPattern, NMWeight, UnsupportedKernelError, _cpu, nm_linear, pack, to_int8, unpack
from maskpro_kernels.interleaved import interleave, interleave_dense, packed_again, remembered
from maskpro_kernels.support import select_backend

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
KEPT = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8])


@pytest.fixture(params=ISAS)
def isa(request) -> str:
    if request.param not in _cpu.available_isas():
        pytest.skip(f"this machine has no {request.param}")
    return request.param


def packed(dense: torch.Tensor, pattern: NMPattern, dtype: torch.dtype, *, scaled: bool = False) -> NMWeight:
    """Packs a float32 weight with kept values of any dtype, floats with a scale if asked: int8 always has one."""
    if dtype == torch.int8:
        return to_int8(pack(dense, pattern))
    weight = pack(dense.to(dtype), pattern)
    return replace(weight, scale=dense.abs().amax(1)) if scaled else weight


def check(x: torch.Tensor, weight: NMWeight, bias: torch.Tensor | None, y: torch.Tensor) -> None:
    """|error| <= gamma_k |x||W| (Higham 2002, 3.1) for the float32 sum, and half an ulp for rounding it."""
    dense = exact_weight(weight)
    exact = x.double() @ dense.T
    bound = x.double().abs() @ dense.abs().T
    if bias is not None:
        exact = exact + bias.double()
        bound = bound + bias.double().abs()
    unit = torch.finfo(torch.float32).eps / 2
    terms = weight.values.shape[1] + 3  # and the scale and the bias
    tolerance = terms * unit / (1 - terms * unit) * bound + torch.finfo(x.dtype).eps * exact.abs()
    tolerance = tolerance + torch.finfo(x.dtype).smallest_normal
    error = (y.double() - exact).abs()
    assert not torch.isnan(y).any(), "an output was not written"
    assert (error <= tolerance).all(), f"error {error.max():.3g}, {(error / tolerance).max():.2f} of the bound"


def run_on_nan(x: torch.Tensor, weight: NMWeight, bias: torch.Tensor | None, isa: str, threads: int) -> torch.Tensor:
    """Calls the C function on an output of NaN, so that what is not written shows."""
    y = torch.full((x.shape[0], weight.shape[0]), torch.nan, dtype=x.dtype)
    codes = _cpu._DTYPE_CODES
    order = interleave(weight)
    status = _cpu.library().maskpro_nm_linear(
        y.data_ptr(), x.data_ptr(), order.data.data_ptr(),
        None if weight.scale is None else weight.scale.data_ptr(), None, None if bias is None else bias.data_ptr(),
        x.shape[0], weight.shape[1], weight.shape[0], weight.pattern.n, weight.pattern.m, codes[x.dtype],
        codes[weight.values.dtype], 0 if bias is None else codes[bias.dtype], _cpu.ISA_CODES[isa], threads,
    )  # fmt: skip
    assert status == 0
    return y


@pytest.mark.parametrize("isa", ISAS)
@given(
    pattern=PATTERNS,
    # Several blocks of columns of the loops for many tokens, and every tail.
    groups=st.integers(1, 40) | st.integers(41, 330),
    rows=st.integers(1, 70) | st.sampled_from([128, 150, 400]),
    tokens=st.integers(0, 9) | st.integers(10, 70) | st.integers(120, 300),
    dtypes=st.tuples(DTYPES, KEPT, DTYPES),
    with_bias=st.booleans(),
    scaled=st.booleans(),
    threads=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=120)
def test_equals_the_oracle(isa, pattern, groups, rows, tokens, dtypes, with_bias, scaled, threads, seed):
    if isa not in _cpu.available_isas():
        pytest.skip(f"this machine has no {isa}")
    generator = torch.Generator().manual_seed(seed)
    columns = min(groups * pattern.m, 2600 // pattern.m * pattern.m)
    activation, kept, bias_dtype = dtypes
    weight = packed(torch.randn((rows, columns), generator=generator), pattern, kept, scaled=scaled)
    x = torch.randn((tokens, columns), generator=generator).to(activation)
    bias = torch.randn(rows, generator=generator).to(bias_dtype) if with_bias else None
    check(x, weight, bias, run_on_nan(x, weight, bias, isa, threads))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
@pytest.mark.parametrize("activation", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 17, 40])
def test_a_dense_weight_in_its_own_dtype(isa, dtype, activation, tokens, monkeypatch):
    if isa not in _cpu.available_isas():
        pytest.skip(f"this machine has no {isa}")
    monkeypatch.setenv("MASKPRO_KERNEL", f"cpu-{isa}")
    weight = packed(torch.randn((70, 332)), NMPattern(4, 4), dtype)
    x, bias = torch.randn((tokens, 332)).to(activation), torch.randn(70)
    check(x, weight, bias, nm_linear(x, interleave_dense(weight.values, weight.scale), bias))


@pytest.mark.parametrize("tokens", [1, 20, 60])
@pytest.mark.parametrize("pattern", ["4:4", "3:4"])
def test_activations_of_an_earlier_call_do_not_leak(isa, pattern, tokens):
    """Where 16 does not divide in_features, weights of 0 fill rows up: they must not meet another call's NaN."""
    nm = NMPattern.parse(pattern)
    weight, before = (packed(torch.randn((16, columns)), nm, torch.bfloat16) for columns in (20, 32))
    x = torch.randn((tokens, 20)).bfloat16()
    run_on_nan(torch.full((tokens, 32), torch.nan).bfloat16(), before, None, isa, 1)
    check(x, weight, None, run_on_nan(x, weight, None, isa, 1))


def test_a_packed_weight_is_interleaved_once_until_it_changes():
    weight = pack(torch.randn(32, 64), NMPattern(2, 4))
    x = torch.randn(3, 64)
    first = nm_linear(x, weight)
    assert remembered(weight.values, weight.bitmask, 64, weight.pattern) is remembered(
        weight.values, weight.bitmask, 64, weight.pattern
    )
    weight.values.mul_(2)
    assert torch.equal(nm_linear(x, weight), 2 * first)
    assert torch.equal(nm_linear(x, interleave(weight)), 2 * first)
    weight.values.data = weight.values.data / 2  # the same tensor, other storage
    assert torch.equal(nm_linear(x, weight), first)
    other = pack(torch.randn(32, 64), NMPattern(2, 4))
    moved = NMWeight(weight.values, other.bitmask, weight.shape, weight.pattern)
    assert torch.equal(nm_linear(x, moved), nm_linear(x, interleave(moved)))
    with torch.inference_mode():
        inside = pack(torch.randn(32, 64), NMPattern(2, 4))
        second = nm_linear(x, inside)
        inside.values.mul_(2)
        assert torch.equal(nm_linear(x, inside), 2 * second)


def test_a_default_device_does_not_matter():
    weight = pack(torch.randn(24, 64), NMPattern(2, 4))
    expected = interleave(weight)
    with torch.device("meta"):
        interleaved = interleave(weight)
        again = packed_again(interleaved)
    assert torch.equal(interleaved.data, expected.data)
    assert torch.equal(again.values, weight.values)
    assert torch.equal(again.bitmask, weight.bitmask)


def test_an_interleaved_weight_of_another_size_is_refused():
    weight = interleave(pack(torch.randn(16, 64), NMPattern(2, 4)))
    with pytest.raises(ValueError, match=r"expected x \(..., 64\), in_features of the weight, found \(3, 60\)"):
        nm_linear(torch.randn(3, 60), weight)
    with pytest.raises(
        ValueError, match=r"of 1152 contiguous bytes \(2:4, 16 x 64, torch.bfloat16\), found 2176 of torch.uint8"
    ):
        torch.ops.maskpro.nm_linear_interleaved(
            torch.randn(3, 64), weight.data, None, None, 16, 64, 2, 4, torch.bfloat16, 0
        )
    with pytest.raises(ValueError, match=r"of 2176 contiguous bytes"):
        torch.ops.maskpro.nm_linear_interleaved(
            torch.randn(3, 64), weight.data[:1].expand(2176), None, None, 16, 64, 2, 4, torch.float32, 0
        )
    with pytest.raises(ValueError, match=r"interleave: expected one of .*, found torch\.int16"):
        interleave_dense(torch.ones(4, 8, dtype=torch.int16))
    for dtype, scale in ((torch.int8, None), (torch.float32, torch.ones(4))):
        with pytest.raises(ValueError, match=f"expected a scale with int8 and with nothing else, found {dtype}"):
            interleave_dense(torch.ones(4, 8, dtype=dtype), scale)
    with pytest.raises(ValueError, match="interleave: expected a weight on the CPU, found one on meta"):
        interleave_dense(torch.ones(4, 8, device="meta"))


@given(pattern=PATTERNS, dtype=KEPT, rows=st.integers(1, 40), groups=st.integers(1, 40), seed=st.integers(0, 1 << 20))
def test_an_interleaved_weight_is_packed_again_to_the_bit(pattern, dtype, rows, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = packed(torch.randn((rows, groups * pattern.m), generator=generator), pattern, dtype)
    again = packed_again(interleave(weight))
    assert torch.equal(again.values, weight.values)
    assert torch.equal(again.bitmask, weight.bitmask)


def test_an_interleaved_weight_asks_for_large_pages():
    try:
        Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        pytest.skip("this kernel has no transparent huge pages")
    weight = interleave(pack(torch.randn(4096, 2048), NMPattern(2, 4)))
    address = weight.data.data_ptr() + (1 << 20)
    mapped = flags = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in (field := line.split()[0]):
            mapped = field
        elif field == "VmFlags:":
            low, high = (int(end, 16) for end in mapped.split("-"))
            if low <= address < high:
                flags = line
    assert " hg" in flags  # madvise(MADV_HUGEPAGE)


def test_int8_values_come_with_a_scale():
    weight = to_int8(pack(torch.randn(16, 64), NMPattern(2, 4)))
    with pytest.raises(ValueError, match=r"expected a scale with torch\.int8 weights, found none"):
        torch.ops.maskpro.nm_linear(torch.randn(3, 64), weight.values, weight.bitmask, None, None, 2, 4)
    with pytest.raises(
        ValueError, match=r"scale: expected contiguous torch.float32 \(16,\) on cpu, found torch.float64"
    ):
        torch.ops.maskpro.nm_linear(
            torch.randn(3, 64), weight.values, weight.bitmask, weight.scale.double(), None, 2, 4
        )


@pytest.mark.parametrize("kept", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("pattern", EXPANDED)
def test_every_way_to_expand_a_weight(isa, pattern, kept):
    """Instruction sets that multiply pairs or tiles have code for single patterns, which random ones seldom meet."""
    nm = NMPattern.parse(pattern)
    short, wide = 9 * nm.m, 1000 // nm.m * nm.m
    bias = torch.randn(70).half()
    for tokens, columns, threads in (
        (1, short, 7), (5, wide, 3), (13, short, 1), (29, short, 2), (29, wide, 2), (33, wide, 3), (257, wide, 2),
        (67, 2080, 1), (67, 1056, 1), (519, short, 2),
    ):  # fmt: skip
        weight = packed(torch.randn((70, columns)), nm, kept)
        x = torch.randn((tokens, columns)).bfloat16()
        for added in (None, bias):
            check(x, weight, added, run_on_nan(x, weight, added, isa, threads))


@pytest.mark.parametrize("tokens", [1, 5, 7, 9, 17, 64, 129, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "6:8"])
def test_many_tokens_and_threads(isa, tokens, dtype, kept, pattern):
    weight = packed(torch.randn((290, 2048)), NMPattern.parse(pattern), kept)
    x = torch.randn((tokens, 2048)).to(dtype)
    outputs = [run_on_nan(x, weight, None, isa, threads) for threads in (1, 2, 3, 5)]
    check(x, weight, None, outputs[0])
    for y in outputs[1:]:
        assert torch.equal(y, outputs[0])  # a result does not depend on the number of threads
    if tokens > 1:  # nor on the other tokens, but for how many there are
        other = torch.cat([torch.randn((1, 2048)).to(dtype), x[1:-1].roll(1, 0), x[-1:]])
        assert torch.equal(run_on_nan(other, weight, None, isa, 2)[-1], outputs[0][-1])


@pytest.mark.parametrize("tokens", [5, 7, 9, 17, 129, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "6:8"])
def test_a_result_does_not_depend_on_its_place_in_a_call(isa, tokens, dtype, kept, pattern):
    """Sums cancel: what is left are their roundings, and no rounding to bfloat16 hides another order."""
    half = torch.randn((64, 1024))
    weight = packed(torch.cat([half, half], 1), NMPattern.parse(pattern), kept)
    x = torch.randn((1, 1024)).to(dtype)
    y = run_on_nan(torch.cat([x, -x], 1).repeat(tokens, 1), weight, None, isa, 2)
    assert torch.equal(y, y[:1].expand_as(y))


def test_fewer_threads_than_asked_for_do_all_of_the_work_once():
    """A runtime may grant fewer: what was to be the others' is done, in every pass, and nothing of it twice.

    A product that is written twice is the same; logits that are updated twice are not.
    """
    tests = (
        f"{__file__}::test_many_tokens_and_threads",
        f"{__file__}::test_every_way_to_expand_a_weight",
        f"{Path(__file__).with_name('test_policy_step.py')}::test_threads_keep_to_their_own_groups",
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env={**os.environ, "OMP_THREAD_LIMIT": "2"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_calls_from_several_threads_at_once(isa, dtype, monkeypatch):
    monkeypatch.setenv("MASKPRO_KERNEL", f"cpu-{isa}")
    weights = [pack(torch.randn((64, 512)).bfloat16(), NMPattern(n, 8)) for n in (1, 2, 4, 6)]
    inputs = [torch.randn((tokens, 512)).to(dtype) for tokens in (1, 9, 40, 100)]
    expected = [nm_linear(x, w) for x, w in zip(inputs, weights, strict=True)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            if not torch.equal(nm_linear(inputs[i], weights[i]), expected[i]):
                wrong.append(i)

    at_once(work, 4)
    assert not wrong


def test_leading_dimensions_and_strides():
    weight = pack(torch.randn(24, 32), NMPattern(2, 4))
    x = torch.randn(3, 64, 5).transpose(1, 2)[..., ::2]
    torch.testing.assert_close(nm_linear(x, weight), x @ unpack(weight).T)
    assert nm_linear(torch.randn(32), weight).shape == (24,)
    assert nm_linear(torch.randn(0, 32), weight).shape == (0, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    weight = pack(torch.randn(16, 64).to(dtype), NMPattern(2, 4))
    for x in (torch.randn(3, 64).to(dtype), torch.randn(2, 5, 64).to(dtype)):
        arguments = (x, weight.values, weight.bitmask, None, torch.randn(16).to(dtype), 2, 4)
        torch.library.opcheck(torch.ops.maskpro.nm_linear.default, arguments)
        order = interleave(weight)
        arguments = (x, order.data, None, torch.randn(16).to(dtype), 16, 64, 2, 4, dtype, 0)
        torch.library.opcheck(torch.ops.maskpro.nm_linear_interleaved.default, arguments)


def test_is_one_node_under_torch_compile():
    weight = pack(torch.randn(16, 64), NMPattern(2, 4))
    nodes: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: object):
        nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(lambda x: nm_linear(x, weight) + 1, backend=backend, fullgraph=True)
    x = torch.randn(3, 64)
    torch.testing.assert_close(compiled(x), x @ unpack(weight).T + 1)
    assert sum("nm_linear" in node for node in nodes) == 1


def test_one_compiled_function_takes_every_pattern():
    compiled = torch.compile(nm_linear, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 64)
    for pattern in (NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8)):
        weight = interleave(pack(torch.randn(16, 64), pattern))
        assert torch.equal(compiled(x, weight), nm_linear(x, weight))


def test_what_the_kernels_do_not_know_is_refused():
    weight, x = interleave(pack(torch.randn(16, 64), NMPattern(2, 4))), torch.randn(3, 64)
    run = torch.ops.maskpro.nm_linear_interleaved
    for isa in (-1, 6, 1 << 32):
        with pytest.raises(ValueError, match=f"instruction set, 0 to 5, found {isa}"):
            run(x, weight.data, None, None, 16, 64, 2, 4, torch.float32, isa)
    for n, m in ((5, 4), (0, 4), (2, 1 << 40), (-1, 4)):
        with pytest.raises(ValueError, match=f"found {n}:{m} of 16 x 64"):
            run(x, weight.data, None, None, 16, 64, n, m, torch.float32, 0)
    with pytest.raises(ValueError, match=r"x: expected a 16 or 32 bit float on cpu, found torch\.float64"):
        nm_linear(x.double(), weight)
    with pytest.raises(ValueError, match=r"kept values of a 16 or 32 bit float or int8, found torch\.float64"):
        run(x, weight.data, None, None, 16, 64, 2, 4, torch.float64, 0)
    with pytest.raises(ValueError, match=r"bias of shape \(15,\), expected \(16,\)"):
        nm_linear(x, weight, torch.randn(15))


def test_disagreeing_arguments_give_both_sizes():
    weight = pack(torch.randn(16, 64), NMPattern(2, 4))
    with pytest.raises(ValueError, match=r"x has in_features = 60, but a 2:4 weight .* has 64"):
        nm_linear(torch.randn(3, 60), weight)
    with pytest.raises(ValueError, match=r"bias of shape \(15,\), expected \(16,\)"):
        nm_linear(torch.randn(3, 64), weight, torch.randn(15))
    with pytest.raises(ValueError, match=r"bias: expected a 16 or 32 bit float on cpu, found torch.float64"):
        nm_linear(torch.randn(3, 64), weight, torch.randn(16).double())
    with pytest.raises(ValueError, match=r"bitmask: expected torch.uint8, found torch.int64"):
        torch.ops.maskpro.nm_linear(torch.randn(3, 64), weight.values, weight.bitmask.long(), None, None, 2, 4)
    with pytest.raises(ValueError, match=r"two dimensions, found \(\), "):
        nm_linear(torch.tensor(1.0), weight)
    with pytest.raises(ValueError, match=r"two dimensions, found \(3, 64\), \(32,\)"):
        torch.ops.maskpro.nm_linear(torch.randn(3, 64), weight.values[0], weight.bitmask, None, None, 2, 4)


def test_backend_choice(monkeypatch):
    pattern = NMPattern(2, 4)

    def name() -> str:
        return select_backend(pattern, torch.float32, torch.bfloat16, "cpu").name

    best = f"cpu-{_cpu.available_isas()[0]}"
    monkeypatch.delenv("MASKPRO_KERNEL", raising=False)
    assert name() == best
    monkeypatch.setenv("MASKPRO_KERNEL", "cpu")
    assert name() == best
    monkeypatch.setenv("MASKPRO_KERNEL", "reference")
    assert name() == "reference"
    monkeypatch.setenv("MASKPRO_KERNEL", "fastest")
    with pytest.raises(
        ValueError, match="MASKPRO_KERNEL='fastest' is unknown: expected one of auto, cpu, cpu-amx-bf16"
    ):
        name()
    monkeypatch.setenv("MASKPRO_KERNEL", "auto")
    with pytest.raises(UnsupportedKernelError, match=r"no kernel for pattern 2:4, .*triton: does not cover"):
        select_backend(pattern, torch.float64, torch.bfloat16, "cuda")


def test_tiles_are_shared_with_those_who_use_them_too(monkeypatch):
    """oneDNN multiplies bfloat16 by AMX as well, in the same threads: neither may meet the other's configuration."""
    if "amx-bf16" not in _cpu.available_isas():
        pytest.skip("this machine has no amx-bf16")
    monkeypatch.setenv("MASKPRO_KERNEL", "cpu-amx-bf16")
    dense = torch.randn(96, 320).bfloat16()
    weight = pack(dense, NMPattern(2, 4))
    order = interleave(weight)
    for tokens in (40, 7, 33, 100):
        x = torch.randn(tokens, 320).bfloat16()
        for _ in range(2):
            check(x, pack(dense, NMPattern(4, 4)), None, torch.nn.functional.linear(x, dense))
            check(x, weight, None, nm_linear(x, order))
