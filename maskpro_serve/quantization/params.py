"""A packed linear's parameters, and how they shard under tensor parallelism.

``compressed``, ``bitmask`` and a dense ``weight`` are (out_features, something proportional to in_features), so vLLM's
own weight parameter shards them: rows for column-parallel layers, columns for row-parallel ones, each by the
parameter's own local size. What is added here is refusal: ``narrow`` would silently take a part of a tensor that is
too large.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.parameter import BasevLLMParameter, ModelWeightParameter, PerTensorScaleParameter

from maskpro_kernels import NMPattern
from maskpro_kernels.bits import bitmask_width, pack_bits
from maskpro_serve.checkpoint import CheckpointError
from maskpro_serve.scheme import LinearScheme


class PackedParameter(ModelWeightParameter):
    """A shard of one part of a packed weight; refuses a checkpoint tensor of another size.

    Attributes:
        tensor_name: the name in error messages, vLLM's layer prefix and the parameter's own.
        loaded_rows: of this shard, rows that the checkpoint has given; what comes twice counts once.
    """

    def __init__(self, *, tensor_name: str, **kwargs: Any) -> None:
        self.tensor_name = tensor_name
        self._loaded: dict[int, int] = {}  # rows by the first one
        super().__init__(input_dim=1, output_dim=0, **kwargs)

    @property
    def loaded_rows(self) -> int:
        return sum(self._loaded.values())

    @property
    def complete(self) -> bool:
        """Whether the checkpoint held all of it, every matrix that is fused in it."""
        return self.loaded_rows >= self.data.shape[0]

    def _expect(self, loaded_weight: Tensor, rows: int, columns: int, taken: int, first: int = 0) -> None:
        """Refuses a tensor of another size or dtype. This shard takes ``taken`` rows, from its ``first`` on."""
        if tuple(loaded_weight.shape) != (rows, columns):
            raise CheckpointError(
                f"{self.tensor_name}: expected shape {(rows, columns)} from the model's config.json, found "
                f"{tuple(loaded_weight.shape)} in the checkpoint"
            )
        if not _widens(loaded_weight.dtype, self.data.dtype):
            raise CheckpointError(
                f"{self.tensor_name}: expected {self.data.dtype}, as the checkpoint's other weights, found "
                f"{loaded_weight.dtype}"
            )
        self._loaded[first] = taken

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        rows, columns = self.data.shape
        self._expect(loaded_weight, rows * self.tp_size, columns, rows)
        super().load_column_parallel_weight(loaded_weight)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        rows, columns = self.data.shape
        self._expect(loaded_weight, rows, columns * self.tp_size, rows)
        super().load_row_parallel_weight(loaded_weight)

    def load_replicated_weight(self, loaded_weight: Tensor) -> None:
        """Loads all of it, as every rank does."""
        rows, columns = self.data.shape
        self._expect(loaded_weight, rows, columns, rows)
        self.data.copy_(loaded_weight)

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        size = kwargs["shard_size"]
        self._expect(loaded_weight, size * self.tp_size, self.data.shape[1], size, kwargs["shard_offset"])
        super().load_merged_column_weight(loaded_weight, **kwargs)

    def load_qkv_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        # num_heads is vLLM's name for the number of ranks that share one KV head.
        replicas = 1 if kwargs["shard_id"] == "q" else kwargs["num_heads"]
        size = kwargs["shard_size"]
        self._expect(loaded_weight, size * self.tp_size // replicas, self.data.shape[1], size, kwargs["shard_offset"])
        super().load_qkv_weight(loaded_weight, **kwargs)


class ScaleParameter(PackedParameter):
    """A shard of ``weight_scale`` (out_features, 1), which every rank of a row-parallel layer holds whole."""

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        self.load_replicated_weight(loaded_weight)


class NumberParameter(PerTensorScaleParameter):
    """One float32 number for each matrix of a layer, which every rank holds whole; NaN until it is loaded."""

    @property
    def complete(self) -> bool:
        """Whether the checkpoint held all of them; a NaN in it counts as none."""
        return not bool(torch.isnan(self.data).any())


def register_parameters(
    layer: Any,
    scheme: LinearScheme,
    pattern: NMPattern,
    in_features: int,
    partitions: list[int],
    dtype: torch.dtype,
    weight_loader: Any,
    prefix: str,
) -> None:
    """Registers what a layer of this scheme has in the checkpoint.

    Args:
        layer: the vLLM layer.
        scheme: how it is stored.
        pattern: of the packed weight.
        in_features: columns of this shard.
        partitions: rows of this shard, of every matrix that is fused in it.
        dtype: of the stored values.
        weight_loader: the layer's own.
        prefix: its name, for messages.
    """
    rows = sum(partitions)
    tensors = {"weight": torch.empty((rows, in_features), dtype=dtype)}
    if scheme.compressed:
        bitmask = torch.zeros((rows, bitmask_width(in_features)), dtype=torch.uint8)
        tensors = {"compressed": torch.empty((rows, pattern.kept(in_features)), dtype=dtype), "bitmask": bitmask}
        # Read because the checkpoint holds it, dropped after loading; the sizes are checked on the tensors. vLLM's own
        # class and no other is loaded whole where the matrices are fused on disk.
        shape = BasevLLMParameter(data=torch.zeros((2, 1), dtype=torch.int64), weight_loader=weight_loader)
        layer.register_parameter("shape", shape)
    if get_current_vllm_config().load_config.load_format == "dummy":
        _fill(tensors, pattern, in_features)
    # A replicated layer's own loader copies into a parameter, which does not see it.
    load_rows = _load_replicated if isinstance(layer, ReplicatedLinear) else weight_loader
    for name, data in tensors.items():
        parameter = PackedParameter(data=data, weight_loader=load_rows, tensor_name=f"{prefix}.{name}")
        layer.register_parameter(name, parameter)
    if scheme.scale == "channel":
        scale = torch.zeros((rows, 1), dtype=torch.float32)
        name = f"{prefix}.weight_scale"
        parameter = ScaleParameter(data=scale, weight_loader=load_rows, tensor_name=name)
        layer.register_parameter("weight_scale", parameter)
    numbers = {"weight_scale": scheme.scale == "tensor", "input_scale": scheme.input_scale}
    for name, there in (numbers | {"input_zero_point": scheme.input_zero_point}).items():
        if there:
            data = torch.full((len(partitions),), torch.nan)
            layer.register_parameter(name, NumberParameter(data=data, weight_loader=weight_loader))


def _load_replicated(parameter: PackedParameter, loaded_weight: Tensor) -> None:
    parameter.load_replicated_weight(loaded_weight)


def _fill(tensors: dict[str, Tensor], pattern: NMPattern, in_features: int) -> None:
    """What vLLM's dummy loader does not: it fills floating-point parameters only."""
    first = torch.arange(in_features).remainder(pattern.m) < pattern.n
    if "bitmask" in tensors:
        tensors["bitmask"][:] = pack_bits(first.unsqueeze(0))
    for tensor in tensors.values():
        if tensor.dtype == torch.int8:
            tensor.random_(-127, 128)


def _widens(stored: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether every value of the stored dtype is one of the other, and of its kind."""
    if stored == dtype:
        return True
    if min(stored.itemsize, dtype.itemsize) == 1 or stored.is_floating_point != dtype.is_floating_point:
        return False
    return torch.promote_types(stored, dtype) == dtype
