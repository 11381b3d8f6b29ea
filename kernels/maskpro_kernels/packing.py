"""Packs dense weights into kept values and a bitmask, and back. FORMAT.md is the specification."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from maskpro_kernels import _cpu
from maskpro_kernels.bits import all_equal, bitmask_width, count_bits, pack_bits, unpack_bits
from maskpro_kernels.errors import NativeLibraryError
from maskpro_kernels.pattern import NMPattern

WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What a dense weight may be, and its kept values; those may be of 8 bits as well."""

EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
"""Kept values in units of a scale: our own (:mod:`maskpro_kernels.int8`), and those of W8A8 checkpoints."""


@dataclass(frozen=True, eq=False)
class NMWeight:
    """A packed (N:M)-sparse weight, logically ``shape`` = (out_features, in_features).

    Attributes:
        values: (out_features, in_features * n / m), the kept weights in column order, in units of the scale if any.
        bitmask: uint8 (out_features, ceil(in_features / 8)); bit k of byte j is column 8j + k.
        shape: (out_features, in_features) of the dense weight.
        pattern: the (N:M) pattern every group obeys.
        scale: float32 (out_features,), what a row's values are multiples of. Values of 8 bits have one; others may, as
            those that were fp8 numbers do, and None stands for ones.

    Raises:
        ValueError: the parts disagree with each other. The *content* of the bitmask is checked by
            :func:`check_bitmask`, which reads it all.
    """

    values: Tensor
    bitmask: Tensor
    shape: tuple[int, int]
    pattern: NMPattern
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        out_features, in_features = self.shape
        if self.values.dtype not in (*WEIGHT_DTYPES, *EIGHT_BITS):
            raise ValueError(f"values: expected one of {(*WEIGHT_DTYPES, *EIGHT_BITS)}, found {self.values.dtype}")
        if self.values.dtype in EIGHT_BITS and self.scale is None:
            raise ValueError(f"scale: expected one with values of {self.values.dtype}, found none")
        if self.scale is not None and (self.scale.dtype != torch.float32 or tuple(self.scale.shape) != (out_features,)):
            raise ValueError(
                f"scale: expected torch.float32 {(out_features,)}, found {self.scale.dtype} {tuple(self.scale.shape)}"
            )
        if self.bitmask.dtype != torch.uint8:
            raise ValueError(f"bitmask: expected torch.uint8, found {self.bitmask.dtype}")
        expected = (out_features, self.pattern.kept(in_features))
        if tuple(self.values.shape) != expected:
            raise ValueError(f"values: expected shape {expected}, found {tuple(self.values.shape)}")
        expected = (out_features, bitmask_width(in_features))
        if tuple(self.bitmask.shape) != expected:
            raise ValueError(f"bitmask: expected shape {expected}, found {tuple(self.bitmask.shape)}")

    @property
    def nbytes(self) -> int:
        """Bytes of the values, the bitmask and the scale."""
        return self.values.nbytes + self.bitmask.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @property
    def dense_nbytes(self) -> int:
        """Bytes the dense weight would take in the same dtype; in 16 bits for values of 8."""
        return self.shape[0] * self.shape[1] * max(2, self.values.element_size())


def magnitude_mask(weight: Tensor, pattern: NMPattern) -> Tensor:
    """Boolean mask of the n largest ``|w|`` of every group; ties go to the lower column.

    Args:
        weight: (out_features, in_features), any floating dtype.
        pattern: the pattern to keep.

    Returns:
        Boolean (out_features, in_features), exactly n True per group.

    Raises:
        ValueError: m does not divide in_features, or a weight is NaN.
    """
    return top_n_mask(weight.abs(), pattern)


def top_n_mask(scores: Tensor, pattern: NMPattern) -> Tensor:
    """Boolean mask of the n largest scores of every group along the last dimension.

    Args:
        scores: (out_features, in_features); higher is kept. Ties go to the lower column.
        pattern: the pattern to keep.

    Raises:
        ValueError: m does not divide in_features, or a score is NaN.
    """
    pattern.kept(scores.shape[-1])
    if torch.isnan(scores).any():
        raise ValueError("cannot rank weights: NaN among the scores")
    groups = scores.reshape(-1, pattern.m)
    order = torch.sort(groups, dim=-1, descending=True, stable=True).indices[:, : pattern.n]
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device)
    return mask.scatter_(1, order, True).reshape(scores.shape)


