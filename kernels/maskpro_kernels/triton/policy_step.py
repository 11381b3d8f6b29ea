"""The learning step on a GPU: what csrc/policy_step_impl.h does, one program for a block of groups.

**The same draws.** Words come from the same Philox counters and key as in C++, and what they are compared with (logit +
Gumbel noise; for 2:4, the masks' probabilities) from the same float32 operations in the same order, each of which
rounds as IEEE 754 says: products that are summed are written as fma, the division is the exact one. So equal logits
give bit-identical masks on both; the tests hold the interpreter to that. Updates agree to rounding only: a GPU's
exponential is not the C++ one.

**Scores.** One and two kept weights have closed forms. For more, the C++ sums over the 2^n subsets of the kept ones,
which a GPU has no registers for. The mask is kept if the largest noisy logit of the dropped columns stays below all
kept ones, and that largest one is again Gumbel, around d = log sum of exp(dropped logits):

    P(mask) = integral over t > 0 of  exp(-t)  prod over kept i of (1 - exp(-y_i t)),     y_i = exp(logit_i - d)
    d log P / d logit_i = mean of  y_i t / (exp(y_i t) - 1)  under that density of t,      kept i

(Kool et al., "Estimating gradients for discrete random variables by sampling without replacement", ICLR 2020,
appendix B). In log t the integrand is analytic and falls off at both ends, so the trapezoidal rule converges
exponentially: 63 to 125 points are exact to 2e-8, a float32's own rounding, for every n and logits of +-100.

Roofline: as in C++, 8 bytes of logit and twice the weight's own per weight: 12 for bfloat16, 0.28 T weights/s on an
H100. Philox and the pair's closed form are some 60 instructions a weight of 2:4.
"""

# ruff: noqa: N803  (compile-time constants are in capitals, as everywhere in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped, import-not-found"

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_WEIGHTS = 1024
"""Weights of one program: 8 for each of 128 threads."""


