"""``maskpro-eval``: perplexity, zero-shot tasks and a chat quiz of a dense, masked or packed model."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from maskpro_kernels.files import write_atomically
from maskpro_learner.calibration import read_text
from maskpro_learner.chat_corpus import check_chat
from maskpro_learner.chat_quiz import SHIPPED, Question, QuizResult, quiz, read_questions
from maskpro_learner.checkpoints import check_model, load_tokenizer
from maskpro_learner.command_line import check_device, context_length
from maskpro_learner.errors import LearnerError, ModelError
from maskpro_learner.evaluate import Perplexity, text_perplexity
from maskpro_learner.packed_model import EvaluatedModel, load_for_evaluation
from maskpro_learner.progress import progress_bar, quiet_transformers
from maskpro_learner.tasks import TaskFile, TaskScore, import_lm_eval, read_task_file, run_tasks

DEFAULT_WINDOW = 1024
_STDOUT = "-"


@dataclass(frozen=True)
class Inputs:
    """Everything the command reads before the model, which takes longest: a mistake shows at once."""

    texts: dict[str, str]
    tasks: list[TaskFile | str]
    questions: list[Question]


@dataclass(frozen=True)
class Report:
    """What was measured."""

    texts: dict[str, Perplexity]
    tasks: list[TaskScore]
    chat: QuizResult | None
    window: int


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse exits with code 2 on a bad one."""
    parser = argparse.ArgumentParser(prog="maskpro-eval", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--model", required=True, help="a Hugging Face folder, dense or packed, or a hub id")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="mask file to apply to a dense model")
    parser.add_argument("--recovery", type=Path, metavar="FILE", help="recovery file to merge under the mask")
    measured = parser.add_argument_group("what to measure (at least one)")
    measured.add_argument("--text", nargs="+", type=Path, default=[], metavar="FILE", help="perplexity of text files")
    measured.add_argument(
        "--tasks", nargs="+", default=[], metavar="FILE.jsonl|NAME",
        help="zero-shot: multiple-choice rows of ARC's or OpenBookQA's form, or lm-eval's tasks by name (online)",
    )  # fmt: skip
    measured.add_argument(
        "--chat", nargs="?", type=Path, const=SHIPPED, metavar="QUESTIONS.jsonl",
        help="questions in the model's chat format; without a value, 40 simple ones of our own",
    )  # fmt: skip
    parser.add_argument(
        "--window", type=int,
        help=f"tokens of text the model sees at once (default {DEFAULT_WINDOW}, or the model's context if shorter)",
    )  # fmt: skip
    parser.add_argument("--max-tokens", type=int, metavar="N", help="only the first tokens of every text")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first rows of every task")
    parser.add_argument("--batch", type=int, default=4, help="windows or answers scored at once (default 4)")
    parser.add_argument("--json", nargs="?", const=_STDOUT, metavar="FILE", help="write JSON; without FILE to stdout")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="compute dtype")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0, help="of the tasks that draw (default 0)")
    return parser.parse_args(argv)


