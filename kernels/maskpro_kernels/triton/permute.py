"""Zeros put back by byte permutations: one instruction (PRMT) picks any four of eight bytes, two 16-bit columns.

2:4 (two_of_four): a group's two values are one word and its four columns are two; each of these is one permutation of
the word and of zeros. Of its selectors a table of eight is known by the low three bits of the group's mask, which
differ for all six masks of 2:4, and a permutation of constants looks up four groups at once: 1.25 instructions a
weight.

1, 2, 4 or 8 kept (quads): four columns at a time. Their four values lie in 8 bytes, the whole group's or, of 8 kept, a
window of its 16 that is shifted there. A selector is the byte of the value's rank, ranks are computed a byte each by
one multiplication, and what is not kept is cleared by a mask that is a permutation again: some 4 instructions a weight.
"""

# ruff: noqa: N803, N806, RET505  (constants in capitals, branches that are compiled: Triton's own style)
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped, import-not-found"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def _byte_permute(low, high, selector):
    """PRMT: byte i of the result is byte (selector >> 4i) & 7 of the eight in (high, low)."""
    return libdevice.byte_perm(low, high, selector)


@triton.jit
def _halves(pairs, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr):
    """int32 pairs of columns to uint16 (BLOCK_O, BLOCK_K)."""
    pairs = tl.reshape(pairs, [BLOCK_O, BLOCK_K // 2])
    return tl.reshape(tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16)), [BLOCK_O, BLOCK_K])


@triton.jit
def _permuted_pair(word, selectors_even, selectors_odd, GROUP: tl.constexpr):
    """Two neighbouring columns of the GROUP-th of four groups, as one word."""
    zeros = tl.zeros(word.shape, tl.int32)
    selector = _byte_permute(selectors_even, selectors_odd, zeros + (GROUP | ((4 + GROUP) << 4)))
    return _byte_permute(word, zeros, selector)


@triton.jit
def two_of_four(words, bits, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr):
    """uint16 (BLOCK_O, BLOCK_K) of 2:4.

    Args:
        words: int32 (BLOCK_O, BLOCK_K / 4), the two values of every group.
        bits: uint32 (BLOCK_O, BLOCK_K / 16), the masks of four groups.
    """
    w02, w13 = tl.split(tl.reshape(words, [BLOCK_O, BLOCK_K // 16, 2, 2]))
    w0, w2 = tl.split(w02)
    w1, w3 = tl.split(w13)
    # Where the two bytes of a column come from, by the low three bits of its group's mask: 0x10 is the first value,
    # 0x32 the second, 0x44 zeros. 0 is a group outside the weight, 7 no 2:4.
    which = bits.to(tl.int32) & 0x7777
    zeros = tl.zeros(bits.shape, tl.int32)
    s0 = _byte_permute(zeros + 0x10441044, zeros + 0x44441044, which)
    s1 = _byte_permute(zeros + 0x32104444, zeros + 0x44104444, which)
    s2 = _byte_permute(zeros + 0x44444444, zeros + 0x44323210, which)
    s3 = _byte_permute(zeros + 0x44323244, zeros + 0x44444432, which)
    p0 = tl.join(_permuted_pair(w0, s0, s1, 0), _permuted_pair(w0, s2, s3, 0))
    p1 = tl.join(_permuted_pair(w1, s0, s1, 1), _permuted_pair(w1, s2, s3, 1))
    p2 = tl.join(_permuted_pair(w2, s0, s1, 2), _permuted_pair(w2, s2, s3, 2))
    p3 = tl.join(_permuted_pair(w3, s0, s1, 3), _permuted_pair(w3, s2, s3, 3))
    # The axes after the unit of four groups: pair of the group, group / 2, group % 2.
    pairs = tl.permute(tl.join(tl.join(p0, p2), tl.join(p1, p3)), [0, 1, 3, 4, 2])
    return _halves(pairs, BLOCK_O, BLOCK_K)


@triton.jit
def _quad_pair(w0, w1, bits, J: tl.constexpr, N: tl.constexpr):
    """Two neighbouring columns, 2 J and 2 J + 1, of a group of 16-bit values in w0 and w1, as one word."""
    QUARTER: tl.constexpr = J // 2
    HALF: tl.constexpr = J % 2
    nibble = (bits >> (4 * QUARTER)) & 15
    spread = (nibble * 0x00204081) & 0x01010101  # a byte of 0 or 1 for each of the four columns
    ranks = spread * 0x01010100
    window = w0
    if QUARTER > 0:
        counts = bits - ((bits >> 1) & 0x55555555)
        counts = (counts & 0x33333333) + ((counts >> 2) & 0x33333333)
        before = ((counts * 0x11111110) >> (4 * QUARTER)) & 15
        if N == 8:  # the four values from there on
            low = tl.where(before < 4, w0, w1)
            high = tl.where(before < 4, w1, 0)
            shift = ((before & 3) * 16).to(tl.uint64)
            window = (low >> shift) | ((high << 1) << (63 - shift))
        else:
            ranks += before * 0x01010101
    selector = (ranks * 0x22 + 0x10101010) >> (16 * HALF)
    kept = _byte_permute(
        (spread * 0xFF).to(tl.int32),
        tl.zeros(bits.shape, tl.int32),
        tl.full(bits.shape, 0x1100 + 0x2222 * HALF, tl.int32),
    )
    pair = _byte_permute(window.to(tl.int32), (window >> 32).to(tl.int32), selector.to(tl.int32))
    return pair & kept


@triton.jit
def _quad_pairs(w0, w1, bits, FIRST: tl.constexpr, STEP: tl.constexpr, PAIRS: tl.constexpr, N: tl.constexpr):
    """Pairs FIRST, FIRST + STEP, ... below PAIRS of every group, (BLOCK_O, groups, 2, 2, ...), last axis fastest."""
    if STEP == PAIRS:
        return _quad_pair(w0, w1, bits, FIRST, N)
    else:
        even = _quad_pairs(w0, w1, bits, FIRST, 2 * STEP, PAIRS, N)
        odd = _quad_pairs(w0, w1, bits, FIRST + STEP, 2 * STEP, PAIRS, N)
        return tl.join(even, odd)


@triton.jit
def quads(w0, w1, bits, N: tl.constexpr, M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr):
    """uint16 (BLOCK_O, BLOCK_K) of N values a group, 1, 2, 4 or 8.

    Args:
        w0: uint64 (BLOCK_O, BLOCK_K / M), the first four values of every group, or as many as there are.
        w1: the last four of 8; else anything.
        bits: uint32 of the same shape, the masks of the groups.
    """
    return _halves(_quad_pairs(w0, w1, bits, 0, 1, M // 2, N), BLOCK_O, BLOCK_K)
