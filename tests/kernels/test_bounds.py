"""The kernels read and write no byte outside their buffers, and refuse impossible arguments.

Every buffer ends where an unmapped page begins: an access one byte past it kills the test process, which is
as red as a test gets. (Reads before a buffer are left to the sanitizer build: see kernels/README.md.)
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from cases import EXPANDED, ISAS, PATTERNS
from hypothesis import given, settings
from hypothesis import strategies as st

from maskpro_kernels import NMPattern, _cpu, pack, to_int8
from maskpro_kernels.interleaved import interleave

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
OK, BAD_ARGUMENT, NO_ISA = 0, 1, 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


@contextmanager
def ending_at_a_guard_page(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A copy of ``tensor`` whose last byte is followed by a page that nobody may touch."""
    size = tensor.nbytes
    pages = -(-size // mmap.PAGESIZE)
    region = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    anchor = ctypes.c_char.from_buffer(region)
    guard = ctypes.addressof(anchor) + pages * mmap.PAGESIZE
    if _libc.mprotect(guard, mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    start = pages * mmap.PAGESIZE - size
    copy = torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=start).reshape(tensor.shape)
    copy.copy_(tensor)
    yield copy
    # The region is unmapped when the last view of it goes.


@pytest.mark.parametrize("isa", ISAS)
@given(
    pattern=PATTERNS,
    groups=st.integers(1, 12) | st.integers(13, 300),
    rows=st.integers(1, 9) | st.integers(40, 60) | st.sampled_from([130, 400]),
    tokens=st.integers(1, 8) | st.integers(9, 70) | st.integers(120, 300),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(list(CODES)), st.sampled_from(FLOATS)),
    threads=st.integers(1, 2),
)
@settings(max_examples=150)
def test_stays_within_its_buffers(isa, pattern, groups, rows, tokens, dtypes, threads):
    check_stays_within_its_buffers(isa, pattern, groups, rows, tokens, dtypes, threads)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("pattern", EXPANDED)
def test_every_way_to_expand_a_weight_stays_within_its_buffers(isa, pattern, kept):
    """Short weights, whose last step of 32 columns has one group, and two."""
    for groups in (1, 9, 10, 17):
        dtypes = torch.bfloat16, kept, torch.bfloat16
        for tokens in (1, 5, 20, 50):
            check_stays_within_its_buffers(isa, NMPattern.parse(pattern), groups, 5, tokens, dtypes, 1)


@given(
    groups=st.integers(1, 12) | st.integers(13, 528),
    rows=st.integers(1, 9) | st.integers(40, 60) | st.sampled_from([130, 400]),
    tokens=st.integers(1, 8) | st.integers(9, 70) | st.integers(250, 530),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.just(torch.int8), st.sampled_from(FLOATS)),
    threads=st.integers(1, 2),
)
@settings(max_examples=150)
def test_rounding_activations_stays_within_its_buffers(groups, rows, tokens, dtypes, threads):
    check_stays_within_its_buffers("avx512-vnni", NMPattern(2, 4), groups, rows, tokens, dtypes, threads)


