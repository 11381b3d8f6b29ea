"""Refit and recovery: against exact solutions, on real text, and in runs that stop and go on."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from maskpro_kernels import NMPattern, read_recovery, write_masks
from maskpro_kernels.packing import magnitude_mask
from maskpro_learner import LearnerError, initial_masks, recover_cli
from maskpro_learner.checkpoints import cast_weights
from maskpro_learner.divergence import divergence
from maskpro_learner.recover_cli import main
from maskpro_learner.recovery import RecoverConfig, distill, reconstruct, relative_adam, set_learning_rate
from maskpro_learner.refit import damped, low_rank_refit, refit

PATTERN = NMPattern(2, 4)


@pytest.fixture(scope="module")
def layer():
    """A weight, the damped second moments of correlated inputs, and a mask."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 32, generator=generator, dtype=torch.float64)
    x = torch.randn(400, 32, generator=generator, dtype=torch.float64) @ torch.randn(
        32, 32, generator=generator, dtype=torch.float64
    )
    return weight, damped(x.T @ x), magnitude_mask(weight, PATTERN)


def error(weight, gram, found) -> float:
    difference = found - weight
    return float(((difference @ gram) * difference).sum())


def test_refit_is_the_least_squares_solution(layer):
    weight, gram, mask = layer
    found = refit(weight, gram, mask, iterations=60)
    assert not found[~mask].any()
    for row in range(len(weight)):
        kept = mask[row]
        exact = torch.linalg.solve(gram[kept][:, kept], (gram @ weight[row])[kept])
        assert torch.allclose(found[row, kept], exact, rtol=1e-8, atol=1e-10)


def test_refit_of_inputs_that_never_occur_is_finite():
    gram = torch.zeros(8, 8)
    found = refit(torch.ones(3, 8), damped(gram), magnitude_mask(torch.ones(3, 8), PATTERN))
    assert torch.isfinite(found).all()


def test_a_low_rank_refit_lies_between_the_mask_and_the_full_refit(layer):
    weight, gram, mask = layer
    weight, gram = weight.float(), gram.float()
    errors = [error(weight, gram, weight * mask)]
    for rank in (2, 6, 12):
        update = low_rank_refit(weight, gram, mask, rank)
        assert update.b.shape == (12, rank)
        errors.append(error(weight, gram, torch.where(mask, weight + update.b @ update.a, 0)))
    errors.append(error(weight, gram, refit(weight, gram, mask)))
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.9 * errors[0]
    assert errors[-2] < 1.05 * errors[-1]  # full rank: nothing is lost


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.15,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train(False).requires_grad_(False)
    tokens = torch.randint(0, 64, (24, 16))
    masks = initial_masks(copy.deepcopy(model), PATTERN, "magnitude").masks
    return model, tokens, masks


CONFIG = RecoverConfig(rank=4, block_steps=4, steps=12, minibatch=5, batch=3, learning_rate=0.05)


def recover(tiny, config=CONFIG, checkpoint=None, **arguments):
    model, tokens, masks = tiny
    resumed = checkpoint is not None and checkpoint.exists()
    updates = None if resumed else reconstruct(model, tokens, masks, PATTERN, config)
    return distill(
        model, copy.deepcopy(model), tokens, masks, PATTERN, updates, config, checkpoint=checkpoint, **arguments
    )


def test_training_a_block_brings_it_closer_to_the_dense_one(tiny):
    model, tokens, masks = tiny
    before = {name: p.clone() for name, p in model.named_parameters()}
    fits = []
    config = dataclasses.replace(CONFIG, block_steps=60)
    updates = reconstruct(model, tokens, masks, PATTERN, config, on_block=fits.append)
    assert updates.keys() == masks.keys()
    assert [fit.block for fit in fits] == [0, 1]
    assert all(fit.after < 0.9 * fit.before for fit in fits)
    untrained = []
    reconstruct(model, tokens, masks, PATTERN, dataclasses.replace(config, block_steps=0), on_block=untrained.append)
    assert untrained[0].before == untrained[0].after == fits[0].before
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_every_step_trains(tiny):
    config = dataclasses.replace(CONFIG, block_steps=0, steps=1)
    start, end = reconstruct(*tiny, PATTERN, config), recover(tiny, config)
    assert all(not torch.equal(end[name].b, start[name].b) for name in start)
    adam, rates = relative_adam([nn.Parameter(torch.ones(3))]), []
    for done in range(40):
        set_learning_rate(adam, 0.1, done, 40)
        rates.append(adam.param_groups[0]["lr"])
    assert 0 < rates[0] < rates[1] < rates[2]  # the warm-up
    assert rates[2] == pytest.approx(0.1, rel=0.02)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_distillation_comes_closer_to_the_dense_model_and_leaves_it_alone(tiny):
    before = {name: p.clone() for name, p in tiny[0].named_parameters()}
    steps = []
    updates = recover(tiny, dataclasses.replace(CONFIG, steps=60), on_step=steps.append)
    assert updates.keys() == tiny[2].keys()
    assert [step.step for step in steps] == list(range(1, 61))
    assert sum(s.divergence for s in steps[-10:]) < 0.8 * sum(s.divergence for s in steps[:10])
    after = dict(tiny[0].named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], p) for name, p in before.items())


