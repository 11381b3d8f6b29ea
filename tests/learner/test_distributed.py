"""Learning in several processes, started by torchrun on gloo: the masks of a single one, and stops that all obey.

For what must be seen in every process, this file is the program that torchrun starts.
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from maskpro_kernels import NMPattern
from maskpro_kernels.packing import magnitude_mask
from maskpro_learner import LearnConfig, LearnerError, learn_masks, select_layers
from maskpro_learner.cli import main
from maskpro_learner.distributed import ALONE, World, join, leave
from maskpro_learner.learning_log import read_log
from maskpro_learner.trainer import Step

PATTERN = NMPattern(2, 4)
# Minibatches of 5 blocks are 2 and 3 for two processes.
CONFIGS = {
    name: LearnConfig(PATTERN, 6, name, minibatch=5, batch=2, learning_rate=rate, initial_logit=2.0, draws=draws)
    for name, rate, draws in (("smoothed", 200.0, None), ("leave-one-out", 200.0, 3), ("first-order", 0.5, 4))
}
CONFIGS["margin"] = dataclasses.replace(CONFIGS["smoothed"], start="margin")


def learn_everything(world: World) -> dict[str, Any]:
    """Masks and steps of every configuration, from a model of a fixed seed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train(False).requires_grad_(False)
    tokens = torch.randint(0, 64, (9, 16))
    linears = select_layers(model, PATTERN).linears
    masks = {f"{name}.weight": magnitude_mask(linear.weight, PATTERN) for name, linear in linears.items()}
    if not world.is_first:  # what another machine might have made of it
        masks = {name: torch.roll(mask, 4, dims=1) for name, mask in masks.items()}
    found = {}
    for name, settings in CONFIGS.items():
        steps: list[tuple[Any, ...]] = []
        learned = learn_masks(
            model, tokens, masks, settings, world=world,
            on_step=lambda s, steps=steps: steps.append((s.step, s.loss, s.residual, s.tracker, s.flips)),
        )  # fmt: skip
        found[name] = {"masks": dict(learned), "steps": steps}  # torch.load knows dicts
    return found


def torchrun(*arguments: str, processes: int = 2) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *launch, *arguments]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes that torchrun starts: sums depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(600)
def test_two_processes_learn_the_masks_of_one(tmp_path: Path, one_thread: None) -> None:
    done = subprocess.run(torchrun(__file__, str(tmp_path)), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    single = learn_everything(ALONE)
    for name in CONFIGS:
        first, second = (rank[name] for rank in ranks)
        assert first["steps"] == second["steps"]  # to the bit: losses, tracker, flips
        assert len(first["steps"]) == 6
        for key, mask in first["masks"].items():
            assert torch.equal(mask, second["masks"][key])
        changed = total = 0
        for key, mask in single[name]["masks"].items():
            changed += int((mask != first["masks"][key]).sum())
            total += mask.numel()
        if name == "first-order":
            # Two processes add their gradients in another order: a near-tie may fall the other way.
            assert changed <= 0.01 * total
            losses = [[step[1] for step in run["steps"]] for run in (first, single[name])]
            assert losses[0] == pytest.approx(losses[1], abs=1e-3)
            assert losses[0][0] == losses[1][0]  # before any update
        else:
            assert changed == 0
            assert first["steps"] == single[name]["steps"]


@pytest.fixture
def arguments(model_folder: Path, text_file: Path, tmp_path: Path) -> list[str]:
    """A batch of each of two processes' size: a block's bits may depend on what is computed beside it."""
    return [
        "--model", str(model_folder), "--init", "magnitude", "--calibration", str(text_file), "--samples", "6",
        "--length", "16", "--seed", "1", "--device", "cpu", "--minibatch", "4", "--batch", "2",
        "--learning-rate", "200", "--initial-logit", "2", "--steps", "400", "--checkpoint-minutes", "0",
        "--estimator", "smoothed",
    ]  # fmt: skip


def run_until(command: list[str], log: Path, at_step: int, number: signal.Signals, rank: int) -> tuple[int, str]:
    """Starts torchrun, sends a signal to the process of one rank once ``at_step`` is in the log; exit code, stderr."""
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        deadline = time.monotonic() + 240
        while not (log.exists() and log.read_text().count("\n") >= at_step):
            assert run.poll() is None, run.stderr.read() if run.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.005)
        workers = {p.environ().get("RANK"): p for p in psutil.Process(run.pid).children(recursive=True)}
        workers[str(rank)].send_signal(number)
        _, errors = run.communicate(timeout=120)
        return run.returncode, errors


