"""Activations in 8 bits, beside 8-bit weights (W8A8): symmetric, a scale for each token or one for all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskpro_kernels.int8 import LEVELS, nearest_levels

LARGEST = {torch.int8: float(LEVELS), torch.float8_e4m3fn: torch.finfo(torch.float8_e4m3fn).max}
"""Of every dtype that activations are rounded to, the number that a token's largest magnitude becomes."""


@dataclass(frozen=True, eq=False)
class EightBitInputs:
    """How the activations of a layer are rounded to 8 bits.

    Attributes:
        dtype: int8 or float8_e4m3fn.
        scale: float32, one number: what they are multiples of, as it was calibrated. None: every token has its own
            scale, its largest magnitude / 127 or / 448.

    Raises:
        ValueError: another dtype, or another scale.
    """

    dtype: torch.dtype
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        if self.dtype not in LARGEST:
            raise ValueError(f"activations: expected one of {tuple(LARGEST)}, found {self.dtype}")
        if self.scale is not None and (self.scale.dtype != torch.float32 or self.scale.numel() != 1):
            raise ValueError(
                f"activations: scale: expected one number of torch.float32, found {self.scale.dtype} "
                f"{tuple(self.scale.shape)}"
            )

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds activations to the nearest number of the dtype, ties to even; what lies outside its range is clipped.

        Args:
            x: (tokens, in_features).

        Returns:
            (tokens, in_features) of the dtype, and float32 (tokens, 1) or (1, 1), what they are multiples of: NaN for a
            token with a NaN, which int8 has none for, or without a calibrated scale with an infinity.
        """
        x = x.float()
        if self.scale is None and self.dtype == torch.int8:
            levels, scale = nearest_levels(x, 1)
            return levels, scale.masked_fill(scale.isinf(), torch.nan)
        if self.scale is None:
            smallest = torch.finfo(torch.float32).tiny
            peak = x.abs().amax(dim=1, keepdim=True)
            scale = (peak / torch.full_like(peak, LARGEST[self.dtype])).clamp_min(smallest)  # as nearest_levels
        else:
            scale = self.scale.reshape(1, 1)
        if self.dtype == torch.int8:
            levels = (x / scale).round().clamp(-LEVELS - 1, LEVELS).to(torch.int8)
            return levels, torch.where(x.isnan().any(1, keepdim=True), torch.nan, scale)
        largest = LARGEST[self.dtype]
        return (x / scale).clamp(-largest, largest).to(self.dtype), scale

    def simulated(self, x: Tensor) -> Tensor:
        """The numbers that :meth:`rounded` activations stand for (fake quantization), float32.

        Args:
            x: (..., in_features).
        """
        levels, scale = self.rounded(x.reshape(-1, x.shape[-1]))
        return (levels.float() * scale).reshape(x.shape)
