"""A dense model folder to be packed: its config, its tensors, and which of them are the decoder's linears."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maskpro_kernels import NMPattern
from maskpro_kernels.model_folder import CheckpointError, TensorInfo, read_config, read_headers
from maskpro_kernels.packing import WEIGHT_DTYPES
from maskpro_serve.legacy import QUANTIZATION_KEYS, find_quantization, pattern_of_zeros


@dataclass(frozen=True)
class DenseModel:
    """A dense Hugging Face folder with safetensors weights.

    Attributes:
        folder: where it is.
        config: its config.json, without what a legacy sparsity_config adds.
        headers: every tensor.
        linears: names of the weights of the decoder's linears, in the order of the files.
        beyond: matrices, without ``.weight``, that transformers' model does not have, as those of layers for
            multi-token prediction. Experts of a mixture, which are never packed, are left out.
        declared: the pattern that a legacy sparsity_config says the zeros satisfy.
    """

    folder: Path
    config: dict[str, Any]
    headers: dict[str, TensorInfo]
    linears: tuple[str, ...]
    beyond: tuple[str, ...]
    declared: NMPattern | None


def open_dense_model(folder: Path) -> DenseModel:
    """Opens a dense model, reading headers only.

    Raises:
        CheckpointError: the folder is no dense model, or a linear has another dtype than packing knows.
    """
    config = read_config(folder)
    declared = None
    if (found := find_quantization(config)) is not None:
        declared = pattern_of_zeros(found[1], f"{folder / 'config.json'}: {found[0]}")
        config = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
    headers = read_headers(folder)
    for info in headers.values():
        if info.dtype is None:
            raise CheckpointError(f"{info}: a dtype that torch does not have")
    linears, beyond = _linear_weights(folder, headers)
    for name in linears:
        if headers[name].dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"{headers[name]}: expected one of {WEIGHT_DTYPES}, found {headers[name].dtype}")
    return DenseModel(folder, config, headers, linears, beyond, declared)


def _linear_weights(folder: Path, headers: Mapping[str, TensorInfo]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The checkpoint's decoder linears, as the architecture has them (the output head is none); what is beyond it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        # Without a word on trust, transformers asks on the terminal whether to run the folder's own code.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _check_layers(config, folder, len(headers))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a model's constructor makes of a bad configuration
        first = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers cannot build this model: {type(error).__name__}: {first}"
        ) from error
    head = model.get_output_embeddings()
    linears = {
        f"{name}.weight": (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    for name, shape in linears.items():
        if name in headers and headers[name].shape != shape:
            raise CheckpointError(
                f"{headers[name]}: expected shape {shape} from config.json, found {headers[name].shape}"
            )
    found = tuple(name for name in headers if name in linears)
    if linears and not found:
        raise CheckpointError(
            f"{folder}: expected tensors named as transformers does, {next(iter(linears))} and so on, found "
            f"{next(iter(headers), 'none')}"
        )
    modules = {name for name, _ in model.named_modules()}
    matrices = (name.removesuffix(".weight") for name, info in headers.items() if len(info.shape) == 2)
    beyond = (name for name in matrices if f"{name}.weight" in headers and ".experts." not in name)
    return found, tuple(name for name in beyond if name not in modules)


def _check_layers(config: Any, folder: Path, tensors: int) -> None:
    """Refuses a number of layers that the files cannot hold, before a model of as many is built."""
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > tensors:
        raise CheckpointError(
            f"{folder / 'config.json'}: num_hidden_layers: {layers} layers cannot be in the {tensors} tensors there are"
        )
