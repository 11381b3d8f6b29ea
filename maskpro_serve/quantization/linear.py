"""The linear method: packed parameters in, one opaque sparse operator out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)

from maskpro_kernels import NMWeight
from maskpro_kernels.activations import EightBitInputs
from maskpro_kernels.cuda import prepare, remember
from maskpro_kernels.interleaved import interleave
from maskpro_kernels.support import select_backend
from maskpro_serve.checkpoint import CheckpointError
from maskpro_serve.freed_memory import return_freed_memory
from maskpro_serve.quantization.loaded import loaded_dense, loaded_inputs, loaded_packed
from maskpro_serve.quantization.params import register_parameters
from maskpro_serve.scheme import LinearScheme

if TYPE_CHECKING:
    from maskpro_serve.quantization.config import MaskProConfig


@register_weight_loader_v2_supported_method
class NMLinearMethod(LinearMethodBase):
    """Runs one vLLM linear layer (fused ones too) on a packed (N:M) weight.

    Args:
        config: the checkpoint's quantization config.
        prefix: the layer's name in vLLM, for messages.
        scheme: how the layer is stored.
    """

    def __init__(self, config: MaskProConfig, prefix: str, scheme: LinearScheme) -> None:
        self.config = config
        self.prefix = prefix
        self.scheme = scheme
        self.dense = UnquantizedLinearMethod()

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
            raise CheckpointError(
                f"{self.prefix}: in_features {input_size} cannot be cut into {input_size // input_size_per_partition} "
                f"shards of {input_size_per_partition}: a shard must hold whole {pattern} groups and whole bytes of "
                "bitmask; use a smaller --tensor-parallel-size"
            )
        register_parameters(
            layer,
            self.scheme,
            pattern,
            input_size_per_partition,
            output_partition_sizes,
            self.scheme.values or self.config.stored or params_dtype,
            extra_weight_attrs["weight_loader"],
            self.prefix,
        )
        layer.maskpro_in_features = input_size_per_partition
        layer.maskpro_partitions = list(output_partition_sizes)
        self.config.tally.created()

    def process_weights_after_loading(self, layer: Any) -> None:
        if hasattr(layer, "maskpro_pattern"):  # vLLM may call this twice
            return
        dummy = get_current_vllm_config().load_config.load_format == "dummy"
        inputs = loaded_inputs(layer, self.scheme, self.prefix, dummy=dummy)
        if self.scheme.compressed:
            weight: NMWeight | None = loaded_packed(layer, self.config.pattern, self.prefix, dummy=dummy)
        else:
            weight = loaded_dense(layer, self.config.pattern, self.prefix, dummy=dummy)
        if weight is None:
            self._stay_dense(layer)
        else:
            self._keep(layer, weight, inputs)
        if self.config.tally.complete:
            return_freed_memory()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        pattern = layer.maskpro_pattern
        if pattern is None:
            return self.dense.apply(layer, x, bias)
        scale = getattr(layer, "weight_scale", None)
        if not hasattr(layer, "bitmask"):
            return torch.ops.maskpro.nm_linear_interleaved(
                x, layer.weight_packed, scale, bias, *layer.maskpro_shape, pattern.n, pattern.m, layer.maskpro_dtype,
                layer.maskpro_isa, getattr(layer, "maskpro_x_scale", None),
            )  # fmt: skip
        return torch.ops.maskpro.nm_linear(x, layer.weight_packed, layer.bitmask, scale, bias, pattern.n, pattern.m)

    def _keep(self, layer: Any, weight: NMWeight, inputs: EightBitInputs | None) -> None:
        """Puts a layer's weight in the order that its backend reads."""
        activation_dtype = get_current_vllm_config().model_config.dtype
        dtype, device = weight.values.dtype, weight.values.device.type
        backend = select_backend(weight.pattern, activation_dtype, dtype, device, may_round=inputs is not None)
        layer.maskpro_pattern, layer.maskpro_shape, layer.maskpro_dtype = (
            weight.pattern, weight.shape, dtype,
        )  # fmt: skip
        nbytes, names = weight.nbytes, backend.name
        # vLLM's LoRA layers look for a weight of this name, to place theirs beside it.
        if weight.values.is_cuda and backend.name != "reference":
            most_tokens = get_current_vllm_config().scheduler_config.max_num_batched_tokens
            prepared = prepare(weight, activation_dtype, most_tokens, inputs)
            nbytes, names = prepared.nbytes, "+".join(prepared.backends)
            layer.weight_packed = Parameter(prepared.weight.values, requires_grad=False)
            layer.bitmask = Parameter(prepared.weight.bitmask, requires_grad=False)
            remember(layer.weight_packed, layer.bitmask, prepared.metadata)
        elif backend.isa is None:
            layer.weight_packed = Parameter(weight.values, requires_grad=False)
            layer.bitmask = Parameter(weight.bitmask, requires_grad=False)
        else:  # the CPU's own order replaces the stored one, layer by layer: never both of the whole model
            order = interleave(weight, inputs)
            nbytes, names = order.nbytes, order.backend
            layer.weight_packed = Parameter(order.data, requires_grad=False)
            layer.maskpro_isa = order.isa
            if order.x_scale is not None:
                layer.maskpro_x_scale = Parameter(order.x_scale, requires_grad=False)
        if weight.scale is not None:
            layer.weight_scale = Parameter(weight.scale.contiguous(), requires_grad=False)
        if weight.pattern == self.config.pattern:
            self.config.tally.loaded(nbytes, weight.dense_nbytes, len(layer.maskpro_partitions), names)
        else:
            self.config.tally.stayed_dense(len(layer.maskpro_partitions))

    def _stay_dense(self, layer: Any) -> None:
        """What vLLM itself does with a dense layer."""
        layer.maskpro_pattern = None
        layer.weight = Parameter(layer.weight.data.to(layer.params_dtype), requires_grad=False)
        self.dense.process_weights_after_loading(layer)
        self.config.tally.stayed_dense(len(layer.maskpro_partitions))
