"""How ``compressed``, ``bitmask`` and ``weight_scale`` shard under tensor parallelism.

The first two are (out_features, something proportional to in_features), so vLLM's own weight parameter shards
them: rows for column-parallel layers, columns for row-parallel ones, each by the parameter's own local
size. What is added here is refusal: ``narrow`` would silently take a part of a tensor that is too large.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.parameter import ModelWeightParameter

from maskpro_serve.checkpoint import CheckpointError


class PackedParameter(ModelWeightParameter):
    """A shard of one part of a packed weight; refuses a checkpoint tensor of another size.

    Attributes:
        tensor_name: the name in error messages, vLLM's layer prefix and the parameter's own.
        loaded_rows: rows of the checkpoint seen so far; 0 where it held none.
    """

    def __init__(self, *, tensor_name: str, **kwargs: Any) -> None:
        self.tensor_name = tensor_name
        self.loaded_rows = 0
        super().__init__(input_dim=1, output_dim=0, **kwargs)

    def _expect(self, loaded_weight: Tensor, rows: int, columns: int) -> None:
        if tuple(loaded_weight.shape) != (rows, columns):
            raise CheckpointError(
                f"{self.tensor_name}: expected shape {(rows, columns)} from the model's config.json, found "
                f"{tuple(loaded_weight.shape)} in the checkpoint"
            )
        widened = torch.promote_types(loaded_weight.dtype, self.data.dtype) == self.data.dtype
        if not widened or loaded_weight.is_floating_point() != self.data.is_floating_point():
            raise CheckpointError(
                f"{self.tensor_name}: expected {self.data.dtype}, the dtype in the model's config.json, found "
                f"{loaded_weight.dtype} in the checkpoint"
            )
        self.loaded_rows += loaded_weight.shape[0]

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        rows, columns = self.data.shape
        self._expect(loaded_weight, rows * self.tp_size, columns)
        super().load_column_parallel_weight(loaded_weight)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        rows, columns = self.data.shape
        self._expect(loaded_weight, rows, columns * self.tp_size)
        super().load_row_parallel_weight(loaded_weight)

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        self._expect(loaded_weight, kwargs["shard_size"] * self.tp_size, self.data.shape[1])
        super().load_merged_column_weight(loaded_weight, **kwargs)

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        # num_heads is vLLM's name for the number of ranks that share one KV head.
        replicas = 1 if kwargs["shard_id"] == "q" else kwargs["num_heads"]
        self._expect(loaded_weight, kwargs["shard_size"] * self.tp_size // replicas, self.data.shape[1])
        super().load_qkv_weight(loaded_weight, **kwargs)


class ScaleParameter(PackedParameter):
    """A shard of ``weight_scale`` (out_features, 1), which every rank of a row-parallel layer holds whole."""

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._expect(loaded_weight, *self.data.shape)
        self.data.copy_(loaded_weight)
