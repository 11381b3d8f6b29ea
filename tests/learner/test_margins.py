"""Graded initial logits: the initial mask stays the likeliest, and worth is what the layer's error says it is."""

from __future__ import annotations

import pytest
import torch

from maskpro_kernels import NMPattern
from maskpro_kernels.packing import magnitude_mask, top_n_mask
from maskpro_learner import LearnConfig, initial_masks, learn_masks, margins
from maskpro_learner.margins import _worth, margin_logits


def test_worth_is_the_change_of_the_layers_error():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 8, generator=generator)
    x = torch.randn(50, 8, generator=generator)
    gram = x.T @ x
    mask = magnitude_mask(weight, NMPattern(2, 4))

    def errors(some):
        return (x @ (weight * ~some).T).square().sum(0)

    worth = _worth(weight, gram, mask)
    for row in range(3):
        for column in range(8):
            other = mask.clone()
            other[row, column] = ~mask[row, column]
            with_it, without = (mask, other) if mask[row, column] else (other, mask)
            expected = errors(without)[row] - errors(with_it)[row]
            assert worth[row, column] == pytest.approx(float(expected), rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "4:4"])
def test_the_initial_mask_is_the_likeliest_and_the_model_is_left_alone(tiny_model, pattern):
    pattern = NMPattern.parse(pattern)
    model = tiny_model()
    tokens = torch.randint(0, 64, (6, 16))
    masks = initial_masks(tiny_model(), pattern, "wanda", tokens=tokens).masks
    before = {name: p.clone() for name, p in model.named_parameters()}
    logits = margin_logits(model, tokens, masks, pattern, 3.0)
    assert logits.keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(top_n_mask(logits[name], pattern), mask)
        assert logits[name].abs().max() <= 5
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_they_are_of_text_from_everywhere(tiny_model, monkeypatch):
    monkeypatch.setattr(margins, "_TOKENS", 4 * 16)
    pattern, model = NMPattern(2, 4), tiny_model()
    tokens = torch.randint(0, 64, (12, 16))
    masks = initial_masks(tiny_model(), pattern, "magnitude").masks

    def logits(tokens):
        found = margin_logits(model, tokens, masks, pattern, 3.0)
        return torch.cat([found[name].flatten() for name in masks])

    other_end = torch.cat([tokens[:8], torch.randint(0, 64, (4, 16))])
    assert not torch.equal(logits(tokens), logits(other_end))
    assert torch.equal(logits(tokens), logits(tokens[::3]))


def test_learning_starts_from_them(tiny_model):
    model = tiny_model().requires_grad_(False)
    pattern = NMPattern(2, 4)
    tokens = torch.randint(0, 64, (6, 16))
    masks = initial_masks(tiny_model(), pattern, "magnitude").masks
    config = LearnConfig(pattern, 2, "first-order", start="margin", minibatch=2)
    learned = learn_masks(model, tokens, masks, config)
    assert any(not torch.equal(learned[name], mask) for name, mask in masks.items())
    with pytest.raises(ValueError, match="start: expected one of constant, margin, found best"):
        LearnConfig(pattern, 2, start="best")