def check_stays_within_its_buffers(isa, pattern, groups, rows, tokens, dtypes, threads):
    if not _cpu.isa_available(isa):
        pytest.skip(f"this machine has no {isa}")
    columns = min(groups * pattern.m, 2112)
    activation, kept, bias_dtype = dtypes
    generator = torch.Generator().manual_seed(columns)
    dense = torch.randn(rows, columns, generator=generator)
    weight = to_int8(pack(dense, pattern)) if kept == torch.int8 else pack(dense.to(kept), pattern)
    x = torch.randn(tokens, columns, generator=generator).to(activation)
    bias = torch.randn(rows, generator=generator).to(bias_dtype)
    scale = torch.ones(rows) if weight.scale is None else weight.scale
    expected_order = interleave(weight)
    with ExitStack() as stack:
        y, x_in, values, bitmask, bias_in, scale_in, order = (
            stack.enter_context(ending_at_a_guard_page(tensor))
            for tensor in (
                torch.empty(tokens, rows, dtype=activation), x, weight.values, weight.bitmask, bias, scale,
                torch.empty_like(expected_order.data),
            )
        )  # fmt: skip
        library = _cpu.library()
        status = library.maskpro_interleave(
            order.data_ptr(), values.data_ptr(), bitmask.data_ptr(), columns, rows, pattern.n, pattern.m, CODES[kept],
            threads,
        )  # fmt: skip
        assert status == OK
        assert torch.equal(order, expected_order.data)
        status = library.maskpro_nm_linear(
            y.data_ptr(), x_in.data_ptr(), order.data_ptr(), scale_in.data_ptr(), None, bias_in.data_ptr(), tokens,
            columns, rows, pattern.n, pattern.m, CODES[activation], CODES[kept], CODES[bias_dtype], _cpu.ISA_CODES[isa],
            threads,
        )  # fmt: skip
        assert status == OK
        expected = torch.ops.maskpro.nm_linear_interleaved(
            x, expected_order.data, scale, bias, rows, columns, pattern.n, pattern.m, kept, _cpu.ISA_CODES[isa]
        )
        assert torch.equal(y, expected)


def call(**changes: int | None) -> tuple[int, torch.Tensor]:
    """The status of a valid call with some arguments changed, and its output, which was NaN before."""
    weight = interleave(pack(torch.ones(3, 16), NMPattern(2, 4)))
    y, x = torch.full((2, 3), torch.nan), torch.ones(2, 16)
    arguments: dict[str, int | None] = {
        "y": y.data_ptr(), "x": x.data_ptr(), "weight": weight.data.data_ptr(),
        "scale": None, "x_scale": None, "bias": None, "tokens": 2, "in_features": 16, "out_features": 3,
        "n": 2, "m": 4, "act_dtype": 0, "weight_dtype": 0, "bias_dtype": 0, "isa": 0, "threads": 1,
    }  # fmt: skip
    assert changes.keys() <= arguments.keys()
    return _cpu.library().maskpro_nm_linear(*(arguments | changes).values()), y


def test_a_valid_call():
    status, y = call()
    assert status == OK
    assert torch.equal(y, torch.full((2, 3), 8.0))


