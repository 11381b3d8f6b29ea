"""maskpro-eval on models on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from maskpro_kernels import NMPattern
from maskpro_learner import text_perplexity
from maskpro_learner.checkpoints import load_model, load_tokenizer
from maskpro_learner.eval_cli import main
from maskpro_serve import convert

PATTERN = NMPattern.parse("2:4")


@pytest.fixture
def arguments(model_folder: Path, text_file: Path) -> list[str]:
    return ["--model", str(model_folder), "--text", str(text_file), "--device", "cpu", "--window", "32"]


def run(arguments: list[str], output: Path) -> dict[str, Any]:
    assert main([*arguments, "--json", str(output)]) == 0
    return json.loads(output.read_text())


def test_perplexity_is_labelled(
    arguments: list[str], model_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(arguments, tmp_path / "report.json")
    expected = text_perplexity(
        load_model(str(model_folder), torch.float32),
        load_tokenizer(str(model_folder)),
        text_file.read_text(),
        window=32,
    )
    (text,) = report["text"]
    assert text == {
        "file": str(text_file),
        "token_perplexity": pytest.approx(expected.token_perplexity),
        "word_perplexity": pytest.approx(expected.word_perplexity),
        "loss_nats": pytest.approx(expected.loss),
        "tokens": expected.tokens,
        "words": expected.words,
        "window": 32,
    }
    assert report["model"] == {
        "name": str(model_folder), "kind": "dense", "mask": None, "recovery": None, "pattern": None,
        "provenance": {}, "warnings": [],
    }  # fmt: skip
    assert (report["tasks"], report["chat"]) == ([], None)
    assert report["settings"]["dtype"] == "float32"
    assert report["versions"]["torch"] == torch.__version__
    out = capsys.readouterr().out
    for label in ("token perplexity", "word perplexity", "window", f"{expected.token_perplexity:.4g}"):
        assert label in out


def test_a_mask_and_the_packed_checkpoint_give_the_same_numbers(
    arguments: list[str], model_folder: Path, mask_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = run(arguments, tmp_path / "dense.json")
    masked = run([*arguments, "--mask", str(mask_file)], tmp_path / "masked.json")
    convert(model_folder, tmp_path / "packed", mask=mask_file)
    packed = run([*arguments, "--model", str(tmp_path / "packed")], tmp_path / "packed.json")
    assert masked["text"] == packed["text"] != dense["text"]
    assert masked["model"] == {
        "name": str(model_folder), "kind": "masked", "mask": str(mask_file), "recovery": None, "pattern": "2:4",
        "provenance": {"method": "random"}, "warnings": [],
    }  # fmt: skip
    assert (packed["model"]["kind"], packed["model"]["pattern"]) == ("packed", "2:4")
    out = capsys.readouterr().out
    assert "masked 2:4, random" in out
    assert "packed 2:4, random" in out


def test_json_on_standard_output_is_all_there_is(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--max-tokens", "40", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["text"][0]["tokens"] == 40
    assert "token perplexity" in captured.err


def test_tasks_and_chat(
    arguments: list[str], tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], model_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    pytest.importorskip("lm_eval", reason="lm-eval is optional: pip install maskpro-serve[eval]")
    choices = {"text": ["a cat", "rain"], "label": ["A", "B"]}
    row = {"question": "the cat sat on", "choices": choices, "answerKey": "A"}
    tasks = tmp_path / "cats.jsonl"
    tasks.write_text("\n".join(json.dumps(row | {"answerKey": key}) for key in "ABA"))
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"question": "the cat", "kind": "cats", "accept": ["bird"]}))
    tiny_model(seed=1).save_pretrained(model_folder)  # one that answers: "a bird"
    report = run([*arguments, "--tasks", str(tasks), "--chat", str(questions), "--limit", "2"], tmp_path / "r.json")
    (task,) = report["tasks"]
    assert (task["task"], task["prompt"], task["rows"]) == ("cats", "arc", 2)
    assert task["metrics"]["acc"] == {"value": 0.5, "stderr": 0.5}
    assert task["metrics"].keys() == {"acc", "acc_norm"}
    assert report["chat"] == {
        "right": 1, "total": 1, "kinds": {"cats": {"right": 1, "total": 1}},
        "answers": [{"question": "the cat", "kind": "cats", "answer": "a bird", "right": True}],
    }  # fmt: skip
    out = capsys.readouterr().out
    assert "acc_norm" in out
    assert "chat questions" in out


def test_the_shipped_questions_are_asked_without_a_value(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maskpro_learner.chat_quiz.answer", lambda writer, prompts, **_: ["No."] * len(prompts))
    report = run([*arguments[:2], *arguments[4:], "--chat"], tmp_path / "r.json")
    assert (report["chat"]["right"], report["chat"]["total"]) == (1, 40)  # the opposite of "yes"
    assert report["text"] == []


def test_the_window_is_no_longer_than_the_context(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run(arguments[:-2], tmp_path / "r.json")
    assert report["text"][0]["window"] == 128
    assert main([*arguments, "--window", "129"]) == 2
    assert "--window 129: expected at most the model's context of 128 tokens" in capsys.readouterr().err


def test_numbers_that_json_does_not_have(arguments: list[str], model_folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    model.save_pretrained(model_folder)
    (text,) = run(arguments, tmp_path / "r.json")["text"]
    assert text["token_perplexity"] is text["word_perplexity"] is text["loss_nats"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "nowhere"], "nowhere: no such model folder"),
        (["--model", "{tmp}"], "expected a Hugging Face model folder, found no config.json"),
        (["--mask", "{tmp}/absent.safetensors"], "no such mask file"),
        (["--mask", "{tmp}/calibration.txt"], "not a readable safetensors file"),
        (["--text", "{tmp}/absent.txt"], "no such text file"),
        (["--text", "{tmp}/empty.txt"], "expected text, found an empty file"),
        (["--tasks", "{tmp}/absent.jsonl"], "no such task file"),
        (["--tasks", "{tmp}/calibration.txt"], "line 1: not JSON"),
        (["--chat", "{tmp}/absent.jsonl"], "no such file of questions"),
        (["--json", "{tmp}/no/report.json"], "its folder does not exist"),
        (["--batch", "0"], "--batch: expected at least 1, found 0"),
        (["--max-tokens", "0"], "--max-tokens: expected at least 1, found 0"),
        (["--device", "cuda:99"], "--device cuda:99: "),
        (["--device", "toaster"], "--device toaster: "),
    ],
)
def test_bad_inputs_end_with_one_sentence_and_code_2(
    arguments: list[str], tmp_path: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    assert main([*arguments, *(part.replace("{tmp}", str(tmp_path)) for part in change)]) == 2
    captured = capsys.readouterr()
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("maskpro-eval: error: ")
    assert message in line
    assert captured.out == ""


def test_what_the_model_cannot_do_is_said_before_it_is_loaded(
    arguments: list[str], model_folder: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments[:2]) == 2
    assert "nothing to measure: give --text FILE, --tasks FILE.jsonl or --chat" in capsys.readouterr().err
    tokenizer.chat_template = None
    (model_folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(model_folder)
    (model_folder / "model.safetensors").write_bytes(b"broken")
    assert main([*arguments, "--chat"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_a_tokenizer_of_another_model(
    arguments: list[str], model_folder: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.add_tokens([f"more{i}" for i in range(64)])
    tokenizer.save_pretrained(model_folder)
    text = model_folder / "text.txt"
    text.write_text("the cat more63")
    assert main([*arguments, "--text", str(text)]) == 2
    assert "the tokenizer makes ids that the model's embedding does not have" in capsys.readouterr().err


def test_the_command_runs_on_a_real_model(test_data: Path, tmp_path: Path) -> None:
    text = test_data / "text" / "tinystories.txt"
    command = [sys.executable, "-m", "maskpro_learner.eval_cli", "--model", str(test_data / "stories260K")]
    flags = ["--text", str(text), "--max-tokens", "2000", "--batch", "3", "--json", "--device", "cpu"]
    done = subprocess.run([*command, *flags], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300)
    (result,) = json.loads(done.stdout)["text"]
    assert result["tokens"] == 2000
    assert 2 < result["token_perplexity"] < 8 < result["word_perplexity"]
