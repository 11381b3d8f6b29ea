"""A torch.nn module in the place of a packed linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import maskpro_kernels.ops  # noqa: F401  (registers torch.ops.maskpro)
from maskpro_kernels import NMPattern, NMWeight
from maskpro_kernels.bits import bitmask_width
from maskpro_kernels.interleaved import InterleavedWeight, interleave, packed_again
from maskpro_kernels.model_folder import CheckpointError
from maskpro_kernels.packing import check_bitmask
from maskpro_kernels.support import select_backend


class NMLinear(nn.Module):
    """``y = x W^T + b`` with a packed (N:M)-sparse ``W``, for inference.

    Its state dict is what a packed checkpoint stores: compressed, bitmask, shape, and weight_scale for int8 values.
    On a CPU the weight is kept once, in the order that the kernels read; it is brought back when it is saved or moved.

    Args:
        linear: what it replaces; its bias is taken over.
        pattern: of the weight.
        dtype: of the kept values, whatever the activations' is.
        name: in error messages.
    """

    compressed: Tensor | None
    bitmask: Tensor | None
    interleaved: Tensor | None
    weight_scale: Tensor | None
    shape: Tensor

    def __init__(self, linear: nn.Linear, pattern: NMPattern, dtype: torch.dtype, name: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.pattern, self.dtype, self.name = pattern, dtype, name
        rows, device = self.out_features, linear.weight.device
        kept = torch.empty((rows, pattern.kept(self.in_features)), dtype=dtype, device=device)
        bits = torch.empty((rows, bitmask_width(self.in_features)), dtype=torch.uint8, device=device)
        scale = torch.empty((rows, 1), dtype=torch.float32, device=device) if dtype == torch.int8 else None
        self.register_buffer("compressed", kept)
        self.register_buffer("bitmask", bits)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("shape", torch.empty((2, 1), dtype=torch.int64, device=device))
        self.register_buffer("interleaved", None, persistent=False)
        self.bias = linear.bias
        self._isa = 0  # of the kernels, once there is an interleaved weight

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, pattern={self.pattern}"

    def forward(self, x: Tensor) -> Tensor:
        n, m, scale = self.pattern.n, self.pattern.m, self._scale()
        if self.interleaved is None:
            return torch.ops.maskpro.nm_linear(x, self.compressed, self.bitmask, scale, self.bias, n, m)
        return torch.ops.maskpro.nm_linear_interleaved(
            x, self.interleaved, scale, self.bias, self.out_features, self.in_features, n, m, self.dtype, self._isa
        )

    def check(self) -> None:
        """Checks what was loaded, once.

        Raises:
            CheckpointError: the bitmask is not strict, or a scale is not finite; names the layer.
        """
        if self.weight_scale is not None and not bool(torch.isfinite(self.weight_scale).all()):
            raise CheckpointError(f"{self.name}.weight_scale: expected finite scales, found inf or NaN")
        try:
            check_bitmask(self.packed())
        except ValueError as error:
            raise CheckpointError(f"{self.name}.bitmask: {error}") from error

    def packed(self) -> NMWeight:
        """The weight as a checkpoint stores it."""
        size = (self.out_features, self.in_features)
        if self.interleaved is not None:
            return packed_again(
                InterleavedWeight(self.interleaved, self._scale(), size, self.pattern, self.dtype, self._isa)
            )
        assert self.compressed is not None
        assert self.bitmask is not None
        return NMWeight(self.compressed, self.bitmask, size, self.pattern, self._scale())

    def settle(self) -> None:
        """Brings a weight on the CPU into the kernels' order; the stored one is given up."""
        if self.compressed is None or self.compressed.device.type != "cpu":
            return
        self.dtype = self.compressed.dtype
        if select_backend(self.pattern, torch.float32, self.dtype, "cpu").isa is None:
            return  # the reference reads weights as they are stored
        order = interleave(self.packed())
        self.interleaved, self._isa = order.data, order.isa
        self.compressed = self.bitmask = None

    def _unsettle(self) -> None:
        if self.interleaved is not None:
            weight = self.packed()
            self.compressed, self.bitmask, self.interleaved = weight.values, weight.bitmask, None

    def __getstate__(self) -> dict[str, Any]:
        """Pickled as stored: the order and the instruction set are this machine's."""
        if self.interleaved is None:
            return self.__dict__
        weight, buffers = self.packed(), dict(self._buffers)
        buffers |= {"compressed": weight.values, "bitmask": weight.bitmask, "interleaved": None}
        return {**self.__dict__, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.settle()

    def _scale(self) -> Tensor | None:
        return None if self.weight_scale is None else self.weight_scale.flatten()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NMLinear:
        """Moves the stored weight; a cast is of activations: kept values and scales have the checkpoint's dtypes."""
        self._unsettle()
        kept, scale = self.compressed, self.weight_scale
        super()._apply(fn, recurse)
        if kept is not None and self.compressed is not None and self.compressed.dtype != kept.dtype:
            self.compressed = kept.to(self.compressed.device)
        if scale is not None and self.weight_scale is not None and self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        self.settle()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.interleaved is not None:
            weight = self.packed()
            destination |= {f"{prefix}compressed": weight.values, f"{prefix}bitmask": weight.bitmask}

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        self._unsettle()
        super()._load_from_state_dict(*arguments, **keywords)
        self.settle()