def group_counts(mask: Tensor, m: int) -> Tensor:
    """How many of every m consecutive columns are set: boolean (rows, columns) to uint8 (rows, columns / m)."""
    return count_bits(pack_bits(mask), m)[:, : mask.shape[1] // m]


def check_mask(mask: Tensor, pattern: NMPattern, *, first_row: int = 0) -> None:
    """Checks that a boolean (out_features, in_features) mask keeps exactly n in every group.

    Args:
        mask: boolean (out_features, in_features), or some rows of it.
        pattern: the pattern.
        first_row: the number of the first of these rows, for the message.

    Raises:
        ValueError: names the first offending row and group with the count found, and how many offend.
    """
    check_bits(pack_bits(mask), mask.shape[1], pattern, first_row=first_row)


def check_bits(bitmask: Tensor, in_features: int, pattern: NMPattern, *, first_row: int = 0) -> None:
    """Checks that every group of a bitmask keeps exactly n, and spare bits are 0.

    Args:
        bitmask: uint8 (out_features, ceil(in_features / 8)), or some rows of it.
        in_features: columns of the mask.
        pattern: the pattern.
        first_row: the number of the first of these rows, for the message.

    Raises:
        ValueError: as :func:`check_mask`, or a spare bit is set. Cost: a few passes over 1/8 byte per weight.
    """
    groups = pattern.kept(in_features) // pattern.n
    counts = count_bits(bitmask, pattern.m)
    if not all_equal(counts[:, :groups], pattern.n):
        counts = counts[:, :groups]
        wrong = counts != pattern.n
        row, group = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"mask is not strictly {pattern}: row {first_row + row}, group {group} (columns {group * pattern.m} to "
            f"{(group + 1) * pattern.m - 1}) keeps {int(counts[row, group])} of {pattern.m}, expected "
            f"{pattern.n}; {int(wrong.sum())} of {wrong.numel()} groups disagree"
        )
    if not all_equal(counts[:, groups:], 0):
        raise ValueError(f"bitmask: a bit past column {in_features - 1} is set")


def check_bitmask(weight: NMWeight) -> None:
    """:func:`check_bits` of a packed weight: values are told apart by the bits alone, so a wrong one is a wrong answer.

    Raises:
        ValueError: as there.
    """
    check_bits(weight.bitmask, weight.shape[1], weight.pattern)


def pack(dense: Tensor, pattern: NMPattern, mask: Tensor | None = None) -> NMWeight:
    """Packs a dense weight into its kept values and a bitmask.

    Args:
        dense: (out_features, in_features), bfloat16, float16 or float32.
        pattern: the (N:M) pattern.
        mask: boolean, the shape of ``dense``, exactly n True per group. None keeps the n largest
            ``|w|`` of each group, ties to the lower column.

    Returns:
        The packed weight on the device of ``dense``; kept values are copied bit for bit.

    Raises:
        ValueError: a wrong shape or dtype, m does not divide in_features, or the mask is not strict.
    """
    _check_dense(dense)
    pattern.kept(dense.shape[1])
    if mask is None:
        mask = magnitude_mask(dense, pattern)
    elif mask.dtype != torch.bool or mask.shape != dense.shape:
        raise ValueError(f"mask: expected torch.bool {tuple(dense.shape)}, found {mask.dtype} {tuple(mask.shape)}")
    return pack_under(pack_bits(mask), dense, pattern)


def _check_dense(dense: Tensor) -> None:
    if dense.ndim != 2:
        raise ValueError(f"weight: expected 2 dimensions, found shape {tuple(dense.shape)}")
    if dense.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"weight: expected one of {WEIGHT_DTYPES}, found {dense.dtype}")


def pack_under(bitmask: Tensor, dense: Tensor, pattern: NMPattern) -> NMWeight:
    """:func:`pack` under a mask that is packed already; the weight holds the very bitmask.

    Args:
        bitmask: uint8 (out_features, ceil(in_features / 8)), exactly n bits per group.
        dense: (out_features, in_features), bfloat16, float16 or float32.
        pattern: the (N:M) pattern.

    Raises:
        ValueError: the bitmask is not strict, or the parts disagree with each other.
    """
    _check_dense(dense)
    out_features, in_features = dense.shape
    expected, found = (out_features, bitmask_width(in_features)), tuple(bitmask.shape)
    if bitmask.dtype != torch.uint8 or found != expected or bitmask.device != dense.device:
        raise ValueError(
            f"bitmask: expected torch.uint8 {expected} on {dense.device}, found {bitmask.dtype} {found} on "
            f"{bitmask.device}"
        )
    check_bits(bitmask, in_features, pattern)
    return NMWeight(_kept_values(dense.detach(), bitmask, pattern), bitmask, (out_features, in_features), pattern)


def _kept_values(dense: Tensor, bitmask: Tensor, pattern: NMPattern) -> Tensor:
    if dense.device.type == "cpu":
        with suppress(NativeLibraryError):  # a checkout that only a GPU uses need not be built
            return _cpu.kept_values(dense.contiguous(), bitmask.contiguous(), pattern.n, pattern.m)
    return dense[unpack_bits(bitmask, dense.shape[1])].reshape(len(dense), pattern.kept(dense.shape[1]))


def unpack(weight: NMWeight) -> Tensor:
    """Expands a packed weight: kept values bit for bit, or times their scale; +0.0 elsewhere.

    Returns:
        (out_features, in_features), on the device of ``weight.values`` and of its dtype; float32 with a scale.

    Raises:
        ValueError: the bitmask does not keep exactly n in every group.
    """
    check_bitmask(weight)
    mask = unpack_bits(weight.bitmask, weight.shape[1])
    values = weight.values if weight.scale is None else weight.values.float() * weight.scale.unsqueeze(1)
    dense = torch.zeros(weight.shape, dtype=values.dtype, device=values.device)
    return dense.masked_scatter_(mask, values)
