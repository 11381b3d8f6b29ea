"""Every family of decoder: one-shot masks and learning, through the model's own forward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from maskpro_kernels import NMPattern, read_masks
from maskpro_kernels.packing import check_mask
from maskpro_learner import LearnConfig, initial_masks, learn_masks, select_layers
from maskpro_learner.cli import main

PATTERN = NMPattern(2, 4)
# q, k, v, o, gate, up, down; GPT-NeoX: query_key_value, dense, dense_h_to_4h, dense_4h_to_h.
LAYERS = {"llama": 7, "qwen2": 7, "qwen3": 7, "mistral": 7, "gemma2": 7, "gemma3": 7, "gpt_neox": 4}


@pytest.mark.parametrize("family", LAYERS)
def test_wanda_and_learning(tiny_model: Callable[..., PreTrainedModel], family: str) -> None:
    model = tiny_model(family).requires_grad_(False)
    forwards = {type(module): type(module).forward for module in model.modules()}
    tokens = torch.randint(3, 64, (6, 12), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=tokens).logits
    masks = initial_masks(copy.deepcopy(model), PATTERN, "wanda", tokens=tokens).masks
    assert len(masks) == 2 * LAYERS[family] == len(select_layers(model, PATTERN).linears)
    assert not any("embed" in name or "lm_head" in name for name in masks)
    for estimator in ("smoothed", "first-order"):
        config = LearnConfig(PATTERN, 2, estimator, minibatch=3, batch=2, initial_logit=1.0)
        steps = []
        learned = learn_masks(model, tokens, masks, config, on_step=steps.append)
        assert [step.step for step in steps] == [1, 2]
        assert all(step.flips > 0 and step.residual != 0 for step in steps)  # the model runs with other masks
        assert learned.keys() == masks.keys()
        for mask in learned.values():
            check_mask(mask, PATTERN)
        if estimator == "first-order":
            assert any(not torch.equal(learned[name], mask) for name, mask in masks.items())
    assert torch.equal(model(input_ids=tokens).logits, before)  # dense again
    for module in model.modules():
        assert type(module).forward is forwards[type(module)]
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--include", "*.mlp.*"], 6),
        (["--exclude", "*.down_proj", "*layers.0.*"], 6),
        (["--include", "*layers.1.*", "--exclude", "*_proj"], 0),
    ],
)
def test_layers_are_chosen_by_pattern(model_folder, text_file, tmp_path, capsys, flags, expected) -> None:
    output = tmp_path / "mask.safetensors"
    code = main([
        "--model", str(model_folder), "--init", "magnitude", "--calibration", str(text_file), "--samples", "4",
        "--length", "16", "--steps", "2", "--minibatch", "2", "--output", str(output), "--device", "cpu", *flags,
    ])  # fmt: skip
    if expected == 0:
        assert code == 2
        assert "no linear layer is left to prune to 2:4" in capsys.readouterr().err
        return
    assert code == 0
    names = set(read_masks(output).masks)
    assert len(names) == expected
    if "--include" in flags:
        assert all(".mlp." in name for name in names)
    else:
        assert not any("down_proj" in name or "layers.0." in name for name in names)
