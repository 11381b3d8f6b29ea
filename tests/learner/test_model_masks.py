"""Masks of whole tiny models: block after block, for several architectures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from maskpro_kernels import NMPattern
from maskpro_kernels.packing import check_mask
from maskpro_learner import METHODS, ModelError, apply_masks, initial_masks, select_layers
from maskpro_learner.initial_masks import Method, wanda_mask
from maskpro_learner.sequential import BlockRunner

Build = Callable[..., PreTrainedModel]
PATTERN = NMPattern.parse("2:4")
TOKENS = torch.randint(0, 64, (6, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("method", METHODS)
def test_end_to_end(tiny_model: Build, architecture: str, method: Method) -> None:
    model, untouched = tiny_model(architecture), tiny_model(architecture)
    result = initial_masks(model, PATTERN, method, tokens=TOKENS)
    linears = {name for name, module in untouched.named_modules() if isinstance(module, nn.Linear)}
    head = next(name for name in linears if untouched.get_submodule(name) is untouched.get_output_embeddings())
    assert set(result.masks) == {f"{name}.weight" for name in linears - {head}}
    assert result.dense == {}
    for mask in result.masks.values():
        check_mask(mask, PATTERN)
    # the model is the original one under the masks, bit for bit
    apply_masks(untouched, result.masks)
    for (name, got), expected in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(got, expected), name
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_forward_order_and_globs(tiny_model: Build) -> None:
    model = tiny_model()
    names = list(select_layers(model, PATTERN).linears)
    assert len(names) == 14
    assert [name.split(".")[2] for name in names] == ["0"] * 7 + ["1"] * 7
    only = select_layers(model, PATTERN, include=["*.mlp.*"], exclude=["*.1.*"])
    assert list(only.linears) == [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert len(only.dense) == 11
    with pytest.raises(ModelError, match="no linear layer is left"):
        select_layers(model, PATTERN, include=["nothing"])


def test_layers_that_m_does_not_divide_stay_dense_and_are_reported(tiny_model: Build) -> None:
    model = tiny_model()
    odd = nn.Linear(36, 32, bias=False)
    model.model.layers[1].mlp.up_proj = odd
    before = odd.weight.clone()
    result = initial_masks(model, NMPattern.parse("2:8"), "magnitude")
    assert result.dense == {
        "model.layers.1.mlp.up_proj": "8 does not divide in_features = 36",
        "model.layers.1.mlp.gate_proj": "vLLM fuses it with up_proj, which stays dense",
    }
    assert len(result.masks) == 12
    assert torch.equal(odd.weight, before)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_blocks_called_one_by_one_are_the_model(tiny_model: Build, architecture: str) -> None:
    model = tiny_model(architecture)
    layers = select_layers(model, PATTERN)
    runner = BlockRunner(model, layers.blocks, TOKENS, batch=4)
    assert [len(hidden) for hidden in runner.hidden] == [3, 3]  # the largest divisor of 6 up to 4
    for index in range(2):
        runner.advance(index)
    with torch.inference_mode():
        whole = model.base_model(input_ids=TOKENS, output_hidden_states=True)
    norm = model.model.norm if architecture == "llama" else model.gpt_neox.final_layer_norm
    with torch.inference_mode():
        got = norm(torch.cat(runner.hidden))
    torch.testing.assert_close(got, whole.last_hidden_state, rtol=1e-5, atol=1e-5)


def test_later_blocks_are_calibrated_on_pruned_inputs(tiny_model: Build) -> None:
    model = tiny_model()
    result = initial_masks(model, PATTERN, "wanda", tokens=TOKENS)
    name = "model.layers.1.self_attn.q_proj"
    original = tiny_model()

    def wanda_on(inputs_from: PreTrainedModel) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hook = inputs_from.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.inference_mode():
            inputs_from(input_ids=TOKENS)
        hook.remove()
        squares = seen[0].double().square().sum((0, 1))
        return wanda_mask(original.get_submodule(name).weight, squares, PATTERN)

    first_block_pruned = tiny_model()
    apply_masks(first_block_pruned, {key: mask for key, mask in result.masks.items() if ".layers.0." in key})
    assert torch.equal(result.masks[f"{name}.weight"], wanda_on(first_block_pruned))
    assert not torch.equal(result.masks[f"{name}.weight"], wanda_on(original))


def test_shared_inputs_are_counted_once_and_right(tiny_model: Build) -> None:
    model = tiny_model()
    layers = select_layers(model, PATTERN)
    runner = BlockRunner(model, layers.blocks, TOKENS, batch=2)
    statistics = runner.statistics(0, with_gram=True)
    q, k, v, o = (statistics[f"model.layers.0.self_attn.{part}_proj"] for part in "qkvo")
    assert q is k is v
    assert q is not o
    with torch.inference_mode():
        x = model.model.layers[0].input_layernorm(model.model.embed_tokens(TOKENS)).flatten(0, 1)
    assert q.tokens == TOKENS.numel()
    assert q.gram is not None
    torch.testing.assert_close(q.gram, x.T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(q.square_sum, x.double().square().sum(0), rtol=1e-5, atol=1e-5)


def test_refit_is_explicit_and_for_sparsegpt_only(tiny_model: Build) -> None:
    masked, refit, original = tiny_model(), tiny_model(), tiny_model()
    initial_masks(masked, PATTERN, "sparsegpt", tokens=TOKENS)
    result = initial_masks(refit, PATTERN, "sparsegpt", tokens=TOKENS, refit=True)
    name = "model.layers.0.mlp.down_proj"
    mask = result.masks[f"{name}.weight"]
    assert not torch.equal(refit.get_submodule(name).weight[mask], original.get_submodule(name).weight[mask])
    assert not refit.get_submodule(name).weight[~mask].any()
    for method in ("magnitude", "wanda", "swap", "random"):
        with pytest.raises(ValueError, match="only sparsegpt refits"):
            initial_masks(masked, PATTERN, method, tokens=TOKENS, refit=True)
    with pytest.raises(ValueError, match="needs calibration tokens"):
        initial_masks(masked, PATTERN, "wanda")
    with pytest.raises(ValueError, match="unknown method 'obc'"):
        initial_masks(masked, PATTERN, "obc")  # type: ignore[arg-type]


def test_apply_masks_names_a_foreign_mask(tiny_model: Build) -> None:
    with pytest.raises(ModelError, match=r"lm\.weight: expected a weight of shape \(2, 4\).*found none"):
        apply_masks(tiny_model(), {"lm.weight": torch.ones((2, 4), dtype=torch.bool)})


def test_experts_are_reported() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3MoeConfig(
        **sizes, vocab_size=64, num_key_value_heads=1, head_dim=16, num_experts=4, moe_intermediate_size=16
    )
    dense = select_layers(AutoModelForCausalLM.from_config(config), PATTERN).dense
    mlp = "model.layers.0.mlp"
    assert {name for name, reason in dense.items() if "experts" in reason} == {
        f"{mlp}.experts.gate_up_proj", f"{mlp}.experts.down_proj",
    }  # fmt: skip


class Told(nn.Module):
    """A block that is told something of the text besides its hidden states, as Gemma 3n's are."""

    def __init__(self, block: nn.Module, told: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.block, self.told = block, told

    def forward(self, hidden: torch.Tensor, *args: object, extra: object = None, **kwargs: object) -> object:
        return self.block(hidden, *args, **kwargs)


@pytest.mark.parametrize("told", [lambda x: x.sum(), lambda x: {"keys": [x]}, lambda x: {"layers": 2}])
def test_blocks_that_are_told_more_of_the_text_are_refused(tiny_model: Build, told: Callable[..., object]) -> None:
    model = tiny_model()
    inner = Told(model.model.layers[1], told)
    model.model.layers[1] = inner
    inner.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "extra": told(args[0])}), with_kwargs=True
    )
    blocks = select_layers(model, PATTERN).blocks
    if told(TOKENS) == {"layers": 2}:
        BlockRunner(model, blocks, TOKENS, batch=2)
        return
    with pytest.raises(ModelError, match="found more that depends on the text: they cannot be run one by one"):
        BlockRunner(model, blocks, TOKENS, batch=2)
    BlockRunner(model, blocks, TOKENS, batch=6)  # one batch has one set of everything
