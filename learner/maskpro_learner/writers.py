"""Text that a model goes on with: written by transformers in this process, or by a vLLM server of the model."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from maskpro_learner.errors import LearnerError

Written = tuple[list[int], bool]
"""Tokens up to one that ends a turn, and whether there was one."""


class Writer(Protocol):
    """Writes what comes after texts.

    Attributes:
        tokenizer: the model's.
    """

    tokenizer: PreTrainedTokenizerBase

    def write(self, texts: Sequence[str], max_new_tokens: int, temperature: float, seed: int) -> list[Written]:
        """Goes on with every text, at once.

        Args:
            texts: special tokens and all.
            max_new_tokens: the most to write after each.
            temperature: 0 is greedy; else tokens are sampled from the whole softmax.
            seed: of the sampling, below 2**62.
        """


class _Sampling(LogitsProcessor):
    """The largest of logit / temperature + Gumbel noise is a draw from the softmax, so that greedy search samples.

    transformers draws with ``torch.multinomial``, whose exponential variates take longer than the model does: on two
    cores 0.2 s a token for 128 texts.
    """

    def __init__(self, temperature: float, seed: int, device: torch.device) -> None:
        self._temperature = temperature
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        # Single precision has no variate above 17, which one draw in 500 from 50,000 tokens should exceed.
        noise = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
        noise.uniform_(1e-15, 1 - 1e-15, generator=self._generator).log_().neg_().log_()
        return noise.neg_().add_(scores.double().div_(self._temperature))  # type: ignore[return-value]


@contextmanager
def _rows_for_the_head(model: PreTrainedModel) -> Iterator[None]:
    """The output head gets contiguous rows while inside.

    generate() gives it the last position of every prompt, a strided view, for which torch copies the whole head once
    for every prompt: 7 GB for 128 of them.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        hook.remove()


class ModelWriter:
    """A causal language model in this process."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._model = model

    def write(self, texts: Sequence[str], max_new_tokens: int, temperature: float, seed: int) -> list[Written]:
        encoded = [_ids(self.tokenizer, text) for text in texts]
        width = max(len(ids) for ids in encoded)
        end: int = self.tokenizer.eos_token_id
        # Chat models may end a turn with another token.
        configured = getattr(self._model.generation_config, "eos_token_id", None)
        ends = {end, *(configured if isinstance(configured, list) else [] if configured is None else [configured])}
        device = self._model.device
        ids = torch.tensor([[end] * (width - len(row)) + row for row in encoded], device=device)
        attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=device)
        sampling = [_Sampling(temperature, seed, device)] if temperature > 0 else []
        with torch.inference_mode(), _rows_for_the_head(self._model):
            generated: Tensor = self._model.generate(  # type: ignore[operator]
                inputs=ids, attention_mask=attention, max_new_tokens=max_new_tokens, pad_token_id=end,
                eos_token_id=sorted(ends), do_sample=False, logits_processor=LogitsProcessorList(sampling),
                num_beams=1, repetition_penalty=1.0, no_repeat_ngram_size=0,  # not what generation_config.json says
            )  # fmt: skip
        written = []
        for row in generated[:, width:].tolist():
            tokens = list(itertools.takewhile(lambda token: token not in ends, row))
            written.append((tokens, len(tokens) < len(row)))
        return written


class ServerWriter:
    """A vLLM server of the model; it batches, so the more texts at once the faster.

    What it samples depends on the seed and, to the rounding of its sums, on what else it computes at the time.

    Args:
        url: of its OpenAI-compatible endpoint, as ``http://localhost:8000/v1``; ``OPENAI_API_KEY`` holds its key.
        tokenizer: the model's.

    Attributes:
        served: the name of the model there; the first, where it has several.

    Raises:
        LearnerError: not such a URL, or no server of models answers there.
    """

    def __init__(self, url: str, tokenizer: PreTrainedTokenizerBase) -> None:
        try:
            import openai
        except ImportError as error:
            raise LearnerError("--server needs the openai library: pip install maskpro-serve[learn]") from error
        self.tokenizer = tokenizer
        self._place = f"--server {_address(url)}"
        # No limit: an answer comes whole, and may wait for its turn.
        self._options: dict[str, Any] = {
            "base_url": url,
            "api_key": os.environ.get("OPENAI_API_KEY") or "none",
            "timeout": None,
        }
        try:
            with openai.OpenAI(**self._options) as client:
                models = [model.id for model in client.models.list()]
        except openai.OpenAIError as error:
            raise LearnerError(f"{self._place}: {error}") from error
        if not models:
            raise LearnerError(f"{self._place}: expected a model that is served there, found none")
        self.served = models[0]

    def write(self, texts: Sequence[str], max_new_tokens: int, temperature: float, seed: int) -> list[Written]:
        import openai

        prompts = [_ids(self.tokenizer, text) for text in texts]
        try:
            return asyncio.run(self._write(prompts, max_new_tokens, temperature, seed))
        except openai.OpenAIError as error:
            raise LearnerError(f"{self._place}: {error}") from error

    async def _write(
        self, prompts: Sequence[list[int]], max_new_tokens: int, temperature: float, seed: int
    ) -> list[Written]:
        from openai import AsyncOpenAI

        async def ask(client: AsyncOpenAI, prompt: list[int], seed: int) -> Written:
            # What is not said would be as in the model's generation_config.json.
            answer = await client.completions.create(
                model=self.served, prompt=prompt, max_tokens=max_new_tokens, temperature=temperature, seed=seed,
                top_p=1.0, presence_penalty=0.0, frequency_penalty=0.0,
                extra_body={"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True},
            )  # fmt: skip
            return self._read(answer.choices[0])

        async with AsyncOpenAI(**self._options) as client:
            # One request a text: the texts of one request would share its seed.
            asked = [asyncio.ensure_future(ask(client, prompt, seed + i)) for i, prompt in enumerate(prompts)]
            try:
                return await asyncio.gather(*asked)
            finally:
                for each in asked:
                    each.cancel()  # if one has failed, or the user has: nobody waits for the others

    def _read(self, choice: Any) -> Written:
        tokens: list[int] | None = getattr(choice, "token_ids", None)
        if tokens is None:
            raise LearnerError(f"{self._place}: expected token ids in an answer, as vLLM gives, found none")
        if choice.finish_reason not in ("stop", "length"):
            raise LearnerError(
                f"{self._place}: expected an answer that ends by stop or length, found {choice.finish_reason}"
            )
        return (tokens[:-1], True) if choice.finish_reason == "stop" else (tokens, False)  # the last ended the turn


def _address(url: str) -> str:
    """The URL without a password.

    Raises:
        LearnerError: it is none.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of the port
        good = False
    if not good:
        raise LearnerError(f"--server: expected a URL such as http://localhost:8000/v1, found {url!r}")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
