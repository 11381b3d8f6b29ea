"""Model families: packed in vLLM says what the same weights, dense with zeros, say in vLLM."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from processes import serve_greedily
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GemmaConfig,
    Llama4TextConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from maskpro_kernels import NMPattern
from maskpro_kernels.packing import magnitude_mask
from maskpro_serve import convert
from maskpro_serve.plugin import check_vllm_version

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PATTERN = NMPattern(2, 4)
SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 128, "initializer_range": 0.2,
    "dtype": torch.bfloat16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SHARED_EXPERT = {"shared_expert_intermediate_size": 64}
WHOLE_PHI = {"intermediate_size": 4 * 64, "num_key_value_heads": 2}  # vLLM 0.27's own knows no other
NO_EXPERTS = {"intermediate_size_mlp": 96, "interleave_moe_layer_step": 4}
MIXING_BLOOM = {"n_layer": 2, "n_head": 2, "initializer_range": 1.0}  # its embeddings are tied and normalized
NARROW_EMBEDDINGS = {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False}

WITHOUT_FLOAT32_EXPERTS = (
    Version(check_vllm_version()) < Version("0.32") and "amx_tile" in Path("/proc/cpuinfo").read_text()
)
"""vLLM 0.27's kernels of experts for AMX know bfloat16 only, and it takes no others there."""

FAMILIES = {
    "qwen2": (Qwen2Config, {}),  # biases of q, k and v
    "qwen3": (Qwen3Config, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "gemma": (GemmaConfig, {}),
    "gemma2": (Gemma2Config, {"query_pre_attn_scalar": 32}),
    "phi3": (Phi3Config, {}),  # qkv_proj and gate_up_proj are fused in the checkpoint
    "phi": (PhiConfig, WHOLE_PHI),  # newer vLLMs run transformers' own, and tell it another dtype
    "opt": (OPTConfig, NARROW_EMBEDDINGS),  # project_in and project_out are vLLM's replicated layers
    "qwen2-moe": (Qwen2MoeConfig, EXPERTS | SHARED_EXPERT),  # the shared expert is packed, its gate is not
    "qwen3-moe": (Qwen3MoeConfig, EXPERTS),  # experts stay dense
    "llama4": (Llama4TextConfig, NO_EXPERTS),  # vLLM reorders the rows of q and k, which stay dense, and v with them
    "bloom": (BloomConfig, MIXING_BLOOM),  # and here those of query_key_value
}
UNCLAIMED_HEADS = ("gemma2", "opt")
"""Those whose output head vLLM gives to no quantization method: it is not rounded even where it may be."""
LINEARS = dict.fromkeys(FAMILIES, 14) | {"phi3": 8, "phi": 12, "qwen3-moe": 8, "llama4": 8, "bloom": 6}
SERVED = [name for name in FAMILIES if not (WITHOUT_FLOAT32_EXPERTS and name.endswith("-moe"))]


def build(root: Path, name: str) -> tuple[Path, Path, int]:
    """A random model pruned 2:4 and the same packed; and how many linears were."""
    kind, more = FAMILIES[name]
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(kind(**SIZES | more)).bfloat16()
    if name.startswith("gemma"):  # tied and scaled up, random embeddings would answer every token with itself
        model.get_input_embeddings().weight.data *= 0.05
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            module.weight.data *= magnitude_mask(module.weight.detach(), PATTERN)
    pruned, packed = root / f"{name}-pruned", root / f"{name}-packed"
    model.save_pretrained(pruned)
    head = "int8" if name in UNCLAIMED_HEADS else None
    return pruned, packed, len(convert(pruned, packed, pattern=PATTERN, head=head).packed)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> tuple[dict[str, list[list[list[int]]]], dict[str, int], str]:
    """Tokens of every family, pruned and packed, from one process; how many linears are packed; and the log."""
    root = tmp_path_factory.mktemp("families")
    built = {name: build(root, name) for name in SERVED}
    folders = [folder for pruned, packed, _ in built.values() for folder in (pruned, packed)]
    documents, log = serve_greedily(folders, root)
    tokens = [document["tokens"] for document in documents]
    pairs = {name: tokens[2 * i : 2 * i + 2] for i, name in enumerate(SERVED)}
    return pairs, {name: count for name, (_, _, count) in built.items()}, log


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_equals_dense(served, name):
    if name not in SERVED:
        pytest.skip("this vLLM refuses float32 experts on this processor")
    pruned, packed = served[0][name]
    assert packed == pruned
    assert len({token for row in packed for token in row}) > 5


def test_every_linear_is_packed_and_experts_are_reported(served):
    _, counts, log = served
    assert counts == {name: LINEARS[name] for name in SERVED}
    assert ("maskpro: the experts of 2 layers stay dense" in log) == ("qwen3-moe" in SERVED)


def test_a_head_that_nobody_can_round_stays_and_the_log_says_so(served):
    _, _, log = served
    assert log.count("stays as it is: vLLM gives this model's to no quantization method") == len(UNCLAIMED_HEADS)
    assert "the output head is rounded" not in log


def test_weights_are_kept_as_they_are_stored(served):
    """In bfloat16 where activations are float32, whatever vLLM makes of config.json meanwhile; none is padded here."""
    _, _, log = served
    shares = re.findall(r"([\d.]+) of their dense bytes", log)
    assert len(shares) == len(SERVED)
    assert set(shares) == {"0.5625"}
