"""The output head and other dense linears: read in the checkpoint's dtype, whatever the activations' is.

With float32 activations vLLM widens every dense weight, and a small model then reads more bytes for its output head
than for all its packed linears together. The kernels of the packed weights read a dense one as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from maskpro_kernels.interleaved import DENSE, interleave_dense

_HALVES = (torch.bfloat16, torch.float16)
_MOST_TOKENS = 32
"""Beyond these many rows torch's float32 product is faster: arithmetic bounds it, not the bytes of the weight."""


class HeadMethod(UnquantizedEmbeddingMethod):
    """An output head of 16-bit weights under float32 activations on the CPU; anything else is vLLM's own."""

    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        config = get_current_vllm_config().model_config
        weight = layer.weight.data
        if (
            weight.device.type != "cpu" or config.dtype != torch.float32 or config.hf_config.dtype not in _HALVES
            or not DENSE.divides(weight.shape[1])
        ):  # fmt: skip
            return
        # Exact: the weights were widened from this dtype.
        order = interleave_dense(weight.to(config.hf_config.dtype))
        layer.maskpro_head = Parameter(order.data, requires_grad=False)
        layer.maskpro_head_dtype = order.dtype

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not hasattr(layer, "maskpro_head") or x.numel() > _MOST_TOKENS * x.shape[-1]:
            return super().apply(layer, x, bias)
        rows, columns = layer.weight.shape
        return torch.ops.maskpro.nm_linear_interleaved(
            x, layer.maskpro_head, None, bias, rows, columns, DENSE.n, DENSE.m, layer.maskpro_head_dtype
        )
