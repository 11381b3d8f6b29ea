"""The output head: read in the checkpoint's dtype, whatever the activations' is, by the kernels of the packed weights.

With float32 activations vLLM widens every dense weight, and a small model then reads about as many bytes for its output
head as for all its packed linears together. With bfloat16 ones on AMX the bytes are the same, but oneDNN takes longer
(docs/results/output_head_amx_bf16.json). A checkpoint may allow to round the head to 8 bits: a token then reads half.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from maskpro_kernels.int8 import rows_to_int8
from maskpro_kernels.interleaved import DENSE, InterleavedWeight, interleave_dense
from maskpro_kernels.support import select_backend
from maskpro_serve.freed_memory import return_freed_memory

logger = logging.getLogger("vllm.maskpro")

_HALVES = (torch.bfloat16, torch.float16)
_MOST_FLOAT32_ROWS = 32
"""Beyond these many rows torch's float32 product is faster: arithmetic bounds it, not the bytes of the weight."""


class HeadMethod(UnquantizedEmbeddingMethod):
    """An output head on the CPU: of 16-bit weights under float32 activations, up to 32 rows, bfloat16 on AMX, int8.

    Anything else is vLLM's own. Under float32 the copy costs 2 bytes a weight of memory: vLLM's own stays for many rows
    at once. On AMX it takes the place of oneDNN's, and of the weight where nobody else reads that; so does int8, lest
    an answer have another weight among many rows than among few.

    Args:
        stored: dtype of the checkpoint's weights, if it is known.
        may_round: whether the weight may be rounded to 8 bits.
    """

    supports_pre_processed_weights = False  # they are interleaved here, for this CPU

    def __init__(self, stored: torch.dtype | None, *, may_round: bool) -> None:
        super().__init__()
        self._stored = stored
        self._may_round = may_round

    def tie_weights(self, layer: Any, embed_tokens: VocabParallelEmbedding) -> Any:
        layer.maskpro_tied = True
        return super().tie_weights(layer, embed_tokens)

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, "maskpro_head"):
            return  # vLLM may call this twice
        head = self._interleaved(layer.weight.data)
        if self._may_round and head is not None and head.dtype == torch.int8:
            logger.info("maskpro: the output head is rounded to 8 bits, as this checkpoint allows")
        elif self._may_round:
            logger.info("maskpro: the output head stays as it is: it cannot be rounded to 8 bits here")
        if head is None:
            super().process_weights_after_loading(layer)
            return
        layer.maskpro_head = Parameter(head.data, requires_grad=False)
        layer.maskpro_head_scale = None if head.scale is None else Parameter(head.scale, requires_grad=False)
        layer.maskpro_head_shape = head.shape
        layer.maskpro_head_dtype = head.dtype
        layer.maskpro_head_isa = head.isa
        if head.dtype != torch.int8 and layer.weight.dtype == torch.float32:
            super().process_weights_after_loading(layer)
        elif not self._has_other_readers(layer):
            layer.weight = Parameter(layer.weight.new_empty(0), requires_grad=False)
            return_freed_memory()

    def _interleaved(self, weight: Tensor) -> InterleavedWeight | None:
        """The weight as our kernels read it, or None where vLLM's method is to multiply."""
        model = get_current_vllm_config().model_config
        if weight.device.type != "cpu" or not DENSE.divides(weight.shape[1]) or model.head_dtype != model.dtype:
            return None  # of another dtype vLLM multiplies by itself
        if self._may_round and select_backend(DENSE, model.dtype, torch.int8, "cpu").isa is not None:
            with suppress(ValueError):  # not finite: one that was not loaded, for a draft model shares another's later
                return interleave_dense(*rows_to_int8(weight))
        narrow = self._narrowed(weight, model.dtype)
        return None if narrow is None else interleave_dense(narrow)

    def _narrowed(self, weight: Tensor, activations: torch.dtype) -> Tensor | None:
        """The weight in the checkpoint's dtype, or None where vLLM's method is as fast, or is the only one."""
        stored = self._stored
        if stored not in _HALVES:
            return None
        isa = select_backend(DENSE, activations, stored, "cpu").isa
        tiles = isa == "amx-bf16" and activations == stored == torch.bfloat16
        if isa is None or not (tiles or activations == torch.float32):
            return None
        narrow = weight.to(stored)
        # Else a head of more bits than the model's other weights.
        return narrow if torch.equal(narrow.to(weight.dtype), weight) else None

    @staticmethod
    def _has_other_readers(layer: Any) -> bool:
        """Whether the weight is an embedding's as well, or a draft model's head may be compared with it."""
        return getattr(layer, "maskpro_tied", False) or get_current_vllm_config().speculative_config is not None

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if not hasattr(layer, "maskpro_head"):
            return super().apply(layer, x, bias)
        dtype = layer.maskpro_head_dtype
        if dtype != torch.int8 and x.dtype == torch.float32 and x.numel() > _MOST_FLOAT32_ROWS * x.shape[-1]:
            return super().apply(layer, x, bias)
        rows, columns = layer.maskpro_head_shape
        return torch.ops.maskpro.nm_linear_interleaved(
            x, layer.maskpro_head, layer.maskpro_head_scale, bias, rows, columns, DENSE.n, DENSE.m, dtype,
            layer.maskpro_head_isa,
        )  # fmt: skip