@pytest.mark.parametrize(
    "changes",
    [
        {"n": 0}, {"n": 5}, {"m": 3}, {"m": 64}, {"in_features": 18}, {"in_features": 0}, {"in_features": -4},
        {"tokens": -1}, {"out_features": -1}, {"tokens": 1 << 31},
        {"in_features": 1 << 31}, {"act_dtype": 3}, {"act_dtype": 4},
        {"weight_dtype": -1}, {"weight_dtype": 4},
        {"isa": 5}, {"isa": 5, "weight_dtype": 3, "n": 1}, {"isa": 5, "weight_dtype": 3, "in_features": 1 << 18},
        {"x_scale": 1}, {"bias": 1, "bias_dtype": 3}, {"threads": 0}, {"y": None}, {"x": None}, {"weight": None},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_arguments_leave_the_output_untouched(changes):
    status, y = call(**changes)
    assert status == BAD_ARGUMENT
    assert torch.isnan(y).all()


@pytest.mark.parametrize("isa", [-1, 6])
def test_unknown_instruction_set(isa):
    status, y = call(isa=isa)
    assert status == NO_ISA
    assert torch.isnan(y).all()


@pytest.mark.parametrize("empty", ["tokens", "out_features"])
def test_nothing_to_do(empty):
    status, y = call(**{empty: 0, "y": None})
    assert status == OK
    assert torch.isnan(y).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_half_precision_value_is_read_and_written_exactly(isa, dtype):
    """x times the identity: all 65536 bit patterns go in as activations and come out as they were."""
    if isa not in _cpu.available_isas():
        pytest.skip(f"this machine has no {isa}")
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = patterns[torch.isfinite(patterns)].reshape(-1, 1)
    x = torch.cat([finite, torch.zeros(finite.shape[0], 3, dtype=dtype)], dim=1)
    one = pack(torch.tensor([[1.0, 0, 0, 0]]), NMPattern(1, 4))
    run, code = torch.ops.maskpro.nm_linear_interleaved, _cpu.ISA_CODES[isa]
    y = run(x, interleave(one).data, None, None, 1, 4, 1, 4, torch.float32, code)
    assert torch.equal(y, finite)
    ones = torch.ones(finite.shape[0], 1, dtype=torch.uint8)
    order = _cpu.interleave(finite, ones, 4, 1, 4, 1)
    kept = run(torch.tensor([[1.0, 0, 0, 0]]), order, None, None, len(finite), 4, 1, 4, dtype, code)
    assert torch.equal(kept[0], finite[:, 0].float())


@pytest.mark.parametrize(
    ("isa", "tokens"),
    [(isa, tokens) for isa in ("avx512-bf16", "amx-bf16") for tokens in (1, 5, 13, 40)],
)
@pytest.mark.parametrize("place", range(4))
def test_products_of_pairs_take_every_bfloat16_exactly_but_subnormals_for_zero(isa, place, tokens):
    if isa not in _cpu.available_isas():
        pytest.skip(f"this machine has no {isa}")
    patterns = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = patterns[torch.isfinite(patterns)]
    expected = torch.where(finite.abs() < torch.finfo(torch.bfloat16).smallest_normal, 0, finite)
    run, code = torch.ops.maskpro.nm_linear_interleaved, _cpu.ISA_CODES[isa]
    one = torch.zeros(1, 4).bfloat16()
    one[0, place] = 1
    x = torch.zeros(len(finite), 4).bfloat16()
    x[:, place] = finite
    order = interleave(pack(one, NMPattern(2, 4))).data
    y = torch.cat([run(some, order, None, None, 1, 4, 2, 4, torch.bfloat16, code) for some in x.split(tokens)])
    assert torch.equal(y[:, 0], expected)
    order = interleave(pack(x, NMPattern(2, 4))).data
    y = run(one.expand(tokens, 4), order, None, None, len(finite), 4, 2, 4, torch.bfloat16, code)
    assert torch.equal(y, expected.expand(tokens, -1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_as_torch_does(isa, dtype):
    """Ties, subnormals, overflow to infinity, infinities and NaN, by adding a float32 bias to nothing."""
    if isa not in _cpu.available_isas():
        pytest.skip(f"this machine has no {isa}")
    half_an_ulp = 0x8000 if dtype == torch.bfloat16 else 0x1000
    anything = torch.randint(-(1 << 31), (1 << 31) - 1, (4096,)).to(torch.int32).view(torch.float32)
    representable = torch.randint(-(1 << 15), 1 << 15, (4096,)).to(torch.int16).view(dtype).float()
    ties = (representable.view(torch.int32) + half_an_ulp).view(torch.float32)
    special = torch.tensor([65519.9, 65520, -65520, 2**-25, 2**-25 * 1.01, 3e-6, torch.inf, -torch.inf, torch.nan])
    bias = torch.cat([anything, ties, special])
    bias = torch.where(torch.isnan(bias), torch.nan, bias)
    order = _cpu.interleave(torch.zeros(bias.numel(), 1), torch.ones(bias.numel(), 1, dtype=torch.uint8), 4, 1, 4, 1)
    x = torch.ones(1, 4, dtype=dtype)
    y = torch.ops.maskpro.nm_linear_interleaved(
        x, order, None, bias, bias.numel(), 4, 1, 4, torch.float32, _cpu.ISA_CODES[isa]
    )
    torch.testing.assert_close(y[0], bias.to(dtype), rtol=0, atol=0, equal_nan=True)