@pytest.mark.parametrize("stops", [(1,), (3, 4), (5, 11)])
def test_a_stopped_run_goes_on_bit_for_bit(tiny, tmp_path, stops):
    whole = recover(tiny)
    checkpoint = tmp_path / "r.checkpoint"
    for stop in [*stops, None]:
        done = []
        result = recover(
            tiny, on_step=lambda step, done=done: done.append(step.step), checkpoint=checkpoint,
            stop=lambda done=done, stop=stop: bool(done) and done[-1] == stop,
        )  # fmt: skip
        assert checkpoint.exists()  # until the caller has written what it holds
    for name, update in whole.items():
        assert torch.equal(update.b, result[name].b)
        assert torch.equal(update.a, result[name].a)


def test_a_checkpoint_of_another_run_is_refused(tiny, tmp_path):
    checkpoint = tmp_path / "r.checkpoint"
    recover(tiny, checkpoint=checkpoint, stop=lambda: True)
    saved = checkpoint.read_bytes()
    with pytest.raises(LearnerError, match="a checkpoint of another run"):
        recover(tiny, dataclasses.replace(CONFIG, seed=1), checkpoint=checkpoint)
    with pytest.raises(LearnerError, match="a checkpoint of another run"):
        recover(tiny, checkpoint=checkpoint, origin="another mask")
    assert checkpoint.read_bytes() == saved


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_divergence_is_that_of_torch_and_so_is_its_gradient(dtype):
    generator = torch.Generator().manual_seed(3)
    # Wide and long enough for several chunks, with a last one that is not full.
    ours, theirs = (torch.randn(3, 7, 100_003, generator=generator).mul(4).to(dtype) for _ in range(2))
    logits = ours.clone().requires_grad_()
    found = divergence(logits, theirs)
    (2 * found).backward()
    exact = ours.double().requires_grad_()
    wanted = nn.functional.kl_div(
        exact.log_softmax(-1), theirs.double().log_softmax(-1), log_target=True, reduction="sum"
    )
    (2 * wanted).backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert logits.grad.dtype is dtype
    assert torch.allclose(logits.grad.double(), exact.grad, rtol=1e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-7)


def test_distillation_in_bfloat16_trains_float32_factors(tiny):
    model, tokens, masks = tiny
    halved = cast_weights(copy.deepcopy(model), torch.bfloat16)
    start = recover(tiny, dataclasses.replace(CONFIG, steps=0))
    steps = []
    found = distill(
        halved, copy.deepcopy(halved), tokens, masks, PATTERN, start, dataclasses.replace(CONFIG, steps=20),
        on_step=steps.append,
    )  # fmt: skip
    assert all(update.b.dtype is update.a.dtype is torch.float32 for update in found.values())
    assert sum(s.divergence for s in steps[-5:]) < 0.9 * sum(s.divergence for s in steps[:5])
    after = zip(halved.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(weight, was.bfloat16()) for weight, was in after)


def test_a_block_that_the_masks_leave_dense(tiny):
    model, tokens, masks = tiny
    some = {name: mask for name, mask in masks.items() if "layers.0." not in name}
    fits = []
    updates = reconstruct(model, tokens, some, PATTERN, CONFIG, on_block=fits.append)
    assert updates.keys() == some.keys()
    assert (fits[0].before, fits[0].after) == (0, 0)
    assert fits[1].after < fits[1].before


def test_a_fit_that_diverges_is_one_sentence(tiny):
    model, tokens, masks = tiny
    with pytest.raises(LearnerError, match=r"block 0: the error of its fit is .*lower --block-learning-rate"):
        reconstruct(model, tokens, masks, PATTERN, dataclasses.replace(CONFIG, block_learning_rate=1e30))


def test_masks_of_another_model_are_refused(tiny):
    model, tokens, masks = tiny
    wrong = {"model.layers.9.mlp.up_proj.weight": next(iter(masks.values()))}
    with pytest.raises(LearnerError, match=r"layers\.9\.mlp\.up_proj\.weight: expected a mask of shape None"):
        reconstruct(model, tokens, wrong, PATTERN, CONFIG)


