"""One step of learning masks in one pass over the weights: update the logits, sample, write the masked weight.

No mask is ever stored. A draw is a function of (seed, stream, draw, logits), so an update draws its mask again
from the logits it was drawn from; the caller must not change them in between.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from maskpro_kernels import _cpu
from maskpro_kernels.errors import UnsupportedKernelError

if TYPE_CHECKING:
    from torch import Tensor

    from maskpro_kernels.pattern import NMPattern

SUPPORTED_M = (4, 8, 16)
"""Larger groups have too many subsets for an exact score."""

MAX_GAIN_DRAWS = 16
"""Draws of one group that can be compared by their gains."""

DRAW_VERSION = 2
"""Which masks a seed draws. Counted up whenever they change: a run cannot go on with other draws."""


@torch.no_grad()
def policy_step(
    logits: Tensor,
    pattern: NMPattern,
    *,
    seed: int,
    stream: int,
    updates: Sequence[tuple[float, int]] = (),
    gains: Tensor | None = None,
    weight: Tensor | None = None,
    masked: Tensor | None = None,
    next_draw: int = 0,
    flips: Tensor | None = None,
) -> None:
    """``logits += sum of coefficient * score(mask of draw)``; then ``masked = weight`` under the next draw's mask.

    All tensors are on one device: the CPU runs C++, a CUDA GPU Triton.

    Args:
        logits: float32 (out_features, in_features), contiguous; groups are m consecutive inputs. Updated in place.
        pattern: the pattern; m is 4, 8 or 16.
        seed: of the whole run, 64 bits.
        stream: tells layers apart, below 2^30.
        updates: (coefficient, draw), all scored at the logits as they are given.
        gains: float32 of the same shape, or None: what each weight is worth where it is kept. A group's coefficient is
            then multiplied by what its mask of that draw gains over the other draws' on average; 2 to 16 updates.
        weight: dense weight of the same shape, 2 or 4 bytes an element, contiguous.
        masked: what the model computes with: same shape and dtype, contiguous. None only updates.
        next_draw: number of the draw that ``masked`` gets, 64 bits.
        flips: int64 of one element, or None: the groups are added to it whose mask in ``masked`` is not a most likely
            one of theirs.

    Raises:
        ValueError: shapes, dtypes or numbers are impossible.
        UnsupportedKernelError: another device, or a GPU without Triton.

    Cost: one pass. Arithmetic per group and update is O(2^n) on the CPU, O(m) times at most 125 on a GPU. Any number
    of threads gives the same bits; a GPU draws the same masks from the same logits, and updates them to rounding.
    Source: MaskPro (arXiv:2506.12876), equation of the policy gradient; Philox (Salmon et al., SC 2011).
    """
    _check(logits, pattern, weight, masked)
    if gains is not None:
        if gains.dtype != torch.float32 or gains.shape != logits.shape or not gains.is_contiguous():
            raise ValueError(
                f"policy_step: expected contiguous float32 gains of shape {tuple(logits.shape)}, found {gains.dtype} "
                f"{tuple(gains.shape)}"
            )
        if not 2 <= len(updates) <= MAX_GAIN_DRAWS:
            raise ValueError(f"policy_step: gains compare 2 to {MAX_GAIN_DRAWS} draws, found {len(updates)}")
    if flips is not None and (flips.dtype != torch.int64 or flips.numel() != 1):
        raise ValueError(f"policy_step: expected one int64 of flips, found {flips.dtype} {tuple(flips.shape)}")
    for coefficient, _ in updates:
        if not abs(coefficient) <= torch.finfo(torch.float32).max:
            raise ValueError(f"policy_step: an update's coefficient is {coefficient}: expected one that float32 holds")
    draws = [("draw", draw, 64) for _, draw in updates]
    for name, number, bits in (("stream", stream, 30), ("seed", seed, 64), ("next_draw", next_draw, 64), *draws):
        if not 0 <= number < 1 << bits:
            raise ValueError(f"policy_step: {name}: expected a number of {bits} bits, found {number}")
    for name, tensor in (("weight", weight), ("masked", masked), ("gains", gains), ("flips", flips)):
        if tensor is not None and tensor.device != logits.device:
            raise ValueError(f"policy_step: logits on {logits.device}, {name} on {tensor.device}")
    match logits.device.type:
        case "cpu":
            _cpu.policy_step(
                logits, None if masked is None else weight, masked, gains, flips, pattern.n, pattern.m, updates,
                next_draw, seed, stream, _cpu.available_isas()[0], torch.get_num_threads(),
            )  # fmt: skip
        case "cuda":
            _triton_policy_step()(
                logits, weight, masked, gains, flips, pattern.n, pattern.m, updates, next_draw, seed, stream
            )
        case _:
            raise UnsupportedKernelError(
                f"policy_step: no kernel for {logits.device}: expected the CPU or a CUDA device"
            )


@functools.cache
def _triton_policy_step() -> Callable[..., None]:
    """The Triton kernel's caller: imported where a GPU is used, as a CPU's torch comes without Triton."""
    try:
        from maskpro_kernels.triton.policy_step import policy_step as run
    except ImportError as error:
        raise UnsupportedKernelError(
            f"policy_step: a CUDA device needs Triton, which cannot be imported: {error}"
        ) from error
    return run


def _check(logits: Tensor, pattern: NMPattern, weight: Tensor | None, masked: Tensor | None) -> None:
    if pattern.m not in SUPPORTED_M:
        raise ValueError(f"policy_step: expected groups of {SUPPORTED_M}, found pattern {pattern}")
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(f"policy_step: expected contiguous float32 logits, found {logits.dtype}")
    if logits.shape[-1] % pattern.m:
        raise ValueError(f"policy_step: {pattern.m} does not divide in_features = {logits.shape[-1]}")
    if masked is None:
        return
    for name, tensor in (("weight", weight), ("masked", masked)):
        if tensor is None or tensor.shape != logits.shape or not tensor.is_contiguous():
            found = None if tensor is None else tuple(tensor.shape)
            raise ValueError(f"policy_step: expected a contiguous {name} of shape {tuple(logits.shape)}, found {found}")
    assert weight is not None
    if weight.dtype != masked.dtype or weight.element_size() not in (2, 4):
        raise ValueError(f"policy_step: expected two of one dtype, found {weight.dtype} and {masked.dtype}")
