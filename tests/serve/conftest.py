"""Tiny models on disk, dense and packed, and ways to run them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import ONE_SCALE, serve_greedily
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from maskpro_kernels import NMPattern, NMWeight, unpack, write_masks
from maskpro_kernels.packing import magnitude_mask
from maskpro_serve import convert, load_packed

PATTERN = NMPattern.parse("2:4")


def linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """A random Llama: ``dense``, its ``mask``, ``pruned`` (the same weights with zeros), ``packed``, and ``int8``."""
    root = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, initializer_range=0.2, dtype=torch.bfloat16,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    paths = {name: root / name for name in ("dense", "pruned", "packed", "int8", "mask")}
    model.save_pretrained(paths["dense"])
    masks = {
        f"{name}.weight": magnitude_mask(linear.weight.detach(), PATTERN) for name, linear in linears(model).items()
    }
    write_masks(paths["mask"], masks, PATTERN, provenance={"method": "magnitude"})
    for name, linear in linears(model).items():
        linear.weight.data *= masks[f"{name}.weight"]
    model.save_pretrained(paths["pruned"])
    convert(paths["dense"], paths["packed"], mask=paths["mask"])
    convert(paths["dense"], paths["int8"], mask=paths["mask"], values="int8")
    return paths


@pytest.fixture(scope="session")
def greedy(tiny, tmp_path_factory) -> dict[str, list[list[int]]]:
    """Greedy tokens of the tiny models, of ``ONE_SCALE``, and of the int8 one's unpacked twin, which is in float32."""
    twin = tmp_path_factory.mktemp("twin")
    config, weights = load_packed(tiny["int8"])
    del config["quantization_config"]
    (twin / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    dense = {name: unpack(weight) if isinstance(weight, NMWeight) else weight for name, weight in weights.items()}
    save_file({name: tensor.float().contiguous() for name, tensor in dense.items()}, twin / "model.safetensors")
    folders = {name: tiny[name] for name in ("packed", "pruned", "int8")} | {"twin": twin, "one scale": ONE_SCALE}
    documents, _ = serve_greedily(list(folders.values()), twin.parent)
    # The output head of a packed model is interleaved.
    assert [document["head"] for document in documents][:4] == [True, False, True, False]
    return {name: document["tokens"] for name, document in zip(folders, documents, strict=True)}
