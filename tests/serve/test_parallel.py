"""Tensor and pipeline parallelism say what one process says; adapters work on packed layers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from processes import ONE_SCALE, serve_greedily
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from maskpro_serve import CheckpointError
from maskpro_serve.checkpoint import PackedFormat
from maskpro_serve.scheme import LinearScheme

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

RANK, SCALING = 4, 2.0


@pytest.fixture
def one_thread(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_two_processes_equal_one(tiny, greedy, one_thread, tmp_path):
    folders = [tiny["int8"], tiny["packed"], ONE_SCALE]
    documents, _ = serve_greedily(folders, tmp_path, tensor_parallel_size=2)
    assert [document["tokens"] for document in documents] == [greedy[k] for k in ("int8", "packed", "one scale")]


def test_a_pipeline_of_two_equals_one(tiny, greedy, one_thread, tmp_path, monkeypatch):
    """Through vLLM's compilation, for its CPU backend has no pipelines without; to no other code, which is quicker."""
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "0")
    compiled = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
    (found,), log = serve_greedily([tiny["int8"]], tmp_path, pipeline_parallel_size=2, **compiled)
    assert found["tokens"] == greedy["int8"]
    assert sorted(re.findall(r"2:4 linear layers: (\d+) on ", log)) == ["14", "7"]


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


@pytest.fixture
def one_rank(monkeypatch):
    """One rank of one, without vLLM's process groups."""
    from vllm.model_executor import parameter

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)


@pytest.mark.parametrize(
    ("stored", "kept", "allowed"),
    [
        (torch.bfloat16, torch.bfloat16, True),
        (torch.float16, torch.float32, True),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.bfloat16, False),
        (torch.float16, torch.bfloat16, False),
        (torch.float8_e4m3fn, torch.bfloat16, False),
        (torch.int8, torch.bfloat16, False),
        (torch.bfloat16, torch.int8, False),
        (torch.uint8, torch.int8, False),
    ],
)
def test_values_that_another_dtype_would_round_are_refused(one_rank, stored, kept, allowed):
    from maskpro_serve.quantization.params import PackedParameter

    parameter = PackedParameter(data=torch.zeros(2, 4, dtype=kept), weight_loader=None, tensor_name="up_proj.weight")
    weight = torch.ones(2, 4).to(stored)
    if allowed:
        parameter.load_replicated_weight(weight)
        assert parameter.complete
        assert torch.equal(parameter.data, weight.to(kept))
    else:
        message = rf"up_proj\.weight: expected {kept}, as the checkpoint's other weights, found {stored}"
        with pytest.raises(CheckpointError, match=message):
            parameter.load_replicated_weight(weight)
        assert not parameter.data.any()


def test_a_fused_weight_that_was_loaded_in_part_is_refused(one_rank):
    """Its other rows would be what was in memory."""
    from maskpro_kernels import NMPattern
    from maskpro_serve.quantization.loaded import loaded_dense
    from maskpro_serve.quantization.params import PackedParameter

    layer = torch.nn.Module()
    layer.weight = PackedParameter(data=torch.zeros(6, 8), weight_loader=None, tensor_name="qkv_proj.weight")
    with pytest.raises(CheckpointError, match=r"^qkv_proj\.weight: missing in the checkpoint$"):
        loaded_dense(layer, NMPattern(2, 4), "qkv_proj", dummy=False)
    for _ in range(2):
        layer.weight.load_merged_column_weight(torch.zeros(4, 8), shard_offset=0, shard_size=4)
    with pytest.raises(CheckpointError, match=r"weight: missing in the checkpoint but for 4 of 6 rows: one of the "):
        loaded_dense(layer, NMPattern(2, 4), "qkv_proj", dummy=False)
    layer.weight.load_merged_column_weight(torch.zeros(2, 8), shard_offset=4, shard_size=2)
    assert loaded_dense(layer, NMPattern(2, 4), "qkv_proj", dummy=False) is not None


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


def test_an_adapter_on_packed_layers(tiny, greedy, adapter, tmp_path):
    """With it the tokens are those of the merged weights, without it the model's own; cached prefixes too."""
    folder, updates = adapter
    merged = AutoModelForCausalLM.from_pretrained(tiny["pruned"], dtype=torch.float32)
    for name, update in updates.items():
        merged.get_parameter(name).data += update
    merged.save_pretrained(tmp_path / "merged")
    lora = {"enable_lora": True, "max_lora_rank": 8, "adapter": str(folder)}
    cached = {"enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 16}
    (found, dense), _ = serve_greedily([tiny["packed"], tmp_path / "merged"], tmp_path, **lora, **cached)
    expected = dense["tokens"][:3]  # what follows has the adapter twice
    assert found["tokens"][:3] == greedy["packed"]
    assert found["tokens"][3:] == expected
    assert expected != greedy["packed"]
