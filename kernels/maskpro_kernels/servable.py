"""Which linears a server can compute packed: vLLM keeps some dense, and makes one of others."""

from __future__ import annotations

ROUTERS = ("gate", "router")
"""What a mixture's router is called: vLLM computes it with a dense weight."""
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
)


def why_dense(name: str, out_features: int) -> str | None:
    """Why a linear is packed under no mask; None if it may be.

    A gate of one output scales a whole layer, as Qwen2-MoE's ``shared_expert_gate`` does its shared expert.

    Args:
        name: of the module.
        out_features: its outputs.
    """
    if out_features == 1:
        return "a gate of one output, which vLLM keeps dense"
    if name.rpartition(".")[2] in ROUTERS:
        return "a router, which vLLM keeps dense"
    return None


def fused_with(name: str) -> list[str]:
    """The modules that vLLM makes one of with this one, where a model has them: packed or dense as a whole."""
    parent, dot, own = name.rpartition(".")
    group = next((group for group in _FUSED if own in group), ())
    return [f"{parent}{dot}{other}" for other in group if other != own]