def test_the_command_writes_a_recovery_file(model_folder, text_file, tmp_path, capsys, monkeypatch):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    masks = initial_masks(model, PATTERN, "magnitude").masks
    write_masks(tmp_path / "m.safetensors", masks, PATTERN)
    output = tmp_path / "r.safetensors"
    command = [
        "--model", str(model_folder), "--mask", str(tmp_path / "m.safetensors"), "--calibration", str(text_file),
        "--samples", "8", "--length", "16", "--rank", "2", "--block-steps", "2", "--steps", "3", "--minibatch", "4",
        "--output", str(output),
    ]  # fmt: skip
    assert main(command) == 0
    file = read_recovery(output)
    assert file.updates.keys() == masks.keys()
    assert file.provenance["rank"] == "2"
    assert not output.with_suffix(".checkpoint").exists()
    assert len(output.with_suffix(".jsonl").read_text().splitlines()) == 3
    assert "nats per token" in capsys.readouterr().out

    assert main([*command, "--steps", "3000"]) == 2
    assert "tokens (12000 samples of 16), found" in capsys.readouterr().err
    assert main([*command, "--distill-samples", "4", "4"]) == 2
    assert "expected 1 numbers, one for each calibration source, found 2" in capsys.readouterr().err
    assert file.provenance["dtype"] == "float32"
    pairs = []
    monkeypatch.setattr(recover_cli, "distill", lambda *a, **k: pairs.append(a[:2]) or distill(*a, **k))
    first = tmp_path / "first.safetensors"
    output.rename(first)
    assert main([*command, "--distill-samples", "4", "--start", str(first), "--dtype", "bfloat16"]) == 0
    assert [model.dtype for model in pairs[0]] == [torch.bfloat16, torch.bfloat16]
    # Both read positions alike: rotary frequencies are no weights, and stay in float32.
    buffers, expected = (dict(model.named_buffers()) for model in pairs[0])
    assert buffers.keys() == expected.keys()
    assert buffers
    for name, buffer in buffers.items():
        assert buffer.dtype == expected[name].dtype == torch.float32
        assert torch.equal(buffer, expected[name])
    assert read_recovery(output).provenance["distill_samples"] == "4"
    assert read_recovery(output).provenance["dtype"] == "bfloat16"
    again = read_recovery(output).provenance  # of --start there is nothing here but what it says itself
    assert (again["rank"], again["start_samples"], again["start_block_steps"]) == ("2", "8", "2")
    assert not again.keys() & {"samples", "block_steps", "start_base_model"}
    started = [*command, "--distill-samples", "4", "--start", str(tmp_path / "s.safetensors")]
    output.rename(tmp_path / "s.safetensors")
    rank = started.index("--rank")
    assert main([*started[:rank], *started[rank + 2 :]]) == 0
    assert read_recovery(output).provenance["rank"] == "2"
    assert main([*started, "--rank", "3"]) == 2
    assert "--rank: expected 2, as" in capsys.readouterr().err
    assert main([*started, "--output", str(tmp_path / "s.safetensors")]) == 2
    assert "s.safetensors, which is an input" in capsys.readouterr().err
    assert main([*command, "--device", "gpu"]) == 2
    assert "--device gpu: " in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(command) == 2
    assert "torchrun: the recovery is trained by one process" in capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")
    write_masks(tmp_path / "m.safetensors", masks, PATTERN, provenance={"base_model_sha256": "of another"})
    assert main([*command, "--steps", "0"]) == 0
    assert "warning: " in (err := capsys.readouterr().err)
    assert "was made for weights of another hash" in err
    assert main([*command, "--rank", "0"]) == 2
    assert "rank: expected at least 1, found 0" in capsys.readouterr().err


@pytest.mark.parametrize("started", [False, True], ids=["fitted", "started"])
def test_an_interrupted_command_goes_on_without_fitting_again(
    started, model_folder, text_file, tmp_path, monkeypatch, capsys
):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    write_masks(tmp_path / "m.safetensors", initial_masks(model, PATTERN, "magnitude").masks, PATTERN)
    whole, output = tmp_path / "whole.safetensors", tmp_path / "r.safetensors"
    command = [
        "--model", str(model_folder), "--mask", str(tmp_path / "m.safetensors"), "--calibration", str(text_file),
        "--samples", "8", "--length", "16", "--rank", "2", "--block-steps", "1", "--steps", "4", "--minibatch", "2",
        "--output",
    ]  # fmt: skip
    if started:  # twice, so that the start says much about its own: safetensors reads that in any order
        for name, start in (("first", []), ("second", ["--start", str(tmp_path / "first.safetensors")])):
            assert main([*command, str(tmp_path / f"{name}.safetensors"), *start]) == 0
        command = ["--start", str(tmp_path / "second.safetensors"), "--seed", "3", *command]
    assert main([*command, str(whole)]) == 0
    wanted = recover_cli.StopRequest.__call__

    def after_two(request):
        if len(output.with_suffix(".jsonl").read_text().splitlines()) == 2:
            request.number = 15
        return wanted(request)

    with monkeypatch.context() as patch:
        patch.setattr(recover_cli.StopRequest, "__call__", after_two)
        assert main([*command, str(output)]) == 128 + 15
    assert "stopped by SIGTERM; the same command goes on" in capsys.readouterr().err
    assert not output.exists()
    monkeypatch.setattr(recover_cli, "reconstruct", lambda *a, **k: pytest.fail("fitted again"))
    assert main([*command, str(output)]) == 0
    assert output.read_bytes() == whole.read_bytes()
    assert not output.with_suffix(".checkpoint").exists()
    assert [json.loads(line)["step"] for line in output.with_suffix(".jsonl").read_text().splitlines()] == [1, 2, 3, 4]

    write_masks(tmp_path / "m.safetensors", initial_masks(model, PATTERN, "random", seed=5).masks, PATTERN)
    assert main([*command, str(tmp_path / "other.safetensors"), "--start", str(output)]) == 2
    assert "mask_sha256: expected" in capsys.readouterr().err
