"""The line that says what is being served, and the same as labels of ``maskpro_model_info``."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import torch

from maskpro_serve import __version__
from maskpro_serve.metrics import ModelInfo, logger
from maskpro_serve.plugin import check_vllm_version


def model_info(vllm_config: Any) -> ModelInfo:
    """What vLLM's configuration says of the model; a model served under its path is called by its folder's name."""
    model, quantization = vllm_config.model_config, vllm_config.quant_config
    served = model.served_model_name
    pattern = getattr(quantization, "pattern", None)
    values = getattr(quantization, "values", None) if pattern is not None else None
    stored = model.hf_config.dtype or model.dtype
    return ModelInfo(
        model=PurePath(served[0] if isinstance(served, list) else served).name,
        pattern="dense" if pattern is None else str(pattern),
        values=values or _name(stored),
        activations=_name(model.dtype),
        maskpro_version=__version__,
        vllm_version=check_vllm_version(),
        torch_version=torch.__version__,
    )


def announce(vllm_config: Any) -> None:
    """Publishes the model's metric and logs one line. The workers have logged layers, backends, bytes and threads."""
    info = model_info(vllm_config)
    info.publish()
    cache = vllm_config.cache_config
    tokens = cache.kv_cache_size_tokens or 0
    logger.info(
        "maskpro: serving %s: %s, %s values, %s activations; KV cache %s tokens%s; at most %d sequences, %d s "
        "to drain; maskpro-serve %s, vLLM %s, torch %s",
        info.model,
        info.pattern,
        info.values,
        info.activations,
        f"{tokens:,}",
        f", {cache.kv_cache_memory_bytes / 1e9:.2f} GB" if cache.kv_cache_memory_bytes else "",
        vllm_config.scheduler_config.max_num_seqs,
        vllm_config.shutdown_timeout,
        info.maskpro_version,
        info.vllm_version,
        info.torch_version,
    )


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