@triton.jit
def _log(x):
    """log_positive() of csrc/lanes.h, to the bit: the natural logarithm of a positive normal number."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    s = tl.div_rn(mantissa - 1.0, mantissa + 1.0)
    s2 = s * s
    p = tl.full(x.shape, 2.0 / 9, tl.float32)
    p = tl.fma(p, s2, tl.full(x.shape, 2.0 / 7, tl.float32))
    p = tl.fma(p, s2, tl.full(x.shape, 2.0 / 5, tl.float32))
    p = tl.fma(p, s2, tl.full(x.shape, 2.0 / 3, tl.float32))
    p = tl.fma(p, s2, tl.full(x.shape, 2.0, tl.float32))
    return tl.fma(exponent.to(tl.float32), tl.full(x.shape, 0.693147181, tl.float32), p * s)


@triton.jit
def _exp(x):
    """exp_nonpositive() of csrc/lanes.h, to the bit: e^x for x <= 0, 2^-126 or so from -87 down."""
    x = tl.maximum(x, -87.0)
    magic = tl.full(x.shape, 12582912.0, tl.float32)
    shifted = tl.fma(x, tl.full(x.shape, 1.44269504, tl.float32), magic)
    whole = shifted - magic
    r = tl.fma(whole, tl.full(x.shape, -0.693148613, tl.float32), x)
    r = tl.fma(whole, tl.full(x.shape, 1.42860677e-6, tl.float32), r)
    p = tl.full(x.shape, 1.0 / 5040, tl.float32)
    p = tl.fma(p, r, tl.full(x.shape, 1.0 / 720, tl.float32))
    p = tl.fma(p, r, tl.full(x.shape, 1.0 / 120, tl.float32))
    p = tl.fma(p, r, tl.full(x.shape, 1.0 / 24, tl.float32))
    p = tl.fma(p, r, tl.full(x.shape, 1.0 / 6, tl.float32))
    p = tl.fma(p, r, tl.full(x.shape, 0.5, tl.float32))
    p = tl.fma(p, r, tl.full(x.shape, 1.0, tl.float32))
    p = tl.fma(p, r, tl.full(x.shape, 1.0, tl.float32))
    power = shifted.to(tl.int32, bitcast=True) - magic.to(tl.int32, bitcast=True)
    return p * ((power + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _one_minus_exp(x):
    """1 - e^-x for x >= 0, to a few units in the last place however small x is."""
    s = tl.minimum(x, 0.35)
    p = 1.0 / 120 - s * (1.0 / 720 - s * (1.0 / 5040))
    p = 1.0 - s * (0.5 - s * (1.0 / 6 - s * (1.0 / 24 - s * p)))
    return tl.where(x < 0.35, s * p, 1.0 - tl.exp(-x))


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _uniform(words):
    """The middles of 2^23 intervals: exact in float32, neither 0 nor 1."""
    return ((words >> 9).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 8388608)


@triton.jit
def _exchange(swap, a, b):
    return tl.where(swap, b, a), tl.where(swap, a, b)


@triton.jit
def _draw_pair(values, group, seed, stream, number, ROWS: tl.constexpr):
    """_draw() for 2:4: csrc/pair_of_four.h, which says why."""
    l02, l13 = tl.split(tl.reshape(values, [ROWS, 2, 2]))
    l0, l2 = tl.split(l02)
    l1, l3 = tl.split(l13)
    swap0 = l1 > l0
    l0, l1 = _exchange(swap0, l0, l1)
    swap1 = l3 > l2
    l2, l3 = _exchange(swap1, l2, l3)
    swap2 = l2 > l0
    l0, l2 = _exchange(swap2, l0, l2)
    swap3 = l3 > l1
    l1, l3 = _exchange(swap3, l1, l3)
    swap4 = l2 > l1
    l1, l2 = _exchange(swap4, l1, l2)
    t, f2, f3 = _exp(l1 - l0), _exp(l2 - l1), _exp(l3 - l1)
    one = tl.full(t.shape, 1.0, tl.float32)
    f = (1.0 + f2) + f3
    r1, r2, r3 = tl.fma(t, f2 + f3, one), tl.fma(t, 1.0 + f3, one), tl.fma(t, 1.0 + f2, one)
    product01, product23 = f * r1, r2 * r3
    reciprocal = tl.div_rn(one, product01 * product23)
    half01, half23 = reciprocal * product23, reciprocal * product01
    inverse_f = half01 * r1
    g1, g2, g3 = t * (half01 * f), (t * f2) * (half23 * r3), (t * f3) * (half23 * r2)
    sum0 = tl.fma(half01, r1, g1)
    sum1 = sum0 + tl.fma(f2, inverse_f, g2)
    sum2 = sum1 + tl.fma(f3, inverse_f, g3)
    sum3 = tl.fma(t, tl.fma(f2, g1, g2), sum2)
    sum4 = tl.fma(t, tl.fma(f3, g1, g3), sum3)
    sum5 = tl.fma(t, tl.fma(f3, g2, f2 * g3), sum4)
    # Group b of 32 has word b / 8 of counter b % 8.
    none = tl.zeros([ROWS], tl.uint32)
    counter = (group >> 5) * 8 + (group & 7)
    w0, w1, w2, w3 = tl.philox(
        seed, none + counter.to(tl.uint32), none + (stream << 2).to(tl.uint32),
        none + number.to(tl.uint32), none + (number >> 32).to(tl.uint32),
    )  # fmt: skip
    place = (group >> 3) & 3
    x = _uniform(tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3))) * sum5
    k0 = x < sum2
    k1 = (x < sum0) | ((x >= sum2) & (x < sum4))
    k2 = ((x >= sum0) & (x < sum1)) | ((x >= sum2) & (x < sum3)) | (x >= sum4)
    k3 = ((x >= sum1) & (x < sum2)) | (x >= sum3)
    k1, k2 = _exchange(swap4, k1, k2)
    k1, k3 = _exchange(swap3, k1, k3)
    k0, k2 = _exchange(swap2, k0, k2)
    k2, k3 = _exchange(swap1, k2, k3)
    k0, k1 = _exchange(swap0, k0, k1)
    kept02, kept13 = tl.join(k0.to(tl.int32), k2.to(tl.int32)), tl.join(k1.to(tl.int32), k3.to(tl.int32))
    return tl.reshape(tl.join(kept02, kept13), [ROWS, 4]) != 0


@triton.jit
def _draw(values, group, seed, stream, number, N: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr):
    """Boolean [ROWS, M]: the mask of a draw."""
    column = tl.arange(0, M)[None, :]
    kept = tl.zeros([ROWS, M], tl.int32) != 0
    if N == M:
        kept = ~kept
    elif N == 2 and M == 4:
        kept = _draw_pair(values, group, seed, stream, number, ROWS)
    else:
        # A counter gives four words, for four columns.
        none = tl.zeros([ROWS, M // 4], tl.uint32)
        place = (stream << 2).to(tl.uint32) | tl.arange(0, M // 4)[None, :].to(tl.uint32)
        w0, w1, w2, w3 = tl.philox(
            seed, none + group.to(tl.uint32)[:, None], none + place,
            none + number.to(tl.uint32), none + (number >> 32).to(tl.uint32),
        )  # fmt: skip
        words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [ROWS, M])
        left = values - _log(-_log(_uniform(words)))
        for _ in range(N):
            largest = tl.argmax(left, 1, tie_break_left=True)
            here = column == largest[:, None]
            kept = kept | here
            left = tl.where(here, float("-inf"), left)
    return kept


@triton.jit
def _probability(x, y):
    """Of x where only x and y are left."""
    small = tl.exp(-tl.abs(x - y))
    larger = 1.0 / (1.0 + small)
    return tl.where(x < y, small * larger, larger)


@triton.jit
def _log_sum(x, y):
    return tl.maximum(x, y) + _log(1.0 + tl.exp(-tl.abs(x - y)))


@triton.jit
def _kept_score_of_pair(values, kept, dropped):
    """For the kept columns a and b: the only ways are a then b, and b then a."""
    a = tl.max(tl.where(kept, values, float("-inf")), 1)
    b = tl.min(tl.where(kept, values, float("inf")), 1)
    most = tl.maximum(a, dropped)
    first_a, first_b, first_dropped = tl.exp(a - most), tl.exp(b - most), tl.exp(dropped - most)
    first = 1.0 / (first_a + first_b + first_dropped)
    # log R(a) - log R(b), where R is what is left: the order a, b has the share 1 / (1 + e^difference).
    difference = _log_sum(b, dropped) - _log_sum(a, dropped)
    small = tl.exp(-tl.abs(difference))
    larger = 1.0 / (1.0 + small)
    a_first = tl.where(difference < 0, larger, small * larger)
    b_first = tl.where(difference < 0, small * larger, larger)
    of_a = 1.0 - (first_a * first + b_first * _probability(a, dropped))
    of_b = 1.0 - (first_b * first + a_first * _probability(b, dropped))
    return tl.where(values == a[:, None], of_a[:, None], of_b[:, None])


@triton.jit
def _kept_score_of_many(values, kept, dropped, N: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr):
    """The integral of the module's docstring, over log2 t from -25 to 6."""
    # The density of log t is as narrow as that of a Gamma variable of shape n + 1.
    step: tl.constexpr = 0.5 if N <= 4 else (0.375 if N <= 7 else 0.25)
    points: tl.constexpr = int(31 / step) + 1
    # Beyond e^+-60 a column is certainly before, or after, whatever is dropped, and overflow is near.
    y = tl.exp(tl.minimum(tl.maximum(values - dropped[:, None], -60.0), 60.0))
    unit = 1.0 / _one_minus_exp(y)  # relative to t = 1 nothing overflows
    sums = tl.zeros([ROWS, M], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for point in range(points):
        t = tl.exp2(6.0 - step * point)
        z = y * t
        factor = _one_minus_exp(z)
        density = t * tl.exp(-t) * tl.reduce(tl.where(kept, factor * unit, 1.0), 1, _multiply)
        total += density
        sums += density[:, None] * (z * tl.exp(-z) / factor)
    return sums / total[:, None]


@triton.jit
def _score(values, kept, N: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr):
    """d log P(kept) / d logits; every row sums to 0."""
    dropped_max = tl.max(tl.where(kept, float("-inf"), values), 1)
    share = tl.where(kept, 0.0, tl.exp(tl.where(kept, 0.0, values - dropped_max[:, None])))
    dropped_sum = tl.sum(share, 1)
    dropped = dropped_max + _log(dropped_sum)
    if N == 1:
        only = tl.sum(tl.where(kept, values, 0.0), 1)
        of_kept = _probability(dropped, only)[:, None] + tl.zeros([ROWS, M], tl.float32)
    elif N == 2:
        of_kept = _kept_score_of_pair(values, kept, dropped)
    else:
        of_kept = _kept_score_of_many(values, kept, dropped, N, M, ROWS)
    rest = tl.sum(tl.where(kept, of_kept, 0.0), 1)
    return tl.where(kept, of_kept, -(rest / dropped_sum)[:, None] * share)


@triton.jit(do_not_specialize=["groups", "updates", "stream"])
def _policy_step(
    logits, masked, weight, gains, flips, numbers, groups, updates, stream,
    N: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One block of ROWS groups; numbers is [seed, next_draw, (coefficient's bits, draw) of every update]."""
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = (group < groups)[:, None]
    place = group[:, None] * M + tl.arange(0, M)[None, :]
    seed = tl.load(numbers)
    values = tl.load(logits + place, mask=inside, other=0.0)
    if N < M:
        change = tl.zeros([ROWS, M], tl.float32)
        if gains is None:
            for i in range(updates):
                coefficient = tl.load(numbers + 2 * i + 2).to(tl.int32).to(tl.float32, bitcast=True)
                kept = _draw(values, group, seed, stream, tl.load(numbers + 2 * i + 3), N, M, ROWS)
                change += coefficient * _score(values, kept, N, M, ROWS)
        else:
            # With g the gain of a draw, sum c (g - mean of the others') s = (K sum c g s - sum g sum c s) / (K - 1):
            # one pass. Relative to the first draw's gain, lest what all of them share be subtracted last.
            gain = tl.load(gains + place, mask=inside, other=0.0)
            first = tl.zeros([ROWS], tl.float32)
            all_gains = tl.zeros([ROWS], tl.float32)
            plain = tl.zeros([ROWS, M], tl.float32)
            for i in range(updates):
                coefficient = tl.load(numbers + 2 * i + 2).to(tl.int32).to(tl.float32, bitcast=True)
                kept = _draw(values, group, seed, stream, tl.load(numbers + 2 * i + 3), N, M, ROWS)
                score = coefficient * _score(values, kept, N, M, ROWS)
                own = tl.sum(tl.where(kept, gain, 0.0), 1)
                first = tl.where(i == 0, own, first)
                own -= first
                all_gains += own
                plain += score
                change += own[:, None] * score
            change = (updates * change - all_gains[:, None] * plain) / (updates - 1)
        if updates > 0:
            values += change
            tl.store(logits + place, values, mask=inside)
    if masked is not None:
        kept = _draw(values, group, seed, stream, tl.load(numbers + 1), N, M, ROWS)
        tl.store(masked + place, tl.where(kept, tl.load(weight + place, mask=inside, other=0), 0), mask=inside)
        if flips is not None:
            least = tl.min(tl.where(kept, values, float("inf")), 1)
            most = tl.max(tl.where(kept, float("-inf"), values), 1)
            flipped = (least < most) & (group < groups)
            tl.atomic_add(flips, tl.sum(flipped.to(tl.int64), 0))


@functools.lru_cache(maxsize=8)
def _numbers(seed: int, next_draw: int, updates: tuple[tuple[float, int], ...], device: torch.device) -> Tensor:
    """The step's numbers on the device: the same for every layer, so one copy serves them all."""
    words = [seed, next_draw]
    for coefficient, draw in updates:
        words += [struct.unpack("<i", struct.pack("<f", coefficient))[0], draw]
    signed = [word - (1 << 64) if word >= 1 << 63 else word for word in words]
    return torch.tensor(signed, dtype=torch.int64).to(device)


def policy_step(
    logits: Tensor, weight: Tensor | None, masked: Tensor | None, gains: Tensor | None, flips: Tensor | None,
    n: int, m: int, updates: Sequence[tuple[float, int]], next_draw: int, seed: int, stream: int,
) -> None:  # fmt: skip
    """Runs the kernel; arguments were checked by :mod:`maskpro_kernels.policy_step`, and mean what they do there."""
    groups = logits.numel() // m
    if groups == 0:
        return
    integers = torch.int16 if weight is None or weight.element_size() == 2 else torch.int32
    rows = BLOCK_WEIGHTS // m
    with torch.cuda.device_of(logits):
        _policy_step[(triton.cdiv(groups, rows),)](
            logits,
            None if masked is None else masked.view(integers),
            None if weight is None else weight.view(integers),
            gains,
            flips,
            _numbers(seed, next_draw, tuple(updates), logits.device),
            groups,
            len(updates),
            stream,
            N=n,
            M=m,
            ROWS=rows,
            enable_fp_fusion=True,  # of scores: no product of a draw is added but by a written fma
        )
