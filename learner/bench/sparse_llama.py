"""What the mask and the recovery of `sparse-llama` are worth, beside one-shot pruning of the same model.

    python learner/bench/sparse_llama.py --model DENSE --mask M.safetensors --recovery R.safetensors \
      --calibration c4.txt --text wikipedia.txt --tasks arc_easy.jsonl --json docs/results/sparse_llama.json

Rows: dense; magnitude, Wanda, SparseGPT (mask only, and with refit) and swap search, made here from the calibration
text; the given mask; the given mask and recovery. Columns: token and word perplexity of the text, zero-shot accuracy,
and answers right in the chat quiz. Every finished row is in the JSON file, with the hashes of what it was measured on:
where these differ, it is measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskpro_kernels import NMPattern
from maskpro_kernels.base_model import weights_sha256
from maskpro_kernels.files import file_sha256, write_atomically
from maskpro_learner import calibration_blocks, initial_masks, text_perplexity
from maskpro_learner.calibration import read_text, source_name
from maskpro_learner.chat_quiz import quiz, read_questions
from maskpro_learner.checkpoints import cast_weights, load_model, load_tokenizer
from maskpro_learner.packed_model import load_for_evaluation
from maskpro_learner.progress import quiet_transformers
from maskpro_learner.tasks import read_task_file, run_tasks

PATTERN = NMPattern(2, 4)
SAMPLES, LENGTH = 48, 512
ONE_SHOT_ROWS = ("Wanda", "swap", "SparseGPT", "SparseGPT and refit", "magnitude")
CHAT_ROWS = ("dense", "Wanda", "mask", "mask and recovery")


def prepared(row: str, options: argparse.Namespace, tokens: Tensor) -> PreTrainedModel:
    """The model of one row, its weights rounded to bfloat16 as they are served, computing in float32."""
    match row:
        case "dense":
            return load_model(options.model, torch.float32)
        case "mask":
            model = load_for_evaluation(options.model, options.mask, torch.bfloat16).model
            return cast_weights(model, torch.float32)
        case "mask and recovery":
            model = load_for_evaluation(options.model, options.mask, torch.bfloat16, recovery=options.recovery).model
            return cast_weights(model, torch.float32)
        case "SparseGPT and refit":
            model = load_model(options.model, torch.float32)
            initial_masks(model, PATTERN, "sparsegpt", tokens=tokens, refit=True)
        case _:
            model = load_model(options.model, torch.float32)
            initial_masks(model, PATTERN, row.lower(), tokens=tokens)  # type: ignore[arg-type]
    return cast_weights(cast_weights(model, torch.bfloat16), torch.float32)


def measured(
    row: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> dict[str, Any]:
    """One row's numbers."""
    begin = time.monotonic()
    text = text_perplexity(
        model, tokenizer, read_text(options.text), window=options.window, max_tokens=options.max_tokens
    )
    result: dict[str, Any] = {
        "token_perplexity": text.token_perplexity,
        "word_perplexity": text.word_perplexity,
        "tokens": text.tokens,
    }
    for score in run_tasks(
        model, tokenizer, [read_task_file(path) for path in options.tasks], limit=options.limit, batch=8
    ):
        result[score.task] = {"rows": score.rows, **score.metrics, "stderr": score.stderr}
    if row in CHAT_ROWS:
        found = quiz(model, tokenizer, read_questions())
        result["chat"] = {"right": found.right, "total": found.total}
    return {**result, "seconds": time.monotonic() - begin}


def inputs(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What each row's numbers are the numbers of."""
    dense = {
        "model": weights_sha256(options.model), "text": source_name(options.text), "max_tokens": options.max_tokens,
        "window": options.window, "tasks": [source_name(path) for path in options.tasks], "limit": options.limit,
    }  # fmt: skip
    masked = dense | {"mask": file_sha256(options.mask)}
    one_shot = dense | {"calibration": [source_name(path) for path in options.calibration]}
    return {
        "dense": dense, "mask and recovery": masked | {"recovery": file_sha256(options.recovery)}, "mask": masked,
    } | dict.fromkeys(ONE_SHOT_ROWS, one_shot)  # fmt: skip


def table(rows: dict[str, dict[str, Any]]) -> Table:
    """All rows measured so far."""
    found = Table("", "token perplexity", "word perplexity", "tasks: acc (acc_norm)", "chat")
    for name, row in rows.items():
        tasks = ", ".join(
            f"{task} {value['acc']:.3f} ({value['acc_norm']:.3f})" for task, value in row.items()
            if isinstance(value, dict) and "acc" in value
        )  # fmt: skip
        chat = f"{row['chat']['right']}/{row['chat']['total']}" if "chat" in row else ""
        found.add_row(name, f"{row['token_perplexity']:.1f}", f"{row['word_perplexity']:.1f}", tasks, chat)
    return found


def main() -> int:
    """Measures what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True, help="dense model folder")
    parser.add_argument("--mask", required=True, type=Path)
    parser.add_argument("--recovery", required=True, type=Path)
    parser.add_argument("--calibration", required=True, nargs="+", help="text for the one-shot rows")
    parser.add_argument("--text", required=True, type=Path, help="text of which perplexity is taken")
    parser.add_argument("--max-tokens", type=int, default=32_768, help="of the text (default 32768)")
    parser.add_argument("--window", type=int, default=1024, help="tokens of context at most (default 1024)")
    parser.add_argument("--tasks", nargs="+", type=Path, default=[], help="JSONL files of multiple choice")
    parser.add_argument("--limit", type=int, help="rows of every task")
    parser.add_argument("--rows", nargs="+", help="only these rows")
    parser.add_argument("--json", required=True, type=Path, help="results, which it goes on from")
    options = parser.parse_args()
    quiet_transformers()
    tokenizer = load_tokenizer(options.model)
    tokens = calibration_blocks(options.calibration, tokenizer, samples=SAMPLES, length=LENGTH, seed=0)
    document = json.loads(options.json.read_text()) if options.json.exists() else {"rows": {}}
    document |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "command": " ".join(sys.argv)}
    expected = inputs(options)
    for row, of in expected.items():
        known = document["rows"].get(row, {}).get("of") == of
        if not known and (not options.rows or row in options.rows):
            document["rows"][row] = {"of": of, **measured(row, prepared(row, options, tokens), tokenizer, options)}
            write_atomically(options.json, (json.dumps(document, indent=2) + "\n").encode())
            print(row, json.dumps(document["rows"][row]), flush=True)
    rows = document["rows"].items()
    found = {row: numbers for row, numbers in rows if numbers.get("of") == expected.get(row)}
    Console(width=120).print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
