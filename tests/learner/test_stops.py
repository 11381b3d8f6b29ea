"""Runs that end badly: killed at any moment, on a full disk, with inputs that cannot be used. Nothing is lost."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from maskpro_kernels import read_masks
from maskpro_learner import cli
from maskpro_learner.learning_log import LearningLog, read_log
from maskpro_learner.trainer import Step

KILLS = 10
MOST_STEPS = 25
"""Between two kills."""


@pytest.fixture
def run(model_folder: Path, text_file: Path) -> Callable[..., list[str]]:
    """Arguments of a learning run that writes a checkpoint after every step."""

    def arguments(output: Path, steps: int = 12, *more: str) -> list[str]:
        return [
            "--model", str(model_folder), "--init", "magnitude", "--calibration", str(text_file), "--samples", "6",
            "--length", "16", "--seed", "1", "--device", "cpu", "--minibatch", "2", "--initial-logit", "2",
            "--learning-rate", "200", "--checkpoint-minutes", "0", "--steps", str(steps), "--output", str(output),
            *more,
        ]  # fmt: skip

    return arguments


def last_line(captured: pytest.CaptureFixture[str]) -> str:
    text = captured.readouterr().err
    assert "Traceback" not in text
    return text.strip().splitlines()[-1]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("estimator", ["smoothed", "first-order"])
def test_ten_kills_at_random_moments_change_no_byte(
    run: Callable[..., list[str]], tmp_path: Path, estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes are forked from one that has imported everything, which takes most of a short run's time."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["maskpro_learner.cli", "matplotlib.figure", "transformers.models.llama"])
    steps = KILLS * MOST_STEPS + 10
    broken, whole = tmp_path / "broken.safetensors", tmp_path / "whole.safetensors"
    arguments = run(broken, steps, "--estimator", estimator)
    log = broken.with_suffix(".jsonl")
    for path in (broken, broken.with_suffix(".checkpoint")):
        (tmp_path / f".{path.name}.killed.tmp").write_bytes(b"a part")
    chance = random.Random(20260614)

    def lines() -> int:
        return log.read_bytes().count(b"\n") if log.exists() else 0

    for _ in range(KILLS):
        process = context.Process(target=cli.main, args=(arguments,))
        goal = lines() + chance.randrange(MOST_STEPS)
        process.start()
        while process.is_alive() and lines() < goal:
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.01))  # in the middle of a step, of a write, of what comes before the first one
        assert process.is_alive()
        process.kill()
        process.join()
        assert process.exitcode == -9
        assert not broken.exists()
    for output in (broken, whole):
        process = context.Process(target=cli.main, args=(run(output, steps, "--estimator", estimator),))
        process.start()
        process.join()
        assert output.exists()
        assert not output.with_suffix(".checkpoint").exists()
    assert not list(tmp_path.glob(".*.tmp"))  # what the killed ones were writing
    assert broken.read_bytes() == whole.read_bytes()
    first, second = read_log(log, Step), read_log(whole.with_suffix(".jsonl"), Step)
    assert [(s.step, s.loss, s.tracker, s.flips) for s in first] == [
        (s.step, s.loss, s.tracker, s.flips) for s in second
    ]
    assert [step.step for step in first] == list(range(1, steps + 1))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small file system: {error}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """A file that leaves so many bytes free."""
    ballast = folder / "ballast"
    status = os.statvfs(folder)
    ballast.write_bytes(bytes(status.f_bavail * status.f_frsize - leave))
    return ballast


def test_a_full_disk_leaves_the_last_checkpoint(
    run: Callable[..., list[str]], small_disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output, checkpoint = small_disk / "mask.safetensors", small_disk / "mask.checkpoint"
    ballast = fill(small_disk, leave=120_000)  # one checkpoint has 74 kB of logits; a second one does not fit
    assert cli.main(run(output)) == 2
    message = last_line(capfd)
    assert message.startswith(f"maskpro-learn: error: {checkpoint}: the checkpoint of step 2 cannot be written")
    assert "No space left on device" in message
    assert "the same command goes on from it" in message
    with safe_open(checkpoint, framework="pt") as file:
        assert file.metadata()["done"] == "1"
    assert sorted(path.name for path in small_disk.iterdir()) == ["ballast", "mask.checkpoint", "mask.jsonl"]
    ballast.unlink()
    assert cli.main(run(output)) == 0
    assert cli.main(run(tmp_path / "whole.safetensors")) == 0
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_disk_too_full_for_the_log(
    run: Callable[..., list[str]], small_disk: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ballast = fill(small_disk, leave=0)
    output = small_disk / "mask.safetensors"
    assert cli.main(run(output)) == 2
    assert "mask.jsonl: step 1 cannot be written (No space left on device)" in last_line(capfd)
    ballast.unlink()
    assert cli.main(run(output)) == 0


def test_until_the_mask_is_written_the_checkpoint_stays(
    run: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    output, checkpoint = tmp_path / "mask.safetensors", tmp_path / "mask.checkpoint"

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(cli, "write_masks", fail)
        assert cli.main(run(output)) == 2
    assert last_line(capfd) == f"maskpro-learn: error: {output}: [Errno 28] No space left on device"
    assert checkpoint.exists()
    before = (tmp_path / "mask.jsonl").read_text()
    assert cli.main(run(output)) == 0
    assert (tmp_path / "mask.jsonl").read_text() == before  # no step was done again
    assert not checkpoint.exists()
    assert cli.main(run(tmp_path / "whole.safetensors")) == 0
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_line_of_the_log_cut_short_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    for number in (1, 2):
        with LearningLog(path) as log:
            log.write(Step(number, 1.0, 0.0, 0.0, 0.1, 3.0))
        with path.open("a") as file:
            file.write('{"step": 9, "lo')
    assert [step.step for step in read_log(path, Step)] == [1, 2]


def test_a_loss_that_is_not_a_number_is_one_sentence(
    run: Callable[..., list[str]], model_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(model_folder / "model.safetensors")
    weights["lm_head.weight"] = torch.full_like(weights["lm_head.weight"], torch.nan)
    save_file(weights, model_folder / "model.safetensors", {"format": "pt"})
    assert cli.main(run(tmp_path / "mask.safetensors")) == 2
    assert last_line(capfd) == (
        "maskpro-learn: error: step 1: the loss is nan: lower --learning-rate, or --dtype float32"
    )
    assert not (tmp_path / "mask.safetensors").exists()


@pytest.fixture
def odd_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Llama whose hidden size is 24."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    folder = tmp_path / "odd"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_groups_that_do_not_divide(
    run: Callable[..., list[str]], odd_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mask.safetensors"
    assert cli.main([*run(output), "--model", str(odd_model), "--pattern", "4:16"]) == 2
    assert last_line(capfd) == (
        "maskpro-learn: error: LlamaForCausalLM: no linear layer is left to prune to 4:16 (14 stay dense)"
    )
    assert not output.exists()
    assert cli.main([*run(output), "--model", str(odd_model), "--pattern", "2:8"]) == 0
    assert len(read_masks(output).masks) == 14


def test_some_layers_do_not_divide(
    run: Callable[..., list[str]], odd_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They stay dense, and the table says why."""
    weights = load_file(odd_model / "model.safetensors")
    config = LlamaConfig.from_pretrained(odd_model)
    config.intermediate_size = 48
    for name, weight in weights.items():
        if "down_proj" in name:
            weights[name] = torch.cat([weight, weight[:, :8]], 1).contiguous()
        elif "gate_proj" in name or "up_proj" in name:
            weights[name] = torch.cat([weight, weight[:8]]).contiguous()
    save_file(weights, odd_model / "model.safetensors", {"format": "pt"})
    config.save_pretrained(odd_model)
    output = tmp_path / "mask.safetensors"
    assert cli.main([*run(output), "--model", str(odd_model), "--pattern", "4:16"]) == 0
    assert all("down_proj" in name for name in read_masks(output).masks)
    assert "12 layers: 16 does not divide in_features = 24" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        ("tokenizer", "expected a tokenizer, found none of tokenizer.json"),
        ("calibration", "expected text, found an empty file"),
        ("no calibration", "--steps needs calibration text: give --calibration FILE"),
    ],
)
def test_inputs_that_cannot_be_used(
    run: Callable[..., list[str]], model_folder: Path, text_file: Path, tmp_path: Path, breakage: str, message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = run(tmp_path / "mask.safetensors")
    if breakage == "tokenizer":
        (model_folder / "tokenizer.json").unlink()
    elif breakage == "calibration":
        text_file.write_text(" \n\n")
    else:
        at = arguments.index("--calibration")
        del arguments[at : at + 2]
    assert cli.main(arguments) == 2
    line = last_line(capfd)
    assert line.startswith("maskpro-learn: error: ")
    assert message in line
    assert not (tmp_path / "mask.safetensors").exists()
    assert not (tmp_path / "mask.jsonl").exists()
