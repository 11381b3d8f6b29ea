"""Perplexity of a Hugging Face model on text.

Two kinds, never to be mixed up: *token* perplexity divides the loss by tokens, *word* perplexity by words, as lm-eval's
``word_perplexity`` does. That one, of which the MaskPro paper's numbers are, also reads its pages one by one, and with
all of a model's context: to compare with published numbers use ``--tasks wikitext``. Every token is predicted once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskpro_learner.errors import CalibrationError

_IGNORED = -100  # the target index that cross_entropy leaves out

Bar = Callable[[int], AbstractContextManager[Callable[[int], None]]]
"""Opens a progress bar of so many steps, and gives the function that advances it."""


@dataclass(frozen=True)
class Perplexity:
    """A summed loss and what to divide it by.

    Attributes:
        loss: negative log-likelihood in nats, summed over the predicted tokens.
        tokens: predicted tokens.
        words: whitespace-separated words of the predicted text.
    """

    loss: float
    tokens: int
    words: int

    @property
    def token_perplexity(self) -> float:
        """exp(loss / tokens)."""
        return _exp(self.loss / self.tokens)

    @property
    def word_perplexity(self) -> float:
        """exp(loss / words); infinite where a float ends, as in a script that puts no spaces between words."""
        return _exp(self.loss / self.words)


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def no_bar(total: int) -> AbstractContextManager[Callable[[int], None]]:
    """A bar that is not drawn."""
    return nullcontext(lambda count: None)


@torch.inference_mode()
def summed_loss(model: PreTrainedModel, inputs: Tensor, targets: Tensor) -> float:
    """Negative log-likelihood in nats of ``targets`` (batch, length) given ``inputs``; targets of -100 do not count."""
    logits = model(input_ids=inputs.to(model.device), use_cache=False).logits
    flat = targets.to(model.device).flatten()
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), flat, ignore_index=_IGNORED, reduction="sum")
    return float(loss)


def text_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = 1024,
    max_tokens: int | None = None,
    batch: int = 1,
    bar: Bar = no_bar,
) -> Perplexity:
    """Perplexity of one text, read in windows of ``window`` tokens without overlap.

    Each window is given the token before it as context (lm-eval's rolling log-likelihood), the first one the
    tokenizer's beginning or end token, or failing both the text's own first token, which then is not predicted.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        text: the text.
        window: tokens predicted at once, at most; the model sees no further back.
        max_tokens: only the first tokens of the text.
        batch: windows run at once; speed and memory only.
        bar: advances by predicted tokens.

    Raises:
        CalibrationError: nothing to predict.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        first, ids = ids[:1], ids[1:]
    stream = torch.tensor([*(first if isinstance(first, list) else [first]), *ids])
    if len(stream) < 2:
        raise CalibrationError("perplexity: expected at least one token to predict, found none")
    inputs, targets = stream[:-1], stream[1:]
    whole = len(targets) // window * window  # the last window is shorter, and goes alone
    batches = [
        *zip(inputs[:whole].view(-1, window).split(batch), targets[:whole].view(-1, window).split(batch), strict=True),
        (inputs[None, whole:], targets[None, whole:]),
    ]
    loss = 0.0
    with bar(len(targets)) as advance:
        for part, expected in batches:
            if expected.numel():
                loss += summed_loss(model, part, expected)
                advance(expected.numel())
    return Perplexity(loss, len(targets), max(1, len(str(tokenizer.decode(ids)).split())))


def read_chats(path: Path) -> list[list[dict[str, str]]]:
    """Reads the ``messages`` of a JSONL file of conversations.

    Raises:
        CalibrationError: missing, empty, or a line without messages.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        chats: list[list[dict[str, str]]] = [row["messages"] for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{path}: expected JSON lines with messages: {error}") from error
    if not chats:
        raise CalibrationError(f"{path}: expected conversations, found none")
    return chats


def chat_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chats: Sequence[list[dict[str, str]]]
) -> Perplexity:
    """Perplexity of the last message of each conversation, its end-of-turn token included, given all before it.

    Raises:
        CalibrationError: the chat template does not render a conversation as its prompt and then the answer.
    """
    loss, tokens, words = 0.0, 0, 0
    for messages in chats:
        prompt = str(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
        if not whole.startswith(prompt):
            raise CalibrationError("the chat template does not render an answer after its prompt: no answer to measure")
        context = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(whole[len(prompt) :].rstrip("\n"), add_special_tokens=False)["input_ids"]
        targets = torch.tensor([[_IGNORED] * (len(context) - 1) + answer])
        loss += summed_loss(model, torch.tensor([[*context, *answer[:-1]]]), targets)
        tokens += len(answer)
        words += len(messages[-1]["content"].split())
    return Perplexity(loss, tokens, max(1, words))
