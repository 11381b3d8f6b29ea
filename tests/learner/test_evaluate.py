"""Perplexity against the definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from maskpro_learner import CalibrationError, Perplexity, chat_perplexity, text_perplexity
from maskpro_learner.calibration import read_text
from maskpro_learner.checkpoints import load_model, load_tokenizer
from maskpro_learner.evaluate import read_chats


def log_probabilities(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """(len(ids) - 1,) of each token given all before it, one forward pass a token: no shared masking or shifting."""
    with torch.inference_mode():
        rows = [
            model(torch.tensor([ids[:i]])).logits[0, -1].double().log_softmax(-1)[ids[i]] for i in range(1, len(ids))
        ]
    return torch.stack(rows)


@pytest.mark.parametrize("window", [1, 3, 7, 64])
def test_every_token_counts_once(
    tiny_model: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, window: int
) -> None:
    model, text = tiny_model(), "the cat sat on a mat and saw one red bird"
    stream = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    loss = 0.0
    for start in range(0, len(stream) - 1, window):
        loss -= float(log_probabilities(model, stream[start : start + window + 1]).sum())
    got = text_perplexity(model, tokenizer, text, window=window)
    assert (got.tokens, got.words) == (11, 11)
    assert got.loss == pytest.approx(loss, rel=1e-5)
    assert got.token_perplexity == pytest.approx(math.exp(loss / 11), rel=1e-5)
    first = text_perplexity(model, tokenizer, text, window=64, max_tokens=4)
    assert (first.tokens, first.words) == (4, 4)


@pytest.mark.parametrize("window", [1, 3, 4, 5, 6, 64])
def test_windows_may_run_together(
    tiny_model: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, window: int
) -> None:
    model, text = tiny_model(), "the cat sat on a mat and saw one red bird fly"
    alone = text_perplexity(model, tokenizer, text, window=window)
    advanced: list[int] = []
    for batch in (2, 3, 100):
        together = text_perplexity(
            model, tokenizer, text, window=window, batch=batch, bar=lambda total: nullcontext(advanced.append)
        )
        assert (together.tokens, together.words) == (alone.tokens, alone.words) == (12, 12)
        assert together.loss == pytest.approx(alone.loss, rel=1e-6)
    assert sum(advanced) == 3 * 12


def test_word_and_token_perplexity_divide_by_different_things() -> None:
    result = Perplexity(loss=12.0, tokens=6, words=4)
    assert (result.token_perplexity, result.word_perplexity) == (math.exp(2), math.exp(3))
    assert Perplexity(loss=7200.0, tokens=600, words=1).word_perplexity == math.inf  # no spaces between words


def test_only_the_answer_counts_in_a_chat(
    tiny_model: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny_model()
    chat = [{"role": "user", "content": "cat sat"}, {"role": "assistant", "content": "on a mat"}]
    ids = tokenizer("<s> user : cat sat </s> <s> assistant : on a mat </s>")["input_ids"]
    answer = log_probabilities(model, ids)[-4:]  # on a mat </s>
    got = chat_perplexity(model, tokenizer, [chat, chat])
    assert (got.tokens, got.words) == (8, 6)
    assert got.loss == pytest.approx(-2 * float(answer.sum()), rel=1e-5)


def test_errors(tmp_path: Path, tiny_model: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(CalibrationError, match="at least one token"):
        text_perplexity(tiny_model(), tokenizer, "cat")
    path = tmp_path / "a.jsonl"
    for content, message in (("", "found none"), ('{"a": 1}\n', "JSON lines with messages")):
        path.write_text(content)
        with pytest.raises(CalibrationError, match=message):
            read_chats(path)


def test_a_real_model_reads_its_own_language(test_data: Path) -> None:
    folder = str(test_data / "stories260K")
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    got = text_perplexity(
        model, tokenizer, read_text(test_data / "text" / "tinystories.txt"), window=256, max_tokens=2048
    )
    assert 2 < got.token_perplexity < 8  # a uniform guess would be 512
