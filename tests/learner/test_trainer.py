"""Learning: estimators by their formulas, a toy whose best mask is known, and runs that stop and go on."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from maskpro_kernels import NMPattern
from maskpro_kernels.packing import check_mask
from maskpro_learner import LearnConfig, LearnerError, initial_masks, learn_masks, select_layers
from maskpro_learner.estimator import ESTIMATORS, make_estimator
from maskpro_learner.masked_model import MaskedModel, constant_logits, masked

PATTERN = NMPattern(2, 4)


def test_estimators_follow_their_formulas():
    vanilla, residual, smoothed, leave_one_out, first_order = (make_estimator(n, 2.0, 0.75, 4) for n in ESTIMATORS)
    assert vanilla.coefficients([5.0], 4.0) == [-10.0]
    assert residual.coefficients([5.0], 4.0) == [-2.0]
    assert smoothed.coefficients([5.0], 4.0) == [-2.0 * (1 - 0.25)]
    assert smoothed.tracker == 0.25
    assert smoothed.coefficients([3.0], 4.0) == [-2.0 * (-1 - (0.75 * 0.25 - 0.25))]
    assert leave_one_out.coefficients([1.0, 2.0, 6.0], 0.0) == pytest.approx([2.0, 1.0, -3.0])
    assert first_order.coefficients([5.0], 4.0) == [0.5] * 4
    assert sum(leave_one_out.coefficients([0.3, 0.1, 0.7], 9.0)) == pytest.approx(0)


@pytest.mark.parametrize("name", ["smoothed", "leave-one-out"])
def test_a_toy_with_a_known_best_mask_is_solved(name):
    """Each weight has a cost; the best mask keeps the cheapest two of every four. Learning starts from the dearest."""
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(32, 2, bias=False).requires_grad_(False)
    linear.weight.fill_(1.0)
    cost = torch.stack([torch.randperm(4, generator=generator) for _ in range(16)]).reshape(2, 32).float()
    best, worst = cost < 2, cost >= 2
    # One number judges all sixteen groups at once, so what compares masks of now may take larger steps.
    rate, steps = (0.3, 1500) if name == "leave-one-out" else (0.02, 12_000)
    estimator = make_estimator(name, rate, 0.9, 4)
    masks = {"toy.weight": worst}
    with masked({"toy": linear}, masks, PATTERN, logits=constant_logits(masks, 1.0), seed=3) as policy:
        initial = float((cost * worst).sum())
        policy.step([], 0)
        draw = 0
        for _ in range(steps):
            losses = []
            first = draw
            for _k in range(estimator.masks_per_batch):
                if draw != first:
                    policy.step([], draw)
                losses.append(float((cost * linear.weight).sum()))
                draw += 1
            updates = [(c, first + k) for k, c in enumerate(estimator.coefficients(losses, initial))]
            policy.step(updates, draw)
        assert torch.equal(policy.masks()["toy.weight"], best)
    assert torch.equal(linear.weight, torch.ones(2, 32))  # restored


@pytest.fixture(scope="module")
def tiny() -> tuple[LlamaForCausalLM, torch.Tensor]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train(False).requires_grad_(False)
    return model, torch.randint(0, 64, (12, 16))


CONFIG = LearnConfig(PATTERN, steps=9, minibatch=4, batch=3, learning_rate=5.0, initial_logit=2.0)


def draws_of(estimator):
    return 4 if estimator in ("leave-one-out", "first-order") else None


def magnitude(model):
    return initial_masks(copy.deepcopy(model), PATTERN, "magnitude").masks  # which prunes in place


def learn(tiny, config=CONFIG, **arguments):
    model, tokens = tiny
    return learn_masks(model, tokens, magnitude(model), config, **arguments)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_run_is_a_function_of_its_seed_and_leaves_the_model_alone(tiny, estimator):
    before = {name: p.clone() for name, p in tiny[0].named_parameters()}
    config = dataclasses.replace(CONFIG, estimator=estimator, draws=draws_of(estimator))
    steps = []
    first, second = learn(tiny, config, on_step=steps.append), learn(tiny, config)
    other = learn(tiny, dataclasses.replace(config, seed=1, steps=40, learning_rate=500.0))
    assert [step.step for step in steps] == list(range(1, 10))
    assert first.keys() == {f"{name}.weight" for name in select_layers(tiny[0], PATTERN).linears}
    for name, mask in first.items():
        check_mask(mask, PATTERN)
        assert torch.equal(mask, second[name])
    assert any(not torch.equal(first[name], other[name]) for name in first)
    for name, p in tiny[0].named_parameters():
        assert torch.equal(p, before[name])


@pytest.mark.parametrize("estimator", ["smoothed", "first-order"])
def test_a_minibatch_of_more_blocks_than_there_are_is_all_of_them(tiny, estimator):
    model, tokens = tiny
    seen = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        for minibatch in 3, 32:
            config = dataclasses.replace(CONFIG, estimator=estimator, draws=draws_of(estimator), minibatch=minibatch)
            learn((model, tokens[:3]), config)
    finally:
        hook.remove()
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert sum(seen) == 2 * (3 + 9 * 3)  # the initial losses, then every block once a step


@pytest.mark.parametrize("estimator", ["smoothed", "leave-one-out", "first-order"])
@pytest.mark.parametrize("stops", [(1,), (3, 4), (2, 5, 8)])
def test_a_stopped_run_goes_on_bit_for_bit(tiny, tmp_path, estimator, stops):
    config = dataclasses.replace(CONFIG, estimator=estimator, learning_rate=200.0, draws=draws_of(estimator))
    trackers: list[list[float]] = [[], []]
    whole = learn(tiny, config, on_step=lambda s: trackers[0].append(s.tracker))
    checkpoint = tmp_path / "run.checkpoint"
    for stop in [*stops, None]:
        done: list[int] = []

        def on_step(step, done=done):
            done.append(step.step)
            trackers[1].append(step.tracker)

        result = learn(
            tiny, config, on_step=on_step, checkpoint=checkpoint,
            stop=lambda done=done, stop=stop: bool(done) and done[-1] == stop,
        )  # fmt: skip
        assert checkpoint.exists()  # also at the end: the masks are not written yet
    assert trackers[0] == trackers[1]
    for name, mask in whole.items():
        assert torch.equal(mask, result[name])
    again = learn(tiny, config, checkpoint=checkpoint, on_step=lambda step: pytest.fail("a step after the last one"))
    assert all(torch.equal(mask, again[name]) for name, mask in whole.items())


def test_a_checkpoint_of_more_steps_than_asked_for_is_refused(tiny, tmp_path):
    checkpoint = tmp_path / "run.checkpoint"
    learn(tiny, dataclasses.replace(CONFIG, steps=4), checkpoint=checkpoint)
    with pytest.raises(LearnerError, match=r"run\.checkpoint: expected at most 3 steps done, found 4"):
        learn(tiny, dataclasses.replace(CONFIG, steps=3), checkpoint=checkpoint)


def test_a_resumed_run_does_not_grade_its_logits_again(tiny, tmp_path, monkeypatch):
    from maskpro_learner import trainer

    config = dataclasses.replace(CONFIG, start="margin", initial_logit=3.0)
    checkpoint = tmp_path / "run.checkpoint"
    whole = learn(tiny, config)
    learn(tiny, dataclasses.replace(config, steps=2), checkpoint=checkpoint)
    monkeypatch.setattr(trainer, "margin_logits", lambda *a, **k: pytest.fail("graded again"))
    resumed = learn(tiny, config, checkpoint=checkpoint)
    assert all(torch.equal(mask, resumed[name]) for name, mask in whole.items())


def test_flips_are_counted_and_grow_with_uncertainty(tiny):
    groups = sum(mask.numel() for mask in magnitude(tiny[0]).values()) // 4
    found = {}
    for logit in (20.0, 3.0, 0.5):
        steps = []
        learn(tiny, dataclasses.replace(CONFIG, steps=2, initial_logit=logit), on_step=steps.append)
        found[logit] = steps[0].flips
    assert found[20.0] == 0
    # Both kept weights come first with probability 2 a / (2 a + 2) * a / (a + 2), a = e^logit.
    a = math.exp(3.0)
    expected = groups * (1 - (2 * a / (2 * a + 2)) * (a / (a + 2)))
    assert abs(found[3.0] - expected) < 5 * math.sqrt(expected)
    assert found[0.5] > groups / 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("estimator", ["smoothed", "leave-one-out", "first-order"])
def test_on_a_gpu_a_stopped_run_goes_on_bit_for_bit(tiny, tmp_path, estimator):
    model = copy.deepcopy(tiny[0]).cuda()
    config = dataclasses.replace(CONFIG, estimator=estimator, learning_rate=200.0)
    masks = magnitude(tiny[0])  # on the CPU
    steps: list[list[tuple[float, float]]] = [[], []]
    whole = learn_masks(model, tiny[1], masks, config, on_step=lambda s: steps[0].append((s.loss, s.flips)))
    checkpoint = tmp_path / "run.checkpoint"
    for stop in (4, None):
        result = learn_masks(
            model, tiny[1], masks, config, checkpoint=checkpoint, on_step=lambda s: steps[1].append((s.loss, s.flips)),
            stop=lambda stop=stop: len(steps[1]) == stop,
        )  # fmt: skip
    assert steps[0] == steps[1]
    for name, mask in whole.items():
        assert mask.device.type == "cpu"
        assert torch.equal(mask, result[name])
    assert all(torch.equal(p.cpu(), q) for p, q in zip(model.parameters(), tiny[0].parameters(), strict=True))


def test_a_checkpoint_of_another_run_is_refused(tiny, tmp_path):
    checkpoint = tmp_path / "run.checkpoint"
    learn(tiny, checkpoint=checkpoint, stop=lambda: checkpoint.parent.exists())
    saved = checkpoint.read_bytes()
    with pytest.raises(LearnerError, match="a checkpoint of another run"):
        learn(tiny, dataclasses.replace(CONFIG, seed=5), checkpoint=checkpoint)
    assert checkpoint.read_bytes() == saved
    checkpoint.write_bytes(saved[:-7])
    with pytest.raises(LearnerError, match="not a readable checkpoint"):
        learn(tiny, checkpoint=checkpoint)


def test_a_loss_that_is_not_finite_is_named(tiny):
    model, tokens = tiny
    with torch.no_grad():
        saved = model.lm_head.weight.clone()
        model.lm_head.weight.fill_(torch.nan)
    try:
        with pytest.raises(LearnerError, match="step 1: the loss is nan"):
            learn_masks(model, tokens, magnitude(model), CONFIG)
    finally:
        with torch.no_grad():
            model.lm_head.weight.copy_(saved)


def test_a_gradient_that_is_not_finite_is_named(tiny, monkeypatch):
    model, tokens = tiny
    backward = MaskedModel.backward

    def overflowing(self, *arguments):
        losses = backward(self, *arguments)
        self.linears["model.layers.1.mlp.up_proj"].weight.grad[3, 5] = torch.inf
        return losses

    monkeypatch.setattr(MaskedModel, "backward", overflowing)
    config = dataclasses.replace(CONFIG, estimator="first-order", draws=2)
    with pytest.raises(LearnerError, match=r"layers.1.mlp.up_proj.weight: expected a finite gradient, found none"):
        learn_masks(model, tokens, magnitude(model), config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": NMPattern(2, 32)}, "expected groups of"),
        ({"estimator": "best"}, "expected one of vanilla, residual"),
        ({"steps": 0}, "steps: expected at least 1, found 0"),
        ({"estimator": "leave-one-out", "draws": 1}, "compares 2 to 16, found 1"),
        ({"estimator": "first-order", "draws": 17}, "compares 2 to 16, found 17"),
        ({"estimator": "smoothed", "draws": 4}, "compares 1 to 1, found 4"),
        ({"smoothing": 1.0}, "smoothing < 1"),
        ({"initial_logit": -10.0}, "initial_logit: expected above 0 and finite, found -10"),
        ({"initial_logit": math.nan}, "initial_logit: expected above 0 and finite, found nan"),
    ],
    ids=str,
)
def test_impossible_settings(changes, message):
    with pytest.raises(LearnerError, match=message):
        dataclasses.replace(CONFIG, **changes)
