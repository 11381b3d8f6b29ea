"""Calibration text in a model's own chat format, written by the dense model itself.

    python -m maskpro_learner.chat_corpus --model DIR --output corpus.jsonl

A mask learned on web text alone forgets the chat format first. No chat data has to be downloaded for it: the dense
model's own answers are the text whose distribution the sparse model should keep.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskpro_kernels.files import write_atomically
from maskpro_learner.chat_prompts import seed_prompts
from maskpro_learner.checkpoints import load_model, load_tokenizer
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


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 192,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str | None]:
    """Answers one batch of user prompts.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a chat template.
        prompts: user messages.
        max_new_tokens: the most an answer may take.
        temperature: 0 is greedy; else answers are sampled from the whole softmax.
        seed: of the sampling.

    Returns:
        One answer each; None where it did not end within ``max_new_tokens``.
    """
    texts = [render_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    width = max(len(ids) for ids in encoded)
    end = tokenizer.eos_token_id
    ids = torch.tensor([[end] * (width - len(row)) + row for row in encoded], device=model.device)
    attention = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generated = model.generate(  # type: ignore[operator]
            inputs=ids, attention_mask=attention, max_new_tokens=max_new_tokens, pad_token_id=end, eos_token_id=end,
            **sampling,
        )  # fmt: skip
    answers: list[str | None] = []
    for row in generated[:, width:].tolist():
        finished = end in row
        answers.append(
            str(tokenizer.decode(row[: row.index(end)], skip_special_tokens=True)).strip() if finished else None
        )
    return answers


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
    advance: Callable[[int], None] = lambda count: None,
) -> int:
    """Writes one ``{"messages": [user, assistant]}`` line per prompt whose answer ended in time, in prompt order.

    Answers cut off in the middle are left out: they would teach not to stop.

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
            model, tokenizer, part, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed + start
        )
        for prompt, text in zip(part, texts, strict=True):
            if text:
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
                lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
        advance(len(part))
    if not lines:
        raise ModelError(f"no answer ended within {max_new_tokens} tokens: expected at least one")
    write_atomically(output, ("\n".join(lines) + "\n").encode())
    return len(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for an input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m maskpro_learner.chat_corpus", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", required=True, help="dense chat model: folder or hub id")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write")
    parser.add_argument("--prompts", type=int, default=480, help="user prompts to answer (default 480)")
    parser.add_argument("--max-new-tokens", type=int, default=192, help="the most an answer may take (default 192)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--batch", type=int, default=64, help="answers written at once (default 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="compute dtype")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    quiet_transformers()
    try:
        prompts = seed_prompts(options.prompts, options.seed)
        if not options.output.parent.is_dir():
            raise LearnerError(f"{options.output}: its folder does not exist")
        tokenizer = load_tokenizer(options.model)
        model = load_model(options.model, getattr(torch, options.dtype), options.device)
        with progress_bar("writing answers", len(prompts)) as advance:
            written = write_chat_corpus(
                model, tokenizer, options.output, prompts=prompts, batch=options.batch,
                max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=options.seed,
                advance=advance,
            )  # fmt: skip
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {written} conversations from {len(prompts)} prompts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
