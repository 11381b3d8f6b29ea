"""Which linears a server can compute packed: vLLM keeps some dense, and makes one of others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ROUTERS = ("gate", "router")
"""What a mixture's router is called, or the module that it is in: vLLM computes it with a dense weight."""
_UNQUANTIZED = dict.fromkeys(("mamba", "falcon_mamba", "jamba"), ("in_proj", "x_proj", "dt_proj", "out_proj"))
"""What vLLM gives to no quantization method, by model type."""
_REORDERED = {"bloom": ("query_key_value",)} | dict.fromkeys(("llama4", "llama4_text"), ("q_proj", "k_proj"))
"""Whose rows vLLM puts into another order while it loads them, by model type: dense ones, and no others."""
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)


def text_model_type(config: Mapping[str, Any]) -> str:
    """The ``model_type`` of a config.json's decoder, which a model of text and images has within its own."""
    text = config.get("text_config")
    return str((text if isinstance(text, Mapping) else config).get("model_type", ""))


def is_router(name: str) -> bool:
    """Whether a module is a mixture's router, or part of one."""
    return any(part in _ROUTERS for part in name.split("."))


def is_reordered(name: str, model_type: str) -> bool:
    """Whether vLLM puts the rows of a model's linear into another order while it loads a dense weight."""
    return name.rpartition(".")[2] in _REORDERED.get(model_type, ())


def why_dense(name: str, out_features: int, model_type: str = "") -> str | None:
    """Why a linear is packed under no mask; None if it may be.

    A gate of one output scales a whole layer, as Qwen2-MoE's ``shared_expert_gate`` does its shared expert.

    Args:
        name: of the module.
        out_features: its outputs.
        model_type: :func:`text_model_type` of its model.
    """
    if out_features == 1:
        return "a gate of one output, which vLLM keeps dense"
    if is_router(name):
        return "a router, which vLLM keeps dense"
    if name.rpartition(".")[2] in _UNQUANTIZED.get(model_type, ()):
        return "part of a Mamba mixer, which vLLM keeps dense"
    if is_reordered(name, model_type):
        return "vLLM reorders its rows when it loads them dense"
    return None


def fused_with(name: str) -> list[str]:
    """The modules that vLLM makes one of with this one, where a model has them: packed or dense as a whole."""
    parent, dot, own = name.rpartition(".")
    group = next((group for group in _FUSED if own in group), ())
    return [f"{parent}{dot}{other}" for other in group if other != own]
