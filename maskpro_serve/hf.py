"""transformers reads packed checkpoints: importing this module registers the quantization method ``maskpro``.

>>> import maskpro_serve.hf
>>> model = AutoModelForCausalLM.from_pretrained("packed-model")

Packed linears run torch.ops.maskpro on the packed weights: on a CPU in the kernels' own order, elsewhere as stored.
Activations are never rounded here, whatever the checkpoint allows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from maskpro_kernels.model_folder import CheckpointError, TensorInfo, read_headers
from maskpro_kernels.packed_checkpoint import QUANT_METHOD, PackedFormat, checked_names, read_packed
from maskpro_serve.nm_module import NMLinear


@register_quantization_config(QUANT_METHOD)
class MaskProHfConfig(QuantizationConfigMixin):
    """The ``quantization_config`` of a packed checkpoint, kept as it is.

    Raises:
        CheckpointError: it is of another format or version.
    """

    def __init__(self, **entries: Any) -> None:
        entries = {"quant_method": QUANT_METHOD, **entries}
        PackedFormat.from_dict(entries, where="quantization_config")
        self.__dict__.update(entries)

    def packed(self) -> PackedFormat:
        """The same, parsed."""
        return PackedFormat.from_dict(self.to_dict(), where="quantization_config")


@register_quantizer(QUANT_METHOD)
class MaskProHfQuantizer(HfQuantizer):
    """Puts an :class:`NMLinear` in the place of every packed linear before transformers loads the weights."""

    requires_calibration = True  # transformers' word for: only checkpoints that are packed already
    quantization_config: MaskProHfConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError("a packed model is loaded from its folder's files, not from a state dict")
        folder, packed = Path(checkpoint_files[0]).parent, self.quantization_config.packed()
        headers = read_headers(folder)
        for name in checked_names(folder, headers, packed):
            read_packed(headers, name, packed, contents=False)
            path, linear = _linear(model, name, headers[f"{name}.compressed"])
            columns = packed.pattern.kept(linear.in_features) if packed.pattern.divides(linear.in_features) else None
            found = headers[f"{name}.compressed"]
            if found.shape != (linear.out_features, columns):
                raise CheckpointError(
                    f"{found}: expected a {packed.pattern} weight of {linear.out_features} x {linear.in_features} from "
                    f"config.json, found {found.shape}"
                )
            assert found.dtype is not None
            model.set_submodule(path, NMLinear(linear, packed.pattern, found.dtype, name))
        _check_shapes(model, headers)
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():  # transformers casts none whose name it changed
            if parameter.is_floating_point() and parameter.dtype != self._dtypes[name]:
                parameter.data = parameter.data.to(self._dtypes[name])
        for module in model.modules():
            if isinstance(module, NMLinear):
                module.check()
                module.settle()

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _linear(model: PreTrainedModel, name: str, info: TensorInfo) -> tuple[str, nn.Linear]:
    """The linear of a checkpoint name, and its path in the model, which may be the checkpoint's base model alone."""
    for path in (name, name.removeprefix(f"{model.base_model_prefix}.")):
        try:
            module = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(module, nn.Linear):
            return path, module
    raise CheckpointError(f"{info}: the model of config.json has no linear layer {name}")


def _check_shapes(model: PreTrainedModel, headers: dict[str, TensorInfo]) -> None:
    """With a quantizer, transformers takes a tensor of any shape for a parameter."""
    for name, tensor in model.state_dict().items():
        info = headers.get(name) or headers.get(f"{model.base_model_prefix}.{name}")
        if info is not None and info.shape != tuple(tensor.shape):
            raise CheckpointError(f"{info}: expected shape {tuple(tensor.shape)} from config.json, found {info.shape}")