def read_inputs(options: argparse.Namespace) -> Inputs:
    """Reads and checks everything but the model.

    Raises:
        LearnerError: the first thing that cannot be used.
    """
    if not (options.text or options.tasks or options.chat):
        raise LearnerError("nothing to measure: give --text FILE, --tasks FILE.jsonl or --chat")
    for name in ("window", "max_tokens", "limit", "batch"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise LearnerError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")
    if options.json not in (None, _STDOUT) and not Path(options.json).parent.is_dir():
        raise LearnerError(f"--json {options.json}: its folder does not exist")
    check_device(options.device)
    check_model(options.model)
    texts = {str(path): read_text(path) for path in options.text}
    tasks = [read_task_file(Path(task)) if _is_file(task) else task for task in options.tasks]
    if tasks:
        import_lm_eval()
    return Inputs(texts, tasks, read_questions(options.chat) if options.chat else [])


def _is_file(task: str) -> bool:
    return task.endswith((".jsonl", ".json")) or Path(task).is_file()


def choose_window(asked: int | None, loaded: EvaluatedModel) -> int:
    """The window asked for, or the default one, shortened to the model's context.

    Raises:
        LearnerError: the model cannot see as far as asked.
    """
    context = context_length(loaded.model)
    if asked is None:
        return int(min(DEFAULT_WINDOW, context))
    if asked > context:
        raise LearnerError(f"--window {asked}: expected at most the model's context of {context} tokens")
    return asked


def measure(
    loaded: EvaluatedModel, tokenizer: PreTrainedTokenizerBase, inputs: Inputs, options: argparse.Namespace
) -> Report:
    """Measures everything that was asked for.

    Raises:
        LearnerError: the model and what was asked for do not go together.
    """
    window = choose_window(options.window, loaded)
    try:
        scores = []
        if inputs.tasks:  # first: a task by name is what can still fail
            scores = run_tasks(
                loaded.model, tokenizer, inputs.tasks, limit=options.limit, batch=options.batch, seed=options.seed
            )
        texts = {
            name: text_perplexity(
                loaded.model, tokenizer, text, window=window, max_tokens=options.max_tokens, batch=options.batch,
                bar=partial(progress_bar, Path(name).name),
            )
            for name, text in inputs.texts.items()
        }  # fmt: skip
        chat = None
        if inputs.questions:
            with progress_bar("chat", len(inputs.questions)) as advance:
                chat = quiz(loaded.model, tokenizer, inputs.questions, batch=options.batch, advance=advance)
    except IndexError as error:
        if len(tokenizer) <= loaded.model.get_input_embeddings().num_embeddings:  # type: ignore[operator]
            raise
        raise ModelError(
            f"{options.model}: the tokenizer makes ids that the model's embedding does not have"
        ) from error
    return Report(texts, scores, chat, window)


def document(options: argparse.Namespace, loaded: EvaluatedModel, report: Report) -> dict[str, Any]:
    """The report for machines. Numbers that are not finite are null: JSON has no others."""
    return {
        "model": {
            "name": options.model,
            "kind": loaded.kind,
            "mask": str(options.mask) if options.mask else None,
            "recovery": str(options.recovery) if options.recovery else None,
            "pattern": str(loaded.pattern) if loaded.pattern else None,
            "provenance": loaded.provenance,
            "warnings": list(loaded.warnings),
        },
        "text": [
            {
                "file": name,
                "token_perplexity": _finite(perplexity.token_perplexity),
                "word_perplexity": _finite(perplexity.word_perplexity),
                "loss_nats": _finite(perplexity.loss),
                "tokens": perplexity.tokens,
                "words": perplexity.words,
                "window": report.window,
            }
            for name, perplexity in report.texts.items()
        ],
        "tasks": [
            {
                "task": score.task,
                "prompt": score.prompt,
                "rows": score.rows,
                "metrics": {
                    metric: {"value": value, "stderr": score.stderr.get(metric)}
                    for metric, value in score.metrics.items()
                },
            }
            for score in report.tasks
        ],
        "chat": _chat_document(report.chat) if report.chat else None,
        "settings": {
            name: getattr(options, name) for name in ("dtype", "device", "batch", "max_tokens", "limit", "seed")
        },
        "versions": _versions("maskpro-serve", "torch", "transformers", "lm-eval"),
    }


def _chat_document(chat: QuizResult) -> dict[str, Any]:
    return {
        "right": chat.right,
        "total": chat.total,
        "kinds": {kind: {"right": right, "total": total} for kind, (right, total) in chat.kinds.items()},
        "answers": [
            {
                "question": answer.question.question,
                "kind": answer.question.kind,
                "answer": answer.text,
                "right": answer.right,
            }
            for answer in chat.answers
        ],
    }


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _versions(*names: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def title(options: argparse.Namespace, loaded: EvaluatedModel) -> str:
    """Which model the numbers are of, in one line."""
    what = f"{loaded.kind} {loaded.pattern}" if loaded.pattern else loaded.kind
    made = loaded.provenance.get("method")
    return f"{options.model} ({what}{', ' + made if made else ''}, {options.dtype})"


def tables(report: Report) -> list[Table]:
    """The report for people."""
    shown = []
    if report.texts:
        table = _table("text", "token perplexity", "word perplexity", "tokens", "window")
        for name, result in report.texts.items():
            numbers = (f"{result.token_perplexity:.4g}", f"{result.word_perplexity:.4g}")
            table.add_row(Path(name).name, *numbers, f"{result.tokens:,}", f"{report.window:,}")
        shown.append(table)
    if report.tasks:
        table = _table("zero-shot task", "metric", "value", "stderr", "rows")
        for score in report.tasks:
            for metric, value in score.metrics.items():
                error = score.stderr.get(metric)
                deviation = "-" if error is None else f"{error:.4f}"
                table.add_row(score.task, metric, f"{value:.4f}", deviation, f"{score.rows:,}")
        shown.append(table)
    if report.chat:
        table = _table("chat questions", "right", "of")
        kinds: Mapping[str, tuple[int, int]] = {**report.chat.kinds, "all": (report.chat.right, report.chat.total)}
        for kind, (right, total) in kinds.items():
            table.add_row(kind, str(right), str(total))
        shown.append(table)
    return shown


def _table(first: str, *rest: str) -> Table:
    table = Table()
    table.add_column(first, overflow="fold")
    for name in rest:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def evaluate(options: argparse.Namespace) -> None:
    """Runs the command.

    Raises:
        ValueError, OSError: an input that cannot be used; the message is one sentence.
    """
    inputs = read_inputs(options)
    tokenizer = load_tokenizer(options.model)
    if inputs.questions:
        check_chat(tokenizer)
    dtype = getattr(torch, options.dtype)
    loaded = load_for_evaluation(options.model, options.mask, dtype, options.device, recovery=options.recovery)
    for warning in loaded.warnings:
        print(f"maskpro-eval: warning: {warning}", file=sys.stderr)
    report = measure(loaded, tokenizer, inputs, options)
    text = json.dumps(document(options, loaded, report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    console = Console(stderr=options.json == _STDOUT)  # standard output is the JSON's alone
    console.print(title(options, loaded), soft_wrap=True, markup=False, highlight=False)
    for table in tables(report):
        console.print(table)
    if options.json == _STDOUT:
        sys.stdout.write(text)
    elif options.json:
        write_atomically(Path(options.json), text.encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for an input that cannot be used, 130 after Ctrl-C."""
    options = parse_arguments(argv)
    quiet_transformers()
    try:
        evaluate(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"maskpro-eval: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
