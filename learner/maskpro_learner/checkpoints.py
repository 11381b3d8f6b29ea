"""Opens Hugging Face model folders, with an error a user can act on, and says which weights they hold."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from maskpro_kernels.base_model import is_hub_id, model_folder
from maskpro_kernels.model_folder import INDEX, read_headers
from maskpro_kernels.packed_checkpoint import QUANT_METHOD
from maskpro_learner.errors import ModelError


def check_model(name: str) -> None:
    """Checks that ``name`` is a model folder, or at least looks like a hub id.

    Raises:
        ModelError: it is neither, or the folder has no config.json.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name}: expected a Hugging Face model folder, found no config.json in it")
    elif folder.exists():
        raise ModelError(f"{name}: expected a model folder, found a file")
    elif not is_hub_id(name):
        raise ModelError(f"{name}: no such model folder")


def check_names(name: str, weights: Iterable[str]) -> None:
    """Checks that a model's files name the weights to be pruned as transformers does, which may rename what it loads.

    A mask has transformers' names; :mod:`maskpro_serve.convert` reads the files.

    Raises:
        ModelError: they do not, or cannot be read.
    """
    folder = model_folder(name)
    if not any((folder / file).is_file() for file in (INDEX, "model.safetensors")):
        return  # transformers reads other formats, too
    headers = read_headers(folder)
    if missing := next((weight for weight in weights if weight not in headers), None):
        raise ModelError(
            f"{name}: expected tensors named as transformers does, {missing} and so on, found "
            f"{next(iter(headers), 'none')}: maskpro-pack could not pack it"
        )


def load_model(name: str, dtype: torch.dtype, device: str = "cpu") -> PreTrainedModel:
    """Loads a causal language model for inference.

    Args:
        name: a folder, or a hub id.
        dtype: dtype of the weights and activations. On a CPU without bf16 instructions float32 is the fastest.
        device: where to put it.

    Raises:
        ModelError: the folder is missing, cannot be read, or lacks weights of the model.
    """
    check_model(name)
    loaded: Any  # transformers' types leave out output_loading_info
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
        found = config.get("quantization_config")
        if isinstance(found, dict) and found.get("quant_method") == QUANT_METHOD:
            raise ModelError(f"{name}: expected a dense model, found one that maskpro-pack has packed")
        loaded = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"{name}: not a readable causal language model: {_first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):  # transformers would go on with random numbers in their place
        raise ModelError(
            f"{name}: expected every weight of a dense model, found no {missing[0]} ({len(missing)} missing)"
        )
    model.train(False).requires_grad_(False)
    moved: PreTrainedModel = model.to(device)  # type: ignore[arg-type]
    return moved


def cast_weights(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Casts a model's floating-point weights in place, and returns it.

    ``model.to(dtype)`` casts its buffers too: rotary frequencies, which transformers keeps in float32 whatever a model
    is loaded in, would be rounded, and so would positions.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model.

    Raises:
        ModelError: the folder is missing, or holds no tokenizer.
    """
    check_model(name)
    folder = Path(name)
    files = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    if folder.is_dir() and not any((folder / file).is_file() for file in files):
        raise ModelError(f"{name}: expected a tokenizer, found none of {', '.join(files)}")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a broken tokenizer.json raises a bare Exception
        raise ModelError(f"{name}: not a readable tokenizer: {_first_line(error)}") from error
    return tokenizer


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
