"""Calibration text in a model's own chat format, written by the dense model itself.

    python -m maskpro_learner.chat_corpus --model DIR --output corpus.jsonl

A mask learned on web text alone forgets the chat format first. No chat data has to be downloaded for it: the dense
model's own answers are the text whose distribution the sparse model should keep. It can write the questions too: given
the head of its chat format up to where the user speaks, a model trained on chats goes on as a user would (Magpie,
arXiv:2406.08464).
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from maskpro_kernels.files import write_atomically
from maskpro_learner.chat_prompts import seed_prompts
from maskpro_learner.checkpoints import load_model, load_tokenizer
from maskpro_learner.command_line import check_device
from maskpro_learner.errors import LearnerError, ModelError
from maskpro_learner.progress import progress_bar, quiet_transformers

Conversation = list[dict[str, str]]


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Conversation) -> str:
    """The text the model sees before it answers."""
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def check_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that a model can be asked anything.

    Raises:
        ModelError: the tokenizer has no chat template or no end-of-sequence token.
    """
    if not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template: this model is no chat model")
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-sequence token")


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


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_new_tokens: int,
    temperature: float, seed: int,
) -> list[tuple[list[int], bool]]:  # fmt: skip
    """What the model writes after each text, in tokens, and whether it ended by itself."""
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(len(ids) for ids in encoded)
    end: int = tokenizer.eos_token_id
    configured = getattr(model.generation_config, "eos_token_id", None)  # chat models may end a turn with another one
    ends = {end, *(configured if isinstance(configured, list) else [] if configured is None else [configured])}
    ids = torch.tensor([[end] * (width - len(row)) + row for row in encoded], device=model.device)
    attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=model.device)
    sampling = [_Sampling(temperature, seed, model.device)] if temperature > 0 else []
    with torch.inference_mode(), _rows_for_the_head(model):
        generated: Tensor = model.generate(  # type: ignore[operator]
            inputs=ids, attention_mask=attention, max_new_tokens=max_new_tokens, pad_token_id=end,
            eos_token_id=sorted(ends), do_sample=False, logits_processor=LogitsProcessorList(sampling),
        )  # fmt: skip
    written = []
    for row in generated[:, width:].tolist():
        tokens = list(itertools.takewhile(lambda token: token not in ends, row))
        written.append((tokens, len(tokens) < len(row)))
    return written


def own_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    batch: int = 64,
    max_tokens: int = 48,
    temperature: float = 1.0,
    seed: int = 0,
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """User messages that the model itself writes, distinct.

    Args:
        model: a causal language model, trained on chats.
        tokenizer: its tokenizer, with a chat template.
        count: messages to try; those longer than ``max_tokens``, empty, written before or with a special
            token in them are left out.
        batch: messages written at once.
        max_tokens: the most a message may take.
        temperature: of the sampling, above 0.
        seed: of the sampling.
        advance: called with the number of messages tried.

    Raises:
        ModelError: the chat template does not show where the user's message begins, has nothing before it, or no
            message ended in time.
    """
    marker = "\N{SYMBOL FOR START OF TEXT}"
    head, found, tail = render_prompt(tokenizer, [{"role": "user", "content": marker}]).partition(marker)
    if not found:
        raise ModelError("the chat template leaves out the user's message: expected it in the prompt")
    turn = tail.strip()  # where turns do not end with an end token, the model writes this and goes on
    if not head:
        raise ModelError(
            "the chat template begins with the user's message: expected something for a model to go on from"
        )
    special = tokenizer.all_special_tokens  # a message with one would be read as several turns
    prompts: dict[str, None] = {}
    for start in range(0, count, batch):
        size = min(batch, count - start)
        seeded = _seed(seed, "prompts", start)
        for tokens, finished in _generate(model, tokenizer, [head] * size, max_tokens, temperature, seeded):
            text, ended, _ = (
                str(tokenizer.decode(tokens)).partition(turn) if turn else (_text(tokenizer, tokens), "", "")
            )
            if (finished or ended) and text.strip() and not any(token in text for token in special):
                prompts[text.strip()] = None
        advance(size)
    if not prompts:
        raise ModelError(f"no message of a user ended within {max_tokens} tokens: expected at least one")
    return list(prompts)


