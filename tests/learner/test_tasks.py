"""Zero-shot tasks: lm-eval is real, and its scores are compared with ones computed here."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from maskpro_learner import LearnerError
from maskpro_learner.checkpoints import load_model, load_tokenizer
from maskpro_learner.tasks import import_lm_eval, read_task_file, run_tasks

CHOICES = ["a cat", "the green hills", "one red bird", "rain"]


def arc_row(question: str = "the cat sat on", key: str = "B", **changes: Any) -> dict[str, Any]:
    choices = {"text": CHOICES, "label": ["A", "B", "C", "D"]}
    return {"id": "x", "question": question, "choices": choices, "answerKey": key} | changes


def openbook_row(stem: str = "one red bird", key: str = " D") -> dict[str, Any]:
    row = arc_row(key=key)
    return {"question_stem": stem, "choices": row["choices"], "answerKey": key}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_files_are_read_by_their_fields(tmp_path: Path) -> None:
    arc = read_task_file(write(tmp_path / "arc.jsonl", arc_row(), arc_row(extra=1)))
    assert (arc.format, len(arc.rows)) == ("arc", 2)
    assert arc.rows[0].keys() == {"question", "choices", "answerKey"}
    openbook = read_task_file(write(tmp_path / "openbook.jsonl", openbook_row()))
    assert (openbook.format, openbook.rows[0]["answerKey"]) == ("openbookqa", "D")


def test_real_files(test_data: Path) -> None:
    arc = read_task_file(test_data / "eval" / "arc_easy.validation.jsonl")
    openbook = read_task_file(test_data / "eval" / "openbookqa.validation.jsonl")
    assert (arc.format, len(arc.rows), openbook.format, len(openbook.rows)) == ("arc", 570, "openbookqa", 500)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected multiple-choice rows, found none"),
        ("{", "line 1: not JSON"),
        ("[1]", "line 1: expected question or question_stem.*found a list"),
        ('{"question": "a", "choices": ["b", "c"], "answerKey": "A"}', r"found the fields \['answerKey', 'choices', "),
        (json.dumps(arc_row(key="E")), r"answerKey: expected one of the labels \['A', 'B', 'C', 'D'\], found 'E'"),
        (json.dumps(arc_row(choices={"text": ["a", "b"], "label": ["A"]})), "found 2 texts and 1 labels"),
        (json.dumps(arc_row(choices={"text": ["a", " "], "label": ["A", "B"]})), "line 1: expected question or"),
        (
            f"{json.dumps(arc_row())}\n\n{json.dumps(openbook_row())}",
            "line 3: expected a row of arc as before, found o",
        ),
    ],
)
def test_bad_files_are_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(LearnerError, match=message) as raised:
        read_task_file(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)
    with pytest.raises(LearnerError, match="no such task file"):
        read_task_file(tmp_path / "absent.jsonl")


def test_without_lm_eval_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LearnerError, match=r"pip install maskpro-serve\[eval\]"):
        import_lm_eval()


lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is optional: pip install maskpro-serve[eval]")


def accuracies(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], keys: list[int]
) -> tuple[float, float]:
    """acc and acc_norm by their definition: log-likelihood of " answer", whole, and per character of the answer."""
    whole = normalised = 0
    for prompt, key in zip(prompts, keys, strict=True):
        scores = []
        context = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        for choice in CHOICES:
            ids = tokenizer(f"{prompt} {choice}", add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(context), len(ids))))
        lengths = torch.tensor([len(choice) for choice in CHOICES])
        whole += int(torch.tensor(scores).argmax()) == key
        normalised += int((torch.tensor(scores) / lengths).argmax()) == key
    return whole / len(prompts), normalised / len(prompts)


def test_scores_are_the_definition(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_model()
    questions = ["the cat sat on", "one red bird", "a mat and saw", "over green hills while rain", "old stones", "the"]
    keys = [i % 4 for i in range(len(questions))]
    arc = read_task_file(
        write(tmp_path / "a.jsonl", *(arc_row(q, "ABCD"[key]) for q, key in zip(questions, keys, strict=True)))
    )
    openbook = read_task_file(
        write(tmp_path / "o.jsonl", *(openbook_row(q, "ABCD"[key]) for q, key in zip(questions, keys, strict=True)))
    )
    scores = run_tasks(model, tokenizer, [arc, openbook], batch=3)
    assert [(score.task, score.prompt, score.rows) for score in scores] == [("a", "arc", 6), ("o", "openbookqa", 6)]
    prompts = ([f"Question: {question}\nAnswer:" for question in questions], questions)
    for score, texts in zip(scores, prompts, strict=True):
        acc, acc_norm = accuracies(model, tokenizer, texts, keys)
        assert score.metrics == pytest.approx({"acc": acc, "acc_norm": acc_norm})
        for name, value in score.metrics.items():  # of a mean of zeros and ones
            assert score.stderr[name] == pytest.approx((value * (1 - value) / 5) ** 0.5)
    assert run_tasks(model, tokenizer, [arc], batch=1)[0] == scores[0]
    assert run_tasks(model, tokenizer, [arc], limit=2)[0].rows == 2
    assert tokenizer.pad_token is None  # lm-eval sets one, on its own copy


def test_the_prompts_are_those_of_lm_eval_s_own_tasks(tmp_path: Path) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    from maskpro_learner.tasks import _file_task

    folder = Path(lm_eval.__file__).parent / "tasks"
    files = {"arc/arc_easy.yaml": arc_row(), "openbookqa/openbookqa.yaml": openbook_row(key="D")}
    for name, row in files.items():
        theirs = load_yaml(folder / name)
        ours = _file_task(import_lm_eval(), read_task_file(write(tmp_path / "t.jsonl", row)))
        for key in ("output_type", "doc_to_text", "doc_to_choice", "metric_list"):
            assert ours.config.to_dict()[key] == theirs[key]
        assert ours.doc_to_target(row) == "ABCD".index(row["answerKey"])
        assert ours.config.target_delimiter == " "


def test_a_real_model_offline(test_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("a local file needs no network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    folder = str(test_data / "stories260K")
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    (score,) = run_tasks(
        model, tokenizer, [read_task_file(test_data / "eval" / "arc_easy.validation.jsonl")], limit=40, batch=16
    )
    assert score.rows == 40
    assert 0.05 < score.metrics["acc"] < 0.6


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval's index, holding two tasks of a local file and their group instead of its ten thousand."""
    rows = write(tmp_path / "rows.jsonl", *(arc_row(key=key) for key in "ABBBCD"))
    for name in ("first", "second"):
        config = {
            "task": name, "dataset_path": "json", "test_split": "train", "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": str(rows), "cache_dir": str(tmp_path / "cache")},
            "doc_to_text": "question", "doc_to_target": "{{choices.label.index(answerKey)}}",
            "doc_to_choice": "{{choices.text}}", "metric_list": [{"metric": "acc"}],
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config))
    group = {"group": "both", "task": ["first", "second"], "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "both.yaml").write_text(json.dumps(group))
    index = lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(import_lm_eval().tasks, "TaskManager", lambda **_: index)


@pytest.mark.usefixtures("own_tasks")
def test_tasks_by_name(tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_model()
    (first,) = run_tasks(model, tokenizer, ["first"])
    assert (first.task, first.prompt, first.rows) == ("first", "lm-eval", 6)
    acc, _ = accuracies(model, tokenizer, ["the cat sat on"] * 6, [0, 1, 1, 1, 2, 3])
    assert first.metrics == pytest.approx({"acc": acc})
    scores = {score.task: score for score in run_tasks(model, tokenizer, ["both"], limit=4)}
    assert {name: score.rows for name, score in scores.items()} == {"first": 4, "second": 4, "both": 8}
    with pytest.raises(LearnerError, match=r"--tasks frist: expected .* lm-eval task; did you mean first\?"):
        run_tasks(model, tokenizer, ["frist"])


@pytest.mark.usefixtures("own_tasks")
def test_a_task_whose_data_cannot_be_had(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub\n(offline)")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(LearnerError, match=r"--tasks first: .*its data from the hub: Couldn't reach .* \(offline\)"):
        run_tasks(tiny_model(), tokenizer, ["first"])
