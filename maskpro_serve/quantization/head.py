"""The output head: read in the checkpoint's dtype, whatever the activations' is.

With float32 activations vLLM widens every dense weight, and a small model then reads about as many bytes for its output
head as for all its packed linears together. The kernels of the packed weights read a dense one as well. The copy costs
2 bytes a weight of memory: vLLM's own stays, for the embedding that may be tied to it and for many rows at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from maskpro_kernels.interleaved import DENSE, interleave_dense
from maskpro_kernels.support import select_backend

_HALVES = (torch.bfloat16, torch.float16)
_MOST_TOKENS = 32
"""Beyond these many rows torch's float32 product is faster: arithmetic bounds it, not the bytes of the weight."""


class HeadMethod(UnquantizedEmbeddingMethod):
    """An output head of 16-bit weights under float32 activations on the CPU; anything else is vLLM's own.

    Args:
        stored: dtype of the checkpoint's weights, if it is known.
    """

    def __init__(self, stored: torch.dtype | None) -> None:
        super().__init__()
        self._stored = stored

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        config = get_current_vllm_config().model_config
        weight = layer.weight.data
        stored = self._stored
        if (
            weight.device.type != "cpu" or config.dtype != torch.float32 or stored is None or stored not in _HALVES
            or not DENSE.divides(weight.shape[1]) or select_backend(DENSE, config.dtype, stored, "cpu").isa is None
        ):  # fmt: skip
            return
        narrow = weight.to(stored)
        if not torch.equal(narrow.to(weight.dtype), weight):
            return  # a head of more bits than the model's other weights
        order = interleave_dense(narrow)
        layer.maskpro_head = Parameter(order.data, requires_grad=False)
        layer.maskpro_head_dtype = order.dtype
        layer.maskpro_head_isa = order.isa

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not hasattr(layer, "maskpro_head") or x.numel() > _MOST_TOKENS * x.shape[-1]:
            return super().apply(layer, x, bias)
        rows, columns = layer.weight.shape
        return torch.ops.maskpro.nm_linear_interleaved(
            x, layer.maskpro_head, None, bias, rows, columns, DENSE.n, DENSE.m, layer.maskpro_head_dtype,
            layer.maskpro_head_isa,
        )  # fmt: skip
