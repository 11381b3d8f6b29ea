"""How a product is cut into programs: what the kernels are compiled for, and what tuning chooses among."""

from __future__ import annotations

from dataclasses import dataclass

FEWEST_TOKENS = 16
"""Tokens of the narrowest program: fewer are padded to these, which costs no bytes of weight."""

_PROGRAMS_PER_PROCESSOR = 3
_MOST_SPLITS = 16


@dataclass(frozen=True, order=True)
class Tile:
    """One way to cut a product.

    Attributes:
        rows: outputs of one program, a power of two.
        columns: inputs that one step of its loop multiplies, a power of two, at least 32.
        tokens: tokens of one program, a power of two, at least 16.
        splits: programs that share a block of rows, each with its own columns.
        warps: of one program.
        stages: steps whose loads are under way at the same time.
    """

    rows: int
    columns: int
    tokens: int
    splits: int = 1
    warps: int = 4
    stages: int = 3


def tiles(tokens: int, out_features: int, in_features: int, processors: int, stored_bytes: int) -> list[Tile]:
    """The ways worth measuring, the likeliest first.

    Args:
        tokens: of the product.
        out_features, in_features: of the weight.
        processors: of the GPU.
        stored_bytes: of one number that is multiplied, 2 or 4: a tile of 4 takes twice the registers.
    """
    narrow = max(FEWEST_TOKENS, 1 << (tokens - 1).bit_length())
    if stored_bytes == 4:
        shapes = [(64, 32, min(narrow, 32), 4, 2), (32, 32, 16, 4, 2)]
    elif narrow <= 32:
        shapes = [
            (64, 128, narrow, 4, 4), (64, 256, narrow, 4, 3), (128, 128, narrow, 8, 3), (32, 256, narrow, 4, 3),
            (16, 256, narrow, 4, 4), (64, 64, narrow, 4, 5),
        ]  # fmt: skip
    elif narrow <= 64:
        shapes = [(64, 128, 64, 4, 3), (128, 128, 64, 8, 3), (64, 64, 64, 4, 4), (128, 64, 64, 4, 4)]
    else:
        shapes = [(128, 64, 128, 8, 3), (128, 64, min(narrow, 256), 8, 3), (64, 128, 128, 4, 3), (128, 128, 128, 8, 2)]
    found: list[Tile] = []
    for rows, columns, wide, warps, stages in shapes:
        programs = -(-out_features // rows) * -(-tokens // wide)
        most = min(_MOST_SPLITS, max(1, in_features // columns // 2))  # a split of two steps at least
        wanted = max(1, _PROGRAMS_PER_PROCESSOR * processors // programs)
        splits = min(1 << (wanted.bit_length() - 1), _power_of_two(most))
        for count in dict.fromkeys((splits, min(2 * splits, _power_of_two(most)), max(1, splits // 2))):
            found.append(Tile(rows, columns, wide, count, warps, stages))
            if tokens > 64:
                break
    return list(dict.fromkeys(found))


def _power_of_two(most: int) -> int:
    return 1 << (most.bit_length() - 1)