@pytest.mark.timeout(900)
def test_a_signal_to_any_process_stops_all_and_all_go_on(arguments: list[str], tmp_path: Path) -> None:
    log, output = tmp_path / "mask.jsonl", tmp_path / "mask.safetensors"
    command = torchrun("-m", "maskpro_learner.cli", *arguments, "--output", str(output))

    code, errors = run_until(command, log, 20, signal.SIGKILL, rank=1)
    assert code != 0
    assert not output.exists()
    assert "another process of this run has ended" in errors

    code, errors = run_until(command, log, 60, signal.SIGTERM, rank=1)
    assert code != 0
    assert errors.count("stopped by SIGTERM; the same command goes on from") == 1  # the first process speaks for all
    stopped_at = read_log(log, Step)[-1].step
    assert 60 <= stopped_at < 400
    assert (tmp_path / "mask.checkpoint").exists()
    assert not output.exists()

    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("moved") == 1  # one table
    assert "flips" in done.stdout
    assert [step.step for step in read_log(log, Step)] == list(range(1, 401))
    assert not (tmp_path / "mask.checkpoint").exists()

    alone = tmp_path / "alone.safetensors"
    single = [sys.executable, "-m", "maskpro_learner.cli", *arguments, "--output", str(alone)]
    subprocess.run(single, env=ENVIRONMENT, check=True, capture_output=True)
    assert output.read_bytes() == alone.read_bytes()


def test_shares_are_even_and_cover_everything() -> None:
    for size in range(1, 6):
        for count in range(size, 20):
            shares = [World(rank, size).share(count) for rank in range(size)]
            assert [place for share in shares for place in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_single_process_exchanges_nothing() -> None:
    tensor = torch.ones(2)
    assert ALONE.summed(tensor) is tensor
    assert ALONE.from_first(tensor) is tensor
    assert ALONE.largest(15) == 15
    assert ALONE.gathered([1.0, 2.0], 2) == [1.0, 2.0]
    assert join() is ALONE
    leave(ALONE)


def test_a_minibatch_smaller_than_the_world_is_refused() -> None:
    with pytest.raises(LearnerError, match="at least one block for each of 6 processes, found 5"):
        learn_everything(World(0, 6))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "--device tpu: expected cpu, cuda or cuda:NUMBER"),
        ("meta", "--device meta: this machine and its PyTorch have no such device"),
        pytest.param(
            "cuda", "have no such device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
        ),
    ],
)
def test_devices_that_are_not_there(
    arguments: list[str], tmp_path: Path, device: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--output", str(tmp_path / "mask.safetensors"), "--device", device]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA GPUs")
@pytest.mark.timeout(600)
def test_two_gpus(arguments: list[str], tmp_path: Path) -> None:
    output = tmp_path / "mask.safetensors"
    flags = [*arguments, "--device", "cuda", "--estimator", "first-order", "--learning-rate", "0.5", "--steps", "5"]
    command = torchrun("-m", "maskpro_learner.cli", *flags, "--output", str(output))
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"5, [\d.]+ s each", done.stdout)


if __name__ == "__main__":
    here = join()
    torch.save(learn_everything(here), Path(sys.argv[1]) / f"rank{here.rank}.pt")
    leave(here)
