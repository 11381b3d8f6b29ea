"""Tiny random models and a tokenizer, made here: no test needs the network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from maskpro_kernels import NMPattern, write_masks
from maskpro_learner import initial_masks

# fmt: off
WORDS = [
    "the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "red", "bird", "fly", "over", "green", "hills", "while",
    "rain", "fell", "on", "old", "stones",
]
# fmt: on
CHAT_TEMPLATE = (
    "{% for message in messages %}<s> {{ message.role }} : {{ message.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant : {% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with a chat template: id 0 unknown, 1 begin, 2 end."""
    vocabulary = {
        word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "user", "assistant", ":", *sorted(set(WORDS))])
    }
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT_TEMPLATE
    return made


def _config(architecture: str) -> PreTrainedConfig:
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"vocab_size": 64, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
    match architecture:
        case "llama":
            return LlamaConfig(**common, num_key_value_heads=2)
        case "qwen2":
            return Qwen2Config(**common, num_key_value_heads=2)
        case "qwen3":
            return Qwen3Config(**common, num_key_value_heads=2, head_dim=8)
        case "mistral":
            return MistralConfig(**common, num_key_value_heads=2, sliding_window=8)
        case "gemma2":
            return Gemma2Config(**common, num_key_value_heads=2, head_dim=8, sliding_window=8)
        case "gemma3":
            return Gemma3TextConfig(**common, num_key_value_heads=2, head_dim=8, sliding_window=8)
        case "gpt_neox":
            return GPTNeoXConfig(**common)
        case _:
            raise ValueError(architecture)


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Builds a random two-block model of a family: see _config()."""

    def build(architecture: str = "llama", seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(_config(architecture), dtype=torch.float32).eval()

    return build


@pytest.fixture
def model_folder(
    tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A tiny Llama with its tokenizer, saved."""
    folder = tmp_path / "tiny-llama"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """40 short documents, blank lines between."""
    path = tmp_path / "calibration.txt"
    path.write_text("\n\n".join(" ".join(WORDS[i % 7 :] + WORDS[: i % 5]) for i in range(40)))
    return path


@pytest.fixture
def mask_file(model_folder: Path, tmp_path: Path) -> Path:
    """A 2:4 mask file of that Llama; random masks, so that no weight's size tells which are kept."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    pattern = NMPattern(2, 4)
    path = tmp_path / "mask.safetensors"
    write_masks(path, initial_masks(model, pattern, "random").masks, pattern, provenance={"method": "random"})
    return path
