"""maskpro-learn on a tiny model on disk."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from maskpro_kernels import NMPattern, read_masks, write_masks
from maskpro_kernels.packing import magnitude_mask
from maskpro_learner.cli import main
from maskpro_learner.learning_log import read_log
from maskpro_learner.trainer import Step


@pytest.fixture
def arguments(model_folder: Path, text_file: Path, tmp_path: Path) -> list[str]:
    return [
        "--model", str(model_folder), "--pattern", "2:4", "--calibration", str(text_file), "--samples", "4",
        "--length", "16", "--seed", "1", "--output", str(tmp_path / "mask.safetensors"), "--device", "cpu",
    ]  # fmt: skip


def test_blocks_longer_than_the_models_context(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--init", "wanda", "--samples", "1", "--length", "129"]) == 2
    assert "--length: the model's context has 128 tokens, found blocks of 129" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "swap", "random"])
def test_one_shot_masks(
    arguments: list[str], model_folder: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--init", method, "--encoding", "states"]) == 0
    file = read_masks(tmp_path / "mask.safetensors")
    assert str(file.pattern) == "2:4"
    assert len(file.masks) == 14
    weights = model_folder / "model.safetensors"
    assert (
        file.provenance.items()
        >= {
            "base_model": "tiny-llama",
            "base_model_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            "method": method,
            "seed": "1",
            "steps": "0",
        }.items()
    )
    calibrated = method not in ("magnitude", "random")
    assert file.provenance.get("calibration", "").startswith("calibration.txt sha256:") == calibrated
    assert str(tmp_path) not in str(file.provenance)
    if method == "magnitude":
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        name = "model.layers.1.mlp.up_proj.weight"
        assert torch.equal(file.masks[name], magnitude_mask(model.get_parameter(name), NMPattern.parse("2:4")))
    assert main([*arguments, "--init", method, "--encoding", "states"]) == 0
    again = read_masks(tmp_path / "mask.safetensors")
    assert again.provenance == file.provenance
    assert all(torch.equal(again.masks[name], mask) for name, mask in file.masks.items())
    assert "14 layers" in capsys.readouterr().out


def test_a_mask_file_of_other_weights_stays_one(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--init", "magnitude"]) == 0
    source, output = tmp_path / "made.safetensors", tmp_path / "mask.safetensors"
    own = read_masks(output)
    capsys.readouterr()
    said = {"base_model": "twin", "base_model_sha256": "0" * 64, "seed": "1"}
    write_masks(source, own.masks, own.pattern, provenance=said)
    assert main([*arguments, "--init", str(source)]) == 0
    assert "was made for weights of another hash (twin)" in capsys.readouterr().err
    found = read_masks(output).provenance
    assert found["base_model_sha256"] == own.provenance["base_model_sha256"]
    assert {key: value for key, value in found.items() if key.startswith("init_base")} == {
        "init_base_model": "twin", "init_base_model_sha256": "0" * 64,
    }  # fmt: skip
    assert "init_seed" not in found  # which is said already
    output.rename(source)
    assert main([*arguments, "--init", str(source)]) == 0
    assert "another hash" not in capsys.readouterr().err


def test_a_mask_file_goes_through(arguments: list[str], tmp_path: Path) -> None:
    assert main([*arguments, "--init", "random"]) == 0
    first = tmp_path / "first.safetensors"
    (tmp_path / "mask.safetensors").rename(first)
    assert main([*arguments, "--init", str(first), "--encoding", "states"]) == 0
    before, after = read_masks(first).masks, read_masks(tmp_path / "mask.safetensors").masks
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_layers_left_dense_are_in_the_table(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments, "--init", "magnitude", "--exclude", "*.down_proj"]) == 0
    assert len(read_masks(tmp_path / "mask.safetensors").masks) == 12
    assert "2 layers: excluded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model", "nowhere"], "nowhere: no such model folder"),
        (["--model", "{tmp}"], "expected a Hugging Face model folder, found no config.json"),
        (["--pattern", "two:four"], "unknown sparsity pattern 'two:four': expected N:M"),
        (["--pattern", "3:5"], "m must be one of"),
        (["--pattern", "2:8", "--encoding", "states"], "states is for groups of 4"),
        (["--init", "obc"], "--init obc: expected one of magnitude, wanda"),
        (["--init", "{tmp}/calibration.txt"], "not a readable safetensors file"),
        (["--calibration", "{tmp}/absent.txt"], "no such text file"),
        (["--calibration", "{tmp}/empty.txt"], "expected text, found an empty file"),
        (["--samples", "5000"], "expected 80000 tokens (5000 samples of 16), found"),
        (["--samples", "0"], "at least one sample"),
        (["--output", "{tmp}/no/mask.safetensors"], "its folder does not exist"),
        (["--include", "nothing"], "no linear layer is left to prune"),
        (["--batch", "0"], "--batch: expected at least 1, found 0"),
        (["--seed", "-1"], "seed: expected a number from 0 to 8796093022207, found -1"),
        (["--seed", "20261201130000", "--steps", "2"], "seed: expected a number from 0 to 8796093022207"),
    ],
)
def test_bad_inputs_end_with_one_sentence_and_code_2(
    arguments: list[str], tmp_path: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    change = [part.replace("{tmp}", str(tmp_path)) for part in change]
    assert main([*arguments, "--init", "wanda", *change]) == 2
    captured = capsys.readouterr().err
    line = captured.strip().splitlines()[-1]
    assert line.startswith("maskpro-learn: error: ")
    assert message in line
    assert "Traceback" not in captured
    assert not (tmp_path / "mask.safetensors").exists()


def test_missing_tokenizer_and_missing_calibration(
    arguments: list[str], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = arguments.index("--calibration")
    assert main([*arguments[:at], *arguments[at + 2 :], "--init", "wanda"]) == 2
    assert "needs calibration text: give --calibration FILE" in capsys.readouterr().err
    (model_folder / "tokenizer.json").unlink()
    assert main([*arguments, "--init", "wanda"]) == 2
    assert "expected a tokenizer, found none of tokenizer.json" in capsys.readouterr().err
    assert main([*arguments, "--init", "magnitude"]) == 0  # needs none


def test_tensors_that_transformers_renames_are_refused(
    arguments: list[str], model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model_folder / "model.safetensors"
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})  # as a model without its head is saved: transformers reads it
    assert main([*arguments, "--init", "magnitude"]) == 2
    error = capsys.readouterr().err
    assert "expected tensors named as transformers does, model.layers.0.self_attn.q_proj.weight and so on" in error


def test_a_broken_checkpoint(arguments: list[str], model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model_folder / "model.safetensors").write_bytes(b"broken")
    assert main([*arguments, "--init", "magnitude"]) == 2
    assert "not a readable causal language model" in capsys.readouterr().err


def test_masks_of_another_model(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = NMPattern.parse("2:4")
    foreign = tmp_path / "foreign.safetensors"
    write_masks(foreign, {"model.layers.0.mlp.up_proj.weight": magnitude_mask(torch.ones((2, 8)), pattern)}, pattern)
    assert main([*arguments, "--init", str(foreign)]) == 2
    assert "expected a mask of shape" in capsys.readouterr().err
    assert main([*arguments, "--init", str(foreign), "--pattern", "1:4"]) == 2
    assert "expected masks of pattern 1:4, found 2:4" in capsys.readouterr().err


def test_unknown_flags_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main([*arguments, "--init", "wanda", "--epochs", "10"])
    assert raised.value.code == 2


LEARNING = ["--init", "magnitude", "--minibatch", "4", "--learning-rate", "200", "--initial-logit", "2"]


def test_learning_writes_mask_log_and_curve(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *LEARNING, "--steps", "6"]) == 0
    file = read_masks(tmp_path / "mask.safetensors")
    assert file.provenance["method"] == "maskpro from magnitude"
    assert file.provenance["steps"] == "6"
    assert [step.step for step in read_log(tmp_path / "mask.jsonl", Step)] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "mask.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "mask.checkpoint").exists()
    out = capsys.readouterr().out
    assert "residual" in out
    assert "kept weights" in out
    once = {name: mask.clone() for name, mask in file.masks.items()}
    assert main([*arguments, *LEARNING, "--steps", "6"]) == 0
    again = read_masks(tmp_path / "mask.safetensors")
    assert all(torch.equal(again.masks[name], mask) for name, mask in once.items())


STEPS = 200
"""So many that a run which is to be killed at the 20th is not over before it is."""


def kill_and_go_on(arguments: list[str], tmp_path: Path, number: signal.Signals, at_step: int) -> int:
    """Starts a run, sends the signal once the log has ``at_step`` lines, and returns its exit code."""
    flags = [*arguments, *LEARNING, "--steps", str(STEPS), "--checkpoint-minutes", "0"]
    log = tmp_path / "mask.jsonl"
    run = subprocess.Popen([sys.executable, "-m", "maskpro_learner.cli", *flags], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while run.poll() is None and time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) >= at_step:
            run.send_signal(number)
            break
        time.sleep(0.002)
    return run.wait(timeout=60)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_killed_run_goes_on_to_the_same_mask(arguments: list[str], tmp_path: Path, number: signal.Signals) -> None:
    code = kill_and_go_on(arguments, tmp_path, number, at_step=20)
    assert code == (143 if number == signal.SIGTERM else -9)
    assert (tmp_path / "mask.checkpoint").exists()
    assert not (tmp_path / "mask.safetensors").exists()
    flags = [*arguments, *LEARNING, "--steps", str(STEPS)]
    assert main(flags) == 0
    resumed = read_masks(tmp_path / "mask.safetensors").masks
    assert [step.step for step in read_log(tmp_path / "mask.jsonl", Step)] == list(range(1, STEPS + 1))
    assert main(flags) == 0  # from the start, unbroken
    whole = read_masks(tmp_path / "mask.safetensors").masks
    assert all(torch.equal(resumed[name], mask) for name, mask in whole.items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "3", "--pattern", "2:32"], "expected groups of"),
        (["--steps", "3", "--smoothing", "1"], "smoothing < 1"),
        (["--steps", "3", "--estimator", "leave-one-out", "--draws", "1"], "compares 2 to 16, found 1"),
        (["--draws", "4"], "--draws is for learning: give --steps"),
        (["--estimator", "first-order"], "--estimator is for learning: give --steps"),
    ],
)
def test_impossible_learning_is_one_sentence(
    arguments: list[str], flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--init", "magnitude", *flags]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert "\n" not in err


def test_nothing_that_is_read_is_written_over(
    arguments: list[str], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = tmp_path / "mask.jsonl"  # the name of the run's log
    chats.write_text(json.dumps({"text": text_file.read_text()}) + "\n")
    before = chats.read_bytes()
    flags = [*arguments, "--init", "magnitude", "--calibration", str(chats), "--steps", "2", "--minibatch", "2"]
    assert main(flags) == 2
    assert f"would write over {chats}, which is an input" in capsys.readouterr().err
    assert chats.read_bytes() == before
    mask = tmp_path / "mask.safetensors"
    assert main([*arguments, "--init", "magnitude"]) == 0
    assert main([*arguments, "--init", str(mask)]) == 2
    assert f"would write over {mask}, which is an input" in capsys.readouterr().err
    weights = Path(arguments[arguments.index("--model") + 1]) / "model.safetensors"
    assert main([*arguments, "--init", "magnitude", "--output", str(weights)]) == 2
    assert f"would write over {weights}, which is an input" in capsys.readouterr().err
    assert main([*arguments, "--init", "magnitude", "--output", str(tmp_path / "mask.checkpoint")]) == 2
    assert "expected a name ending in .safetensors, found 'mask.checkpoint'" in capsys.readouterr().err


def test_a_log_replaces_nothing_but_a_log(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*arguments, "--init", "magnitude", *LEARNING, "--steps", "2"]
    log = tmp_path / "mask.jsonl"
    log.write_text('{"text": "chats, an hour old"}\n')
    assert main(flags) == 2
    assert f"{log}: would be written over by the run's log, and is none" in capsys.readouterr().err
    assert log.read_text() == '{"text": "chats, an hour old"}\n'
    for left in ("", '{"st', '{"step": 1, "lo'):  # by a full disk
        log.write_text(left)
        assert main(flags) == 0
        assert len(log.read_text().splitlines()) == 2


def test_an_output_that_is_a_folder(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    (tmp_path / "mask.safetensors").mkdir()
    assert main([*arguments, "--init", "magnitude"]) == 2
    assert "expected the name of a file, found a folder" in capsys.readouterr().err


def test_learning_without_matplotlib_is_refused_before_it_begins(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*arguments, "--init", "magnitude", *LEARNING, "--steps", "2"]) == 2
    assert "pip install maskpro-serve[learn]" in capsys.readouterr().err
