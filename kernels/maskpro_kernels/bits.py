"""Boolean rows to bytes and back: bit k of byte j is column 8j + k, least significant bit first.

On a CPU by numpy, which is forty times as fast at it as torch's operators.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_BIT_WEIGHTS = tuple(1 << k for k in range(8))


def bitmask_width(in_features: int) -> int:
    """Bytes of one bitmask row."""
    return (in_features + 7) // 8


def pack_bits(mask: Tensor) -> Tensor:
    """Packs a boolean (rows, columns) mask into uint8 (rows, ceil(columns / 8)); spare bits are 0."""
    rows, columns = mask.shape
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))
    spare = -columns % 8
    if spare:
        mask = torch.nn.functional.pad(mask, (0, spare))
    bits = mask.reshape(rows, -1, 8)
    packed = torch.zeros(bits.shape[:2], dtype=torch.uint8, device=mask.device)
    for k, bit in enumerate(_BIT_WEIGHTS):  # eight passes over bytes: no temporary wider than the mask
        packed |= bits[:, :, k].to(torch.uint8) * bit
    return packed


def unpack_bits(bitmask: Tensor, columns: int) -> Tensor:
    """Inverse of :func:`pack_bits`: uint8 (rows, ceil(columns / 8)) to boolean (rows, columns)."""
    if bitmask.device.type == "cpu":
        unpacked = np.unpackbits(bitmask.numpy(), axis=1, count=columns, bitorder="little")
        return torch.from_numpy(unpacked).view(torch.bool)
    weights = torch.tensor(_BIT_WEIGHTS, dtype=torch.uint8, device=bitmask.device)
    bits = (bitmask.unsqueeze(-1) & weights) != 0
    return bits.reshape(bitmask.shape[0], -1)[:, :columns]


def count_bits(bitmask: Tensor, group: int) -> Tensor:
    """Counts the set bits of every group of columns, bytes at a time.

    Args:
        bitmask: uint8 (rows, bytes).
        group: columns per group: 4, 8, 16 or 32.

    Returns:
        uint8 (rows, 8 * bytes / group); a last group cut short by the row's end is left out.
    """
    if bitmask.device.type == "cpu":
        return torch.from_numpy(_count_bits(np.ascontiguousarray(bitmask.numpy()), group))
    pairs = bitmask - ((bitmask >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    if group == 4:
        return torch.stack((nibbles & 0x0F, nibbles >> 4), dim=-1).flatten(1)
    counts = (nibbles + (nibbles >> 4)) & 0x0F
    per_group = group // 8
    whole = counts.shape[1] // per_group * per_group
    return counts[:, :whole].reshape(counts.shape[0], -1, per_group).sum(-1, dtype=torch.uint8)


def _count_bits(bitmask: npt.NDArray[np.uint8], group: int) -> npt.NDArray[np.uint8]:
    if group == 4:
        nibbles = bitmask.astype("<u2")
        nibbles |= nibbles << 4
        nibbles &= 0x0F0F
        return np.bitwise_count(nibbles.view(np.uint8))
    per_group = group // 8
    whole = bitmask.shape[1] // per_group * per_group
    return np.bitwise_count(np.ascontiguousarray(bitmask[:, :whole]).view(f"<u{per_group}"))


def all_equal(counts: Tensor, value: int) -> bool:
    """Whether all of ``counts``, uint8, are ``value``; on a CPU by numpy, too, which compares bytes many at a time."""
    if counts.device.type == "cpu":
        return bool((counts.numpy() == value).all())
    return bool((counts == value).all())
