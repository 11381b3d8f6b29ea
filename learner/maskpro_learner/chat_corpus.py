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
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from maskpro_kernels.base_model import weights_sha256
from maskpro_learner.chat_prompts import prompt_families, seed_prompts, short_families
from maskpro_learner.checkpoints import load_model, load_tokenizer
from maskpro_learner.command_line import check_device
from maskpro_learner.errors import LearnerError, ModelError
from maskpro_learner.partial_chats import PartialChats
from maskpro_learner.progress import progress_bar, quiet_transformers
from maskpro_learner.writers import ModelWriter, ServerWriter, Writer

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


def own_prompts(
    writer: Writer,
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
        writer: of a model that was trained on chats; its tokenizer has a chat template.
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
    tokenizer, marker = writer.tokenizer, "\N{SYMBOL FOR START OF TEXT}"
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
        for tokens, finished in writer.write([head] * size, max_tokens, temperature, seeded):
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
    writer: Writer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 192,
    temperature: float = 0.0,
    seed: int = 0,
    keep_unfinished: bool = False,
) -> list[str | None]:
    """Answers one batch of user prompts.

    Args:
        writer: of a model whose tokenizer has a chat template.
        prompts: user messages.
        max_new_tokens: the most an answer may take.
        temperature: 0 is greedy; else answers are sampled from the whole softmax.
        seed: of the sampling.
        keep_unfinished: answers that do not end in time are given as far as they go.

    Returns:
        One answer each; None where it did not end within ``max_new_tokens``.
    """
    tokenizer = writer.tokenizer
    texts = [render_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    written = writer.write(texts, max_new_tokens, temperature, seed)
    return [_text(tokenizer, tokens) if finished or keep_unfinished else None for tokens, finished in written]


def write_chat_corpus(
    writer: Writer,
    partial: PartialChats,
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
    for distillation, which asks the dense model at every position what it would say. What ``partial`` has already is
    not asked again; the output appears at the end, whole.

    Returns:
        The number of conversations written.

    Raises:
        ModelError: the tokenizer has no chat template or no end-of-sequence token, or no answer ended.
        OSError: the output cannot be written.
    """
    check_chat(writer.tokenizer)
    advance(partial.answered)
    for start in range(partial.answered, len(prompts), batch):
        part = prompts[start : start + batch]
        texts = answer(
            writer, part, max_new_tokens=max_new_tokens, temperature=temperature,
            seed=_seed(seed, "answers", start),
            keep_unfinished=keep_unfinished,
        )  # fmt: skip
        lines = []
        for prompt, text in zip(part, texts, strict=True):
            if text:
                messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
                lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
        partial.add(len(part), lines)
        advance(len(part))
    if not partial.chats:
        partial.discard()
        raise ModelError(f"no answer ended within {max_new_tokens} tokens: expected at least one")
    partial.finish()
    return len(partial.chats)


def _check(options: argparse.Namespace) -> None:
    """Checks what argparse does not, and settles where the model is.

    Raises:
        LearnerError: a number out of its range, a device that is not there, or one beside a server.
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
    if options.server is None:
        options.dtype = options.dtype or "float32"
        options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        check_device(options.device)
        return
    for name in ("dtype", "device"):
        if getattr(options, name) is not None:
            raise LearnerError(f"--{name} is for a model loaded here: expected none with --server")


def _run(options: argparse.Namespace, prompts: Sequence[str], writer: Writer) -> dict[str, object]:
    """What the chats of a command depend on; of a server's model, as far as its name tells."""
    names = ("prompts", "own_prompts", "seed", "batch", "max_new_tokens", "temperature", "prompt_temperature")
    asked = "\0".join(prompts).encode()
    return {name: getattr(options, name) for name in (*names, "keep_unfinished", "dtype")} | {
        "name": options.model,
        "template": hashlib.sha256(str(writer.tokenizer.chat_template).encode()).hexdigest(),
        "model": writer.served if isinstance(writer, ServerWriter) else weights_sha256(options.model),
        "asked": hashlib.sha256(asked).hexdigest(),
    }


def _writer(options: argparse.Namespace) -> Writer:
    """Of the model, loaded here or served elsewhere."""
    tokenizer = load_tokenizer(options.model)
    if options.server is not None:
        return ServerWriter(options.server, tokenizer)
    return ModelWriter(load_model(options.model, getattr(torch, options.dtype), options.device), tokenizer)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code, 2 for an input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m maskpro_learner.chat_corpus", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", required=True, help="dense chat model: folder or hub id")
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write")
    parser.add_argument(
        "--server", metavar="URL",
        help="let a server of the model write instead, for example http://localhost:8000/v1: vLLM, or on CPUs, where "
        "vLLM's worker dies of seeds, maskpro-serve; OPENAI_API_KEY has its key",
    )  # fmt: skip
    parser.add_argument("--prompts", type=int, default=480, help="user prompts to answer (default 480)")
    whose = parser.add_mutually_exclusive_group()
    whose.add_argument(
        "--own-prompts", action="store_true", help="let the model write the prompts; doubles and long ones are left out"
    )
    whose.add_argument(
        "--short-questions", action="store_true", help="ask short questions, which one fact or sentence answers"
    )
    parser.add_argument(
        "--keep-unfinished", action="store_true", help="keep answers that are cut off (for distillation only)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=192, help="the most an answer may take (default 192)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the answers; 0 (default) is greedy")
    parser.add_argument("--prompt-temperature", type=float, default=1.0, help="of --own-prompts (default 1)")
    parser.add_argument("--batch", type=int, default=64, help="answers written at once (default 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="compute dtype (default float32)")
    parser.add_argument("--device", help="(default cuda, if there is one)")
    options = parser.parse_args(argv)
    quiet_transformers()
    try:
        _check(options)
        families = short_families() if options.short_questions else prompt_families()
        prompts = [] if options.own_prompts else seed_prompts(options.prompts, options.seed, families)
        if not options.output.parent.is_dir():
            raise LearnerError(f"{options.output}: its folder does not exist")
        writer = _writer(options)
        partial = PartialChats(options.output, _run(options, prompts, writer))
        if partial.prompts is not None:
            prompts = partial.prompts
        elif options.own_prompts:
            check_chat(writer.tokenizer)
            with progress_bar("writing prompts", options.prompts) as advance:
                prompts = own_prompts(
                    writer, options.prompts, batch=options.batch,
                    temperature=options.prompt_temperature, seed=options.seed, advance=advance,
                )  # fmt: skip
            partial.remember_prompts(prompts)
        with progress_bar("writing answers", len(prompts)) as advance:
            written = write_chat_corpus(
                writer, partial, prompts=prompts, batch=options.batch,
                max_new_tokens=options.max_new_tokens, temperature=options.temperature, seed=options.seed,
                keep_unfinished=options.keep_unfinished, advance=advance,
            )  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted; the same command goes on after the last whole batch of answers", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    by = f", written by {writer.served}" if isinstance(writer, ServerWriter) else ""
    print(f"{options.output}: {written} conversations from {len(prompts)} prompts{by}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
