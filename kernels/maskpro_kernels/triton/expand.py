"""From the stored bytes to a dense tile, in the registers of a GPU: kept values and bitmask in, zeros put back.

A tile is BLOCK_O rows of BLOCK_K columns, cut into groups of M. EXPAND says how the values get to their columns:

- PERMUTE, of 2:4 with 16 bits, and QUAD, of 1, 2, 4 or 8 kept with 16 bits: byte permutations (permute.py). Values are
  read as integers of 16 to 64 bits that hold a group, or half of 8 kept ones, neighbours side by side.
- WORD, of 8 bits and float32: all kept values of a group are one integer of 8 to 64 bits; shifted right by rank * bits
  it begins with the value wanted.
- GATHER, of every other N: the value is loaded from values[rank]. The M loads of a group fall into the N values that
  lie side by side, so memory is read once and the cache's bandwidth is what is spent.

What a column needs is its *rank*, the number of kept columns before it in its group. Counting bits is slow (16 lanes a
clock of a Hopper SM, where other integer operations have 64), so a byte of mask is dealt to eight nibbles and
multiplied by 0x11111110: nibble k of the product is the sum of the nibbles below it, the rank of column k. Planes of
constant k then take a shift and a mask each. They are joined so that a thread holds neighbouring columns side by side:
joining is a renaming of registers.
"""

# ruff: noqa: N803, N806, RET505, SIM108, SIM300  (constants in capitals, branches that are compiled: Triton's own style)
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped, import-not-found"

from __future__ import annotations

import triton
import triton.language as tl

from maskpro_kernels.triton.permute import quads, two_of_four

WORD = tl.constexpr(0)
GATHER = tl.constexpr(1)
PERMUTE = tl.constexpr(2)
QUAD = tl.constexpr(3)


@triton.jit
def _ranks_of_byte(byte):
    """uint32: nibble k is the number of bits set below bit k, of the lowest eight."""
    spread = (byte | (byte << 12)) & 0x000F000F
    spread = (spread | (spread << 6)) & 0x03030303
    spread = (spread | (spread << 3)) & 0x11111111
    return spread * 0x11111110


@triton.jit
def _bits_in_byte(byte, ranks):
    return (ranks >> 28) + ((byte >> 7) & 1)


@triton.jit
def _plane(source, bits, r0, r1, r2, r3, K: tl.constexpr, BITS: tl.constexpr, EXPAND: tl.constexpr):
    """Column K of every group: integers of BITS bits for a WORD, else of the dtype that source points to."""
    if K < 8:
        rank = (r0 >> (4 * K)) & 15
    elif K < 16:
        rank = ((r1 >> (4 * (K - 8))) & 15) + _bits_in_byte(bits, r0)
    elif K < 24:
        rank = ((r2 >> (4 * (K - 16))) & 15) + _bits_in_byte(bits, r0) + _bits_in_byte(bits >> 8, r1)
    else:
        before = _bits_in_byte(bits, r0) + _bits_in_byte(bits >> 8, r1) + _bits_in_byte(bits >> 16, r2)
        rank = ((r3 >> (4 * (K - 24))) & 15) + before
    kept = (bits & (1 << K)) != 0
    if EXPAND == GATHER:
        value = tl.load(source + rank.to(tl.int32), mask=kept, other=0)
    else:
        shifted = source >> (rank * BITS).to(source.dtype)
        if BITS == 8:
            value = tl.where(kept, shifted.to(tl.uint8), 0)
        elif BITS == 16:
            value = tl.where(kept, shifted.to(tl.uint16), 0)
        else:
            value = tl.where(kept, shifted.to(tl.uint32), 0)
    return value


@triton.jit
def _planes(
    source, bits, r0, r1, r2, r3,
    FIRST: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr, BITS: tl.constexpr, EXPAND: tl.constexpr,
):  # fmt: skip
    """Columns FIRST, FIRST + STEP, ... below M of every group, (BLOCK_O, groups, 2, 2, ...), last axis fastest."""
    if STEP == M:
        return _plane(source, bits, r0, r1, r2, r3, FIRST, BITS, EXPAND)
    else:
        even = _planes(source, bits, r0, r1, r2, r3, FIRST, 2 * STEP, M, BITS, EXPAND)
        odd = _planes(source, bits, r0, r1, r2, r3, FIRST + STEP, 2 * STEP, M, BITS, EXPAND)
        return tl.join(even, odd)


@triton.jit
def _load(source, inside, EVEN: tl.constexpr):
    """A tile that lies within the weight is loaded without a mask: a mask would keep loads narrow."""
    if EVEN:
        loaded = tl.load(source)
    else:
        loaded = tl.load(source, mask=inside, other=0)
    return loaded


