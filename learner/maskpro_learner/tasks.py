"""Zero-shot tasks through EleutherAI's lm-eval harness: its own tasks by name, or multiple-choice rows in a file.

A file needs no network. Its rows are those of ARC (``question``, ``choices``, ``answerKey``) or OpenBookQA
(``question_stem``, ...), and the prompts are what lm-eval's ``arc_easy`` and ``openbookqa`` make of them, so the
numbers compare with published ones.
"""

from __future__ import annotations

import copy
import difflib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskpro_learner.errors import LearnerError

_TEXT = {"arc": "Question: {{question}}\nAnswer:", "openbookqa": "question_stem"}
"""Format of a file to its prompt, as in lm-eval's arc_easy.yaml and openbookqa.yaml (a test compares them)."""
_QUESTION = {"question": "arc", "question_stem": "openbookqa"}


@dataclass(frozen=True)
class TaskFile:
    """A JSONL file of multiple-choice rows, read and checked.

    Attributes:
        path: the file.
        format: ``arc`` or ``openbookqa``; decides the prompt.
        rows: with the fields of that format, and nothing else.
    """

    path: Path
    format: str
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class TaskScore:
    """What one task measured.

    Attributes:
        task: lm-eval's name, or the file's without its ending.
        prompt: ``arc`` or ``openbookqa`` for a file, ``lm-eval`` for a task of its own.
        rows: questions asked.
        metrics: metric (``acc``, ``acc_norm``, ...) to its value.
        stderr: metric to its standard error, where lm-eval gives one.
    """

    task: str
    prompt: str
    rows: int
    metrics: dict[str, float]
    stderr: dict[str, float]


def read_task_file(path: Path) -> TaskFile:
    """Reads and checks a file of multiple-choice rows; the first row decides the format.

    Raises:
        LearnerError: missing, empty or malformed; names the file and line, expected and found.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError as error:
        raise LearnerError(f"{path}: no such task file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LearnerError(f"{path}: expected a UTF-8 task file: {error}") from error
    file_format, rows = "", []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise LearnerError(f"{path}: line {number}: not JSON: {error}") from error
        found, clean = _row(row, f"{path}: line {number}")
        if file_format not in ("", found):
            raise LearnerError(f"{path}: line {number}: expected a row of {file_format} as before, found {found}")
        file_format = found
        rows.append(clean)
    if not rows:
        raise LearnerError(f"{path}: expected multiple-choice rows, found none")
    return TaskFile(path, file_format, rows)


def _row(row: Any, where: str) -> tuple[str, dict[str, Any]]:
    """The row's format, and its fields."""
    match row:
        case {"choices": {"text": [_, *_] as texts, "label": [_, *_] as labels}, "answerKey": str(key)}:
            field = next((name for name in _QUESTION if isinstance(row.get(name), str)), None)
            if field is not None and all(isinstance(text, str) and text.strip() for text in texts):
                if len(texts) != len(labels) or len(texts) < 2:
                    raise LearnerError(
                        f"{where}: expected two or more choices, each with a label, found {len(texts)} texts and "
                        f"{len(labels)} labels"
                    )
                key = key.strip()  # OpenBookQA has some with a space before
                if labels.count(key) != 1:
                    raise LearnerError(f"{where}: answerKey: expected one of the labels {labels}, found {key!r}")
                choices = {"text": texts, "label": labels}
                return _QUESTION[field], {field: row[field], "choices": choices, "answerKey": key}
    found = f"the fields {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
    raise LearnerError(
        f"{where}: expected question or question_stem, choices (text and label, lists) and answerKey, found {found}"
    )


def import_lm_eval() -> ModuleType:
    """lm-eval, which is optional and slow to import.

    Raises:
        LearnerError: it is not installed; says how to.
    """
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise LearnerError(
            f"--tasks needs lm-eval: pip install maskpro-serve[eval] (the import failed with: {error})"
        ) from error
    # It warns of every choice that is meant here: a model already loaded, no chat template.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[TaskFile | str],
    *,
    limit: int | None = None,
    batch: int = 1,
    seed: int = 0,
) -> list[TaskScore]:
    """Runs tasks zero-shot, without a chat template.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        tasks: files, and names of lm-eval's tasks, groups or tags, whose data it fetches from the Hugging Face hub.
        limit: only the first rows of every task.
        batch: answers scored at once; speed and memory only.
        seed: lm-eval sets the global generators of python, numpy and torch to it.

    Raises:
        LearnerError: lm-eval is not installed, knows no such task, or cannot get its data.
    """
    lm_eval = import_lm_eval()
    # The copy: lm-eval gives a tokenizer without a padding token one.
    wrapped = lm_eval.models.huggingface.HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch)
    names = [task for task in tasks if isinstance(task, str)]
    manager = _named_tasks(lm_eval, names) if names else lm_eval.tasks.TaskManager(include_defaults=False)
    scores = []
    for task in tasks:
        spec = task if isinstance(task, str) else _file_task(lm_eval, task)
        results = _evaluate(lm_eval, wrapped, spec, manager, limit=limit, batch=batch, seed=seed)
        prompt = "lm-eval" if isinstance(task, str) else task.format
        scores += [_score(name, prompt, values, _rows(results, name)) for name, values in results["results"].items()]
    return scores


def _named_tasks(lm_eval: ModuleType, names: Sequence[str]) -> Any:
    """lm-eval's index of its own tasks; it takes a while to read."""
    manager = lm_eval.tasks.TaskManager()
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise LearnerError(f"--tasks {name}: expected a .jsonl file or the name of an lm-eval task{hint}")
    return manager


def _file_task(lm_eval: ModuleType, file: TaskFile) -> Any:
    """A task of lm-eval with the file's rows: arc_easy's or openbookqa's definition, but for where the data is."""
    import datasets

    rows = datasets.Dataset.from_list(file.rows)
    return lm_eval.api.task.ConfigurableTask(
        config={
            "task": file.path.stem,
            "custom_dataset": lambda **_: {"test": rows},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": _TEXT[file.format],
            "doc_to_target": "{{choices.label.index(answerKey)}}",
            "doc_to_choice": "{{choices.text}}",
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
            ],
        }
    )


def _evaluate(
    lm_eval: ModuleType, wrapped: Any, spec: Any, manager: Any, *, limit: int | None, batch: int, seed: int
) -> dict[str, Any]:
    try:
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model=wrapped, tasks=[spec], num_fewshot=0, limit=limit, batch_size=batch, task_manager=manager,
            log_samples=False, random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            fewshot_random_seed=seed,
        )  # fmt: skip
    except Exception as error:
        if not isinstance(spec, str):
            raise
        # A task by name fails in as many ways as there are datasets and networks; none of them is ours.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LearnerError(f"--tasks {spec}: lm-eval cannot run it, or get its data from the hub: {reason}") from error
    return results


def _rows(results: dict[str, Any], name: str) -> int:
    """Questions asked in a task, or in all tasks of a group."""
    if name in results["n-samples"]:
        return int(results["n-samples"][name]["effective"])
    return sum(_rows(results, child) for child in results["group_subtasks"].get(name, ()) if child != name)


def _score(name: str, prompt: str, values: dict[str, Any], rows: int) -> TaskScore:
    """lm-eval's ``acc,none`` and ``acc_stderr,none`` as plain names; a metric under two filters keeps its filter."""
    numbers = {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float) and not math.isnan(value)
    }
    stderr = {key.replace("_stderr", ""): value for key, value in numbers.items() if "_stderr" in key}
    metrics = {key: value for key, value in numbers.items() if "_stderr" not in key}
    return TaskScore(name, prompt, rows, metrics, stderr)
