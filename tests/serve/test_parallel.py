"""Tensor parallelism says what one process says; adapters work on packed layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import serve_greedily
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from maskpro_serve import CheckpointError
from maskpro_serve.checkpoint import PackedFormat
from maskpro_serve.scheme import LinearScheme

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

LEGACY = Path(__file__).parent.parent / "fixtures" / "legacy"
RANK, SCALING = 4, 2.0


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory) -> list[list[list[int]]]:
    """Tokens of the tiny int8 model, and of a legacy one with one scale a tensor, in one process."""
    return tokens_of(tiny, tmp_path_factory.mktemp("alone"))


def tokens_of(tiny: dict[str, Path], scratch: Path, **llm: object) -> list[list[list[int]]]:
    folders = [tiny["int8"], LEGACY / "bitmask-int8-tensor-static"]
    return [document["tokens"] for document in serve_greedily(folders, scratch, **llm)[0]]


def test_two_processes_equal_one(tiny, alone, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert tokens_of(tiny, tmp_path, tensor_parallel_size=2) == alone


@pytest.mark.parametrize(("in_features", "shards"), [(72, 2), (24, 12)])
def test_a_shard_that_cuts_a_group_or_a_byte_is_refused(in_features, shards):
    from maskpro_kernels import NMPattern
    from maskpro_serve.quantization.config import MaskProConfig
    from maskpro_serve.quantization.linear import NMLinearMethod

    config = MaskProConfig(PackedFormat(NMPattern(2, 4)))
    method = NMLinearMethod(config, "model.layers.0.mlp.down_proj", LinearScheme(True))
    message = rf"down_proj: in_features {in_features} cannot be cut into {shards} shards of "
    with pytest.raises(CheckpointError, match=message):
        method.create_weights(
            torch.nn.Module(), in_features // shards, [16], in_features, 16, torch.bfloat16, weight_loader=None
        )


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A LoRA of every decoder linear, as peft writes it; and what it adds to each weight."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(tiny["pruned"], dtype=torch.float32)
    generator = torch.Generator().manual_seed(11)
    tensors, updates = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            rows, columns = module.weight.shape
            a = 0.1 * torch.randn(RANK, columns, generator=generator)
            b = 0.1 * torch.randn(rows, RANK, generator=generator)
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            updates[f"{name}.weight"] = SCALING * b @ a
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({name.split(".")[-2] for name in updates})
    config = {
        "peft_type": "LORA", "r": RANK, "lora_alpha": SCALING * RANK, "target_modules": targets, "bias": "none",
        "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, updates


def test_an_adapter_on_packed_layers(tiny, adapter, tmp_path):
    """With it the tokens are those of the merged weights, without it the model's own; cached prefixes too."""
    folder, updates = adapter
    merged = AutoModelForCausalLM.from_pretrained(tiny["pruned"], dtype=torch.float32)
    for name, update in updates.items():
        merged.get_parameter(name).data += update
    merged.save_pretrained(tmp_path / "merged")
    (plain, expected), _ = serve_greedily([tiny["packed"], tmp_path / "merged"], tmp_path)
    lora = {"enable_lora": True, "max_lora_rank": 8, "adapter": str(folder)}
    cached = {"enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 16}
    (found,), _ = serve_greedily([tiny["packed"]], tmp_path, **lora, **cached)
    assert found["tokens"][:3] == plain["tokens"]
    assert found["tokens"][3:] == expected["tokens"]
    assert expected["tokens"] != plain["tokens"]