@triton.jit
def _load_bits(
    bitmask, rows, stride, first, in_features, MASK: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """uint32 (BLOCK_O, BLOCK_K / GROUP): GROUP bits each, from column ``first`` on; 0 past in_features.

    Every group loads the whole integer it lies in: a group of its own load lies in the thread that holds its values,
    and 32 bits are the least that is copied asynchronously. Cutting up one wide load costs a dozen barriers.
    """
    EACH: tl.constexpr = MASK // GROUP
    group = tl.arange(0, BLOCK_K // GROUP)[None, :]
    place = first // MASK + group // EACH
    bits = _load(bitmask + rows[:, None] * (stride // (MASK // 8)) + place, first + group * GROUP < in_features, EVEN)
    bits = bits.to(tl.uint32)
    if EACH > 1:
        bits = (bits >> (group % EACH * GROUP).to(tl.uint32)) & ((1 << GROUP) - 1)
    return bits


@triton.jit
def _from_e4m3(byte):
    """float32 of e4m3fn numbers, exactly: their sign, exponent and mantissa are those of a float32 that is 2^120 less.

    In integers, as GPUs before compute capability 8.9 cannot convert them. Its two NaNs become 480 and -480: whoever
    loads a weight refuses them.
    """
    signed = byte.to(tl.int8, bitcast=True).to(tl.int32)
    return ((signed << 20) & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def expand_tile(
    values, bitmask, rows, kept, stride, first, in_features,
    N: tl.constexpr, M: tl.constexpr, DTYPE: tl.constexpr, EXPAND: tl.constexpr, MASK: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """The dense tile (BLOCK_O, BLOCK_K) of dtype DTYPE from column ``first``, a multiple of BLOCK_K; of e4m3, float32.

    Args:
        values: points to the kept values: to DTYPE if they are gathered (of e4m3, to uint8), to integers of a whole
            group otherwise.
        bitmask: points to unsigned integers of MASK bits; MASK is 8, 16 or 32 and at least M.
        rows: int64 (BLOCK_O,), all of them rows of the weight.
        kept, stride: values and bytes of mask in a row.
        in_features: columns past it give zeros; EVEN says that there are none.
    """
    if EXPAND == PERMUTE:
        bits = _load_bits(bitmask, rows, stride, first, in_features, MASK, 16, BLOCK_K, EVEN)
        group = first // 4 + tl.arange(0, BLOCK_K // 4)[None, :]
        words = _load(values + rows[:, None] * (kept // 2) + group, group * 4 < in_features, EVEN)
        tile = two_of_four(words, bits, BLOCK_O, BLOCK_K).to(DTYPE, bitcast=True)
    elif EXPAND == QUAD:
        GROUPS: tl.constexpr = BLOCK_K // M
        bits = _load_bits(bitmask, rows, stride, first, in_features, MASK, M, BLOCK_K, EVEN)
        if N == 8:
            word = 2 * (first // M) + tl.arange(0, 2 * GROUPS)[None, :]
            words = _load(values + rows[:, None] * (kept // 4) + word, word // 2 * M < in_features, EVEN)
            w0, w1 = tl.split(tl.reshape(words.to(tl.uint64), [BLOCK_O, GROUPS, 2]))
        else:
            group = first // M + tl.arange(0, GROUPS)[None, :]
            w0 = _load(values + rows[:, None] * (kept // N) + group, group * M < in_features, EVEN).to(tl.uint64)
            w1 = w0
        tile = quads(w0, w1, bits, N, M, BLOCK_O, BLOCK_K).to(DTYPE, bitcast=True)
    else:
        bits = _load_bits(bitmask, rows, stride, first, in_features, MASK, M, BLOCK_K, EVEN)
        r0 = _ranks_of_byte(bits & 0xFF)
        r1 = r0
        r2 = r0
        r3 = r0
        if M >= 16:
            r1 = _ranks_of_byte((bits >> 8) & 0xFF)
        if M == 32:
            r2 = _ranks_of_byte((bits >> 16) & 0xFF)
            r3 = _ranks_of_byte(bits >> 24)
        group = first // M + tl.arange(0, BLOCK_K // M)[None, :]
        if EXPAND == GATHER:
            source = values + rows[:, None] * kept + group * N
            tile = _planes(source, bits, r0, r1, r2, r3, 0, 1, M, 0, EXPAND)
            tile = tl.reshape(tile, [BLOCK_O, BLOCK_K])
        else:
            source = _load(values + rows[:, None] * (kept // N) + group, group * M < in_features, EVEN)
            tile = _planes(source, bits, r0, r1, r2, r3, 0, 1, M, DTYPE.primitive_bitwidth, EXPAND)
            tile = tl.reshape(tile, [BLOCK_O, BLOCK_K])
            if DTYPE != tl.float8e4nv:
                tile = tile.to(DTYPE, bitcast=True)
    if DTYPE == tl.float8e4nv:
        tile = _from_e4m3(tile)
    return tile
