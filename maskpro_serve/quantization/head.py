"""The output head: read in the checkpoint's dtype, whatever the activations' is, by the kernels of the packed weights.

With float32 activations vLLM widens every dense weight, and a small model then reads about as many bytes for its output
head as for all its packed linears together. With bfloat16 ones on AMX the bytes are the same, but oneDNN takes longer
(docs/results/output_head_amx_bf16.json).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from maskpro_kernels.interleaved import DENSE, interleave_dense
from maskpro_kernels.support import select_backend
from maskpro_serve.freed_memory import return_freed_memory

_HALVES = (torch.bfloat16, torch.float16)
_MOST_FLOAT32_ROWS = 32
"""Beyond these many rows torch's float32 product is faster: arithmetic bounds it, not the bytes of the weight."""


class HeadMethod(UnquantizedEmbeddingMethod):
    """An output head on the CPU: of 16-bit weights under float32 activations, up to 32 rows, and of bfloat16 on AMX.

    Anything else is vLLM's own. Under float32 the copy costs 2 bytes a weight of memory: vLLM's own stays for many rows
    at once. On AMX it takes the place of oneDNN's, and of the weight where nobody else reads that.

    Args:
        stored: dtype of the checkpoint's weights, if it is known.
    """

    supports_pre_processed_weights = False  # they are interleaved here, for this CPU

    def __init__(self, stored: torch.dtype | None) -> None:
        super().__init__()
        self._stored = stored

    def tie_weights(self, layer: Any, embed_tokens: VocabParallelEmbedding) -> Any:
        layer.maskpro_tied = True
        return super().tie_weights(layer, embed_tokens)

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, "maskpro_head"):
            return  # vLLM may call this twice
        narrow = self._narrowed(layer.weight.data)
        if narrow is None:
            super().process_weights_after_loading(layer)
            return
        order = interleave_dense(narrow)
        layer.maskpro_head = Parameter(order.data, requires_grad=False)
        layer.maskpro_head_shape = order.shape
        layer.maskpro_head_dtype = order.dtype
        layer.maskpro_head_isa = order.isa
        if layer.weight.dtype == torch.float32:
            super().process_weights_after_loading(layer)
        elif not self._has_other_readers(layer):
            layer.weight = Parameter(narrow.new_empty(0), requires_grad=False)
            del narrow
            return_freed_memory()

    def _narrowed(self, weight: Tensor) -> Tensor | None:
        """The weight in the checkpoint's dtype, or None where vLLM's method is as fast, or is the only one."""
        stored, model = self._stored, get_current_vllm_config().model_config
        if weight.device.type != "cpu" or stored not in _HALVES or not DENSE.divides(weight.shape[1]):
            return None
        if model.head_dtype != model.dtype:
            return None  # then vLLM multiplies by itself
        isa = select_backend(DENSE, model.dtype, stored, "cpu").isa
        tiles = isa == "amx-bf16" and model.dtype == stored == torch.bfloat16
        if isa is None or not (tiles or model.dtype == torch.float32):
            return None
        narrow = weight.to(stored)
        # Else a head of more bits than the model's other weights.
        return narrow if torch.equal(narrow.to(weight.dtype), weight) else None

    @staticmethod
    def _has_other_readers(layer: Any) -> bool:
        """Whether the weight is an embedding's as well, or a draft model's head may be compared with it."""
        return getattr(layer, "maskpro_tied", False) or get_current_vllm_config().speculative_config is not None

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        many = x.dtype == torch.float32 and x.numel() > _MOST_FLOAT32_ROWS * x.shape[-1]
        if many or not hasattr(layer, "maskpro_head"):
            return super().apply(layer, x, bias)
        rows, columns = layer.maskpro_head_shape
        return torch.ops.maskpro.nm_linear_interleaved(
            x, layer.maskpro_head, None, bias, rows, columns, DENSE.n, DENSE.m, layer.maskpro_head_dtype,
            layer.maskpro_head_isa,
        )  # fmt: skip
