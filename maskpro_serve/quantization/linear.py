"""The linear method: packed parameters in, one opaque sparse operator out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method
from vllm.model_executor.parameter import BasevLLMParameter

from maskpro_kernels import NMWeight
from maskpro_kernels.bits import bitmask_width, pack_bits
from maskpro_kernels.cuda import prepare, remember
from maskpro_kernels.interleaved import interleave
from maskpro_kernels.packing import WEIGHT_DTYPES, check_bitmask
from maskpro_kernels.support import select_backend
from maskpro_serve.checkpoint import CheckpointError
from maskpro_serve.quantization.params import PackedParameter, ScaleParameter

if TYPE_CHECKING:
    from maskpro_serve.quantization.config import MaskProConfig


@register_weight_loader_v2_supported_method
class NMLinearMethod(LinearMethodBase):
    """Runs one vLLM linear layer (fused ones too) on a packed (N:M) weight.

    Args:
        config: the checkpoint's quantization config.
        prefix: the layer's name in vLLM, for messages.
    """

    def __init__(self, config: MaskProConfig, prefix: str) -> None:
        self.config = config
        self.prefix = prefix

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        pattern = self.config.pattern
        sharded = input_size_per_partition != input_size
        if input_size_per_partition % pattern.m or (sharded and input_size_per_partition % 8):
            raise ValueError(
                f"{self.prefix}: in_features {input_size} cannot be cut into {input_size // input_size_per_partition} "
                f"shards of {input_size_per_partition}: a shard must hold whole {pattern} groups and whole bytes of "
                "bitmask; use a smaller --tensor-parallel-size"
            )
        load_config = get_current_vllm_config().load_config
        weight_loader = extra_weight_attrs["weight_loader"]
        rows = sum(output_partition_sizes)
        values = torch.empty((rows, pattern.kept(input_size_per_partition)), dtype=self._weight_dtype(params_dtype))
        bitmask = torch.zeros((rows, bitmask_width(input_size_per_partition)), dtype=torch.uint8)
        if load_config.load_format == "dummy":
            # vLLM fills floating-point parameters only; the bitmask must be valid by itself.
            first = torch.arange(input_size_per_partition).remainder(pattern.m) < pattern.n
            bitmask[:] = pack_bits(first.unsqueeze(0))
            if values.dtype == torch.int8:
                values.random_(-127, 128)
        for name, data in (("compressed", values), ("bitmask", bitmask)):
            parameter = PackedParameter(data=data, weight_loader=weight_loader, tensor_name=f"{self.prefix}.{name}")
            layer.register_parameter(name, parameter)
        if values.dtype == torch.int8:
            name, scale = f"{self.prefix}.weight_scale", torch.zeros((rows, 1), dtype=torch.float32)
            parameter = ScaleParameter(data=scale, weight_loader=weight_loader, tensor_name=name)
            layer.register_parameter("weight_scale", parameter)
        # Read because the checkpoint holds it, dropped after loading; the sizes are checked on the tensors.
        shape = BasevLLMParameter(data=torch.zeros((2, 1), dtype=torch.int64), weight_loader=weight_loader)
        layer.register_parameter("shape", shape)
        layer.maskpro_in_features = input_size_per_partition
        layer.maskpro_partitions = len(output_partition_sizes)
        self.config.tally.created()

    def process_weights_after_loading(self, layer: Any) -> None:
        if not hasattr(layer, "shape"):  # vLLM may call this twice
            return
        if get_current_vllm_config().load_config.load_format != "dummy":
            for parameter in (layer.compressed, layer.bitmask, getattr(layer, "weight_scale", None)):
                if parameter is not None and not parameter.loaded_rows:
                    raise CheckpointError(f"{parameter.tensor_name}: missing in the checkpoint")
        weight = self._loaded(layer)
        del layer.shape
        activation_dtype = get_current_vllm_config().model_config.dtype
        backend = select_backend(weight.pattern, activation_dtype, weight.values.dtype, weight.values.device.type)
        nbytes = weight.nbytes
        layer.maskpro_shape, layer.maskpro_dtype = weight.shape, weight.values.dtype
        if weight.scale is not None:
            layer.weight_scale = Parameter(weight.scale, requires_grad=False)
        names = backend.name
        if weight.values.is_cuda and backend.name != "reference":
            most_tokens = get_current_vllm_config().scheduler_config.max_num_batched_tokens
            prepared = prepare(weight, activation_dtype, most_tokens)
            nbytes, names = prepared.nbytes, "+".join(prepared.backends)
            layer.compressed = Parameter(prepared.weight.values, requires_grad=False)
            layer.bitmask = Parameter(prepared.weight.bitmask, requires_grad=False)
            remember(layer.compressed, layer.bitmask, prepared.metadata)
        elif backend.isa is None:
            layer.compressed = Parameter(weight.values, requires_grad=False)
            layer.bitmask = Parameter(weight.bitmask, requires_grad=False)
        else:  # the CPU's own order replaces the stored one, layer by layer: never both of the whole model
            order = interleave(weight)
            nbytes = order.nbytes
            layer.interleaved = Parameter(order.data, requires_grad=False)
            del layer.compressed, layer.bitmask
        self.config.tally.loaded(nbytes, weight.dense_nbytes, layer.maskpro_partitions, names)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        pattern = self.config.pattern
        scale = layer.weight_scale if layer.maskpro_dtype == torch.int8 else None
        if hasattr(layer, "interleaved"):
            return torch.ops.maskpro.nm_linear_interleaved(
                x, layer.interleaved, scale, bias, *layer.maskpro_shape, pattern.n, pattern.m, layer.maskpro_dtype
            )
        return torch.ops.maskpro.nm_linear(x, layer.compressed, layer.bitmask, scale, bias, pattern.n, pattern.m)

    def _loaded(self, layer: Any) -> NMWeight:
        """The layer's weight as it was loaded, checked."""
        scale = None
        if layer.compressed.dtype == torch.int8:
            scale = layer.weight_scale.data.flatten()
            if not torch.isfinite(scale).all():
                raise CheckpointError(f"{self.prefix}.weight_scale: expected finite scales, found inf or NaN")
        shape = (layer.compressed.shape[0], layer.maskpro_in_features)
        weight = NMWeight(layer.compressed.data, layer.bitmask.data, shape, self.config.pattern, scale)
        try:
            check_bitmask(weight)
        except ValueError as error:
            raise CheckpointError(f"{self.prefix}.bitmask: {error}") from error
        return weight

    def _weight_dtype(self, params_dtype: torch.dtype) -> torch.dtype:
        """The checkpoint's own dtype: `--dtype float32` widens activations, never the stored weights."""
        if self.config.values == "int8":
            return torch.int8
        stored = get_current_vllm_config().model_config.hf_config.dtype
        return stored if stored in WEIGHT_DTYPES else params_dtype