def _seed(seed: int, stage: str, start: int) -> int:
    """One for each batch of each stage of each run, so that none has another's noise."""
    return int.from_bytes(hashlib.sha256(f"{seed} {stage} {start}".encode()).digest()[:7])


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    text = str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()
    return text.rstrip("\N{REPLACEMENT CHARACTER}")  # of a character whose last bytes were cut off


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 192,
    temperature: float = 0.0,
    seed: int = 0,
    keep_unfinished: bool = False,
) -> list[str | None]:
    """Answers one batch of user prompts.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a chat template.
        prompts: user messages.
        max_new_tokens: the most an answer may take.
        temperature: 0 is greedy; else answers are sampled from the whole softmax.
        seed: of the sampling.
        keep_unfinished: answers that do not end in time are given as far as they go.

    Returns:
        One answer each; None where it did not end within ``max_new_tokens``.
    """
    texts = [render_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    written = _generate(model, tokenizer, texts, max_new_tokens, temperature, seed)
    return [_text(tokenizer, tokens) if finished or keep_unfinished else None for tokens, finished in written]


def write_chat_corpus(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    prompts: Sequence[str],
    batch: int = 64,
    max_new_tokens: int = 192,
    temperature: float = 0.0,
    seed: int = 0,
    keep_unfinished: bool = False,
    advance: Callable[[int], None] = lambda count: None,
) -> int:
    """Writes one ``{"messages": [user, assistant]}`` line per prompt whose answer ended in time, in prompt order.

    Answers cut off in the middle are left out, for a loss on the text would teach to stop there; ``keep_unfinished`` is
    for distillation, which asks the dense model at every position what it would say. The file is written anew after
    every batch, so that a stop keeps what is done.

    Returns:
        The number of conversations written.

    Raises:
        ModelError: the tokenizer has no chat template or no end-of-sequence token, or no answer ended.
        OSError: the output cannot be written.
    """
    check_chat(tokenizer)
    lines: list[str] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        texts = answer(
            model, tokenizer, part, max_new_tokens=max_new_tokens, temperature=temperature,
            seed=_seed(seed, "answers", start),
            keep_unfinished=keep_unfinished,
        )  # fmt: skip
        for prompt, text in zip(part, texts, strict=True):
            if text:
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
                lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
        if lines:
            write_atomically(output, ("\n".join(lines) + "\n").encode())
        advance(len(part))
    if not lines:
        raise ModelError(f"no answer ended within {max_new_tokens} tokens: expected at least one")
    return len(lines)


def _check(options: argparse.Namespace) -> None:
    """Checks what argparse does not.

    Raises:
        LearnerError: a number out of its range, or a device that is not there.
    """
    for name, wrong in (
        ("prompts", options.prompts < 1 and options.own_prompts),
        ("batch", options.batch < 1),
        ("max_new_tokens", options.max_new_tokens < 1),
    ):
        if wrong:
            raise LearnerError(f"--{name.replace('_', '-')}: expected at least 1, found {getattr(options, name)}")
    if not 0 <= options.temperature < math.inf:
        raise LearnerError(f"--temperature: expected 0 or above, found {options.temperature}")
    if not 0 < options.prompt_temperature < math.inf:
        raise LearnerError(f"--prompt-temperature: expected above 0, found {options.prompt_temperature}")
    check_device(options.device)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for an input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m maskpro_learner.chat_corpus", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", required=True, help="dense chat model: folder or hub id")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write")
    parser.add_argument("--prompts", type=int, default=480, help="user prompts to answer (default 480)")
    parser.add_argument(
        "--own-prompts", action="store_true", help="let the model write the prompts; doubles and long ones are left out"
    )
    parser.add_argument(
        "--keep-unfinished", action="store_true", help="keep answers that are cut off (for distillation only)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=192, help="the most an answer may take (default 192)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the answers; 0 (default) is greedy")
    parser.add_argument("--prompt-temperature", type=float, default=1.0, help="of --own-prompts (default 1)")
    parser.add_argument("--batch", type=int, default=64, help="answers written at once (default 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    quiet_transformers()
    try:
        _check(options)
        prompts = [] if options.own_prompts else seed_prompts(options.prompts, options.seed)
        if not options.output.parent.is_dir():
            raise LearnerError(f"{options.output}: its folder does not exist")
        tokenizer = load_tokenizer(options.model)
        model = load_model(options.model, getattr(torch, options.dtype), options.device)
        if options.own_prompts:
            check_chat(tokenizer)
            with progress_bar("writing prompts", options.prompts) as advance:
                prompts = own_prompts(
                    model, tokenizer, options.prompts, batch=options.batch,
                    temperature=options.prompt_temperature, seed=options.seed, advance=advance,
                )  # fmt: skip
        with progress_bar("writing answers", len(prompts)) as advance:
            written = write_chat_corpus(
                model, tokenizer, options.output, prompts=prompts, batch=options.batch,
                max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=options.seed,
                keep_unfinished=options.keep_unfinished, advance=advance,
            )  # fmt: skip
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {written} conversations from {len(prompts)} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
