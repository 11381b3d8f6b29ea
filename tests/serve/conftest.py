"""Tiny models on disk, dense and packed, and ways to run them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from maskpro_kernels import NMPattern, write_masks
from maskpro_kernels.packing import magnitude_mask
from maskpro_serve import convert

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
