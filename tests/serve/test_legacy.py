"""2:4 checkpoints that compressed-tensors wrote: what its configuration means, which are ours, and that they serve.

tests/fixtures/legacy was written by compressed-tensors itself (tests/fixtures/make_legacy_checkpoints.py).
"""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import greedy_tokens, needs_vnni, serve_greedily
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from maskpro_kernels._cpu import available_isas, isa_available
from maskpro_kernels.activations import EightBitInputs
from maskpro_kernels.bits import unpack_bits
from maskpro_serve import CheckpointError
from maskpro_serve.legacy import LegacyFormat, claims
from maskpro_serve.served import check_served

FIXTURES = Path(__file__).parent.parent / "fixtures" / "legacy"
NAMES = sorted(folder.name for folder in FIXTURES.iterdir())
UP, O_PROJ = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"


def quantization(name: str) -> dict:
    return json.loads((FIXTURES / name / "config.json").read_text())["quantization_config"]


def changed(config: dict, path: str, value: object) -> dict:
    config = copy.deepcopy(config)
    *parents, last = path.split("/")
    place = config
    for key in parents:
        place = place[key]
    place[last] = value
    return config


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> dict[str, list[list[int]]]:
    """Greedy tokens of every fixture in vLLM, activations as they are; and the log, under the name of none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASKPRO_KERNEL", f"cpu-{available_isas()[0]}")
        documents, log = serve_greedily([FIXTURES / name for name in NAMES], tmp_path_factory.mktemp("served"))
    return dict(zip(NAMES, (document["tokens"] for document in documents), strict=True)) | {"log": log}


@pytest.mark.vllm
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", NAMES)
def test_serves_what_compressed_tensors_decompresses(served, name):
    """The tokens are those of transformers on the dense twin: decompressed, and dequantized, by compressed-tensors."""
    expected = json.loads((FIXTURES / name / "expected.json").read_text())["tokens"]
    assert [row[: len(tokens)] for row, tokens in zip(served[name], expected, strict=True)] == expected


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_says_what_is_packed_and_that_activations_are_not_quantized(served):
    packed = re.findall(r"maskpro: 2:4 linear layers: (\d+) on ", served["log"])
    assert packed == ["14", *["13"] * 6]
    assert served["log"].count("maskpro: activations are not quantized") == 5
    assert served["log"].count("maskpro: 1 linear layers stay dense, their zeros are not 2:4") == 2


@pytest.mark.vllm
@pytest.mark.timeout(600)
@needs_vnni
def test_rounds_activations_as_the_checkpoint_says(tmp_path, monkeypatch):
    """The tokens are those of transformers on the dequantized twin, the inputs of its quantized linears rounded."""
    names = ["bitmask-int8-channel-dynamic", "bitmask-int8-tensor-static"]
    dense = "dense-int8-channel-dynamic"  # of which one layer is not 2:4
    monkeypatch.setenv("MASKPRO_KERNEL", "cpu-avx512-vnni")
    documents, log = serve_greedily([FIXTURES / name for name in [*names, dense]], tmp_path)
    assert log.count("maskpro: activations are rounded to 8 bits, as this checkpoint allows") == 3
    assert re.findall(r"maskpro: 2:4 linear layers: (\d+) on cpu-avx512-vnni", log) == ["13", "13", "13"]
    assert documents[2]["tokens"] != json.loads((FIXTURES / dense / "expected.json").read_text())["tokens"]
    for name, document in zip(names, documents[:2], strict=True):
        expected = json.loads((FIXTURES / name / "expected.json").read_text())
        rounded = greedy_tokens(rounding_twin(FIXTURES / name), expected["prompts"], len(expected["tokens"][0]))
        assert [row[: len(tokens)] for row, tokens in zip(document["tokens"], rounded, strict=True)] == rounded
        assert rounded != expected["tokens"]  # or this would show nothing


def rounding_twin(folder: Path) -> LlamaForCausalLM:
    """A bitmask fixture in float32: its weights dequantized, the activations of quantized linears rounded."""
    parts = {}
    for file in folder.glob("*.safetensors"):
        parts |= load_file(file)
    packed = {name.removesuffix(".compressed") for name in parts if name.endswith(".compressed")}
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    model = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
    for name, module in model.named_modules():
        if name in packed:
            weight = torch.zeros(module.weight.shape)
            weight[unpack_bits(parts[f"{name}.bitmask"], weight.shape[1])] = (
                parts[f"{name}.compressed"].float().flatten()
            )
            module.weight.data = weight * parts[f"{name}.weight_scale"].float()
            scale = parts.get(f"{name}.input_scale")
            inputs = EightBitInputs(torch.int8, None if scale is None else scale.float().reshape(1))
            module.register_forward_pre_hook(partial(lambda inputs, _, given: (inputs.simulated(given[0]),), inputs))
    dense = {name: tensor.float() for name, tensor in parts.items() if name in dict(model.named_parameters())}
    missing, unexpected = model.load_state_dict(dense, strict=False)
    assert not unexpected
    assert {name.removesuffix(".weight") for name in missing} - packed <= {"lm_head"}  # of some it is tied
    return model


@pytest.mark.parametrize("name", NAMES)
def test_every_fixture_is_whole_and_claimed(name):
    assert claims(quantization(name))
    checked = check_served(FIXTURES / name, contents=True)
    assert checked == LegacyFormat.from_dict(quantization(name), where="")


def test_bitmask_and_values_are_the_dense_weights():
    """Of the same model, so the formats agree with each other weight for weight."""
    dense = load_file(FIXTURES / "dense-bf16" / "model.safetensors")
    for name in ("bitmask-bf16", "bitmask-int8-tensor-static", "bitmask-fp8-tensor-static"):
        parts = {}
        for file in (FIXTURES / name).glob("*.safetensors"):
            parts |= load_file(file)
        mask = np.unpackbits(parts[f"{UP}.bitmask"].numpy(), axis=1, bitorder="little").astype(bool)
        twin = torch.zeros(mask.shape)
        scale = parts.get(f"{UP}.weight_scale", torch.ones(1)).float()
        twin[torch.from_numpy(mask)] = (parts[f"{UP}.compressed"].float() * scale).flatten()
        exact = dense[f"{UP}.weight"].float()
        # A step of the numbers that were kept, one of 255 levels or one of 3 bits: the quotient was in 16 bits, too.
        step = {"bf16": 0 * exact, "int8": 1.01 * scale, "fp8": exact.abs() / 8 + scale / 512}[name.split("-")[1]]
        assert ((twin - exact).abs() <= step).all(), name


def test_layers_are_told_apart_as_compressed_tensors_does():
    config = changed(quantization("bitmask-int8-tensor-static"), "sparsity_config/targets", ["re:.*proj$"])
    config["sparsity_config"]["ignore"] = ["lm_head", "re:model.layers.1.mlp", O_PROJ]
    groups = config["config_groups"]
    groups["group_1"] = copy.deepcopy(groups["group_0"]) | {"targets": ["Linear"]}
    groups["group_1"]["weights"] |= {"strategy": "channel"}
    groups["group_0"]["targets"] = [UP]
    legacy = LegacyFormat.from_dict(config, where="")
    assert legacy.scheme(O_PROJ) is None
    assert legacy.scheme("lm_head") is None
    up, down = legacy.scheme(UP), legacy.scheme(UP.replace("up", "down"))
    assert (up.compressed, up.values, up.scale, up.input_scale) == (True, torch.int8, "tensor", True)
    assert (down.compressed, down.scale) == (True, "channel")  # by its class, as its name is in no group
    ignored = legacy.scheme("model.layers.1.mlp.up_proj")
    assert (ignored.compressed, ignored.values) == (False, torch.int8)


INT8, DENSE = "bitmask-int8-channel-dynamic", "dense-bf16"
WEIGHTS = "config_groups/group_0/weights"


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        (INT8, "sparsity_config/format", "sparse-bitmask", "format: expected 'sparse-24-bitmask' or 'dense', found"),
        (INT8, "sparsity_config/sparsity_structure", "unstructured", "sparsity_structure: expected '2:4', found 'unst"),
        (INT8, "sparsity_config/targets", "Linear", "targets: expected a list of names, found 'Linear'"),
        (INT8, "sparsity_config/ignore", ["re:("], r"ignore: 're:\(' is no regular expression: missing \)"),
        (INT8, "kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme: a quantized KV cache cannot be served"),
        (INT8, "transform_config", {"u": {}}, "transform_config: transformed weights cannot be served"),
        (INT8, "config_groups", [1], "config_groups: expected an object, found list"),
        (INT8, "config_groups/group_0/format", "pack-quantized", "format: expected one of .* found 'pack-quantized'"),
        (INT8, f"{WEIGHTS}/num_bits", 4, "group_0: weights: expected int or float of 8 bits, found int of 4"),
        (INT8, f"{WEIGHTS}/type", ["int"], r"group_0: weights: expected int or float of 8 bits, found \['int'\] of 8"),
        (INT8, f"{WEIGHTS}/strategy", "group", "weights: strategy: expected channel or tensor, found 'group'"),
        (INT8, f"{WEIGHTS}/symmetric", False, "weights: expected symmetric values with stored scales and no zero poi"),
        (INT8, WEIGHTS, None, "group_0: weights: expected int or float of 8 bits"),
        (INT8, "config_groups/group_0/output_activations", {"num_bits": 8}, "output_activations: expected none"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_one_sentence(name, path, value, message):
    config = changed(quantization(name), path, value)
    with pytest.raises(CheckpointError, match=message) as caught:
        LegacyFormat.from_dict(config, where="config.json")
    assert str(caught.value).startswith("config.json: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "ours"),
    [
        ({"quant_method": "compressed-tensors", "config_groups": {}}, False),
        (quantization(DENSE), True),
        (changed(quantization(DENSE), "quant_method", "compressed_tensors"), True),
        (changed(quantization(DENSE), "quant_method", "gptq"), False),
        ({key: value for key, value in quantization(DENSE).items() if key != "quant_method"}, True),
        (changed(quantization(DENSE), "quant_method", ""), True),  # as vLLM hands over one that is not there
        (changed(quantization(DENSE), "sparsity_config/targets", []), False),
        (changed(quantization(DENSE), "sparsity_config", None), False),
        (changed(quantization(DENSE), "sparsity_config/sparsity_structure", "unstructured"), False),
        (changed(quantization("dense-int8-channel-dynamic"), f"{WEIGHTS}/num_bits", 4), False),
        (changed(quantization("dense-int8-channel-dynamic"), "kv_cache_scheme", {"num_bits": 8}), False),
        (changed(quantization(INT8), f"{WEIGHTS}/num_bits", 4), True),  # packed: no one else can, so we say why
    ],
)
def test_only_ours_are_claimed(config, ours):
    before = copy.deepcopy(config)
    assert claims(config) == ours
    assert config == before


@pytest.mark.parametrize(
    ("path", "value", "rounded"),
    [
        ("num_bits", 8, True),
        ("symmetric", False, False),  # zero points
        ("type", "float", False),  # another kind than the weights
    ],
)
def test_activations_may_be_rounded_as_the_weights_are(path, value, rounded):
    for name in (INT8, "bitmask-int8-tensor-static"):
        config = changed(quantization(name), f"config_groups/group_0/input_activations/{path}", value)
        scheme = LegacyFormat.from_dict(config, where="").scheme(UP)
        assert scheme.inputs == (torch.int8 if rounded else None)
        assert scheme.input_scale == ("static" in name)
    weights_only = LegacyFormat.from_dict(changed(config, "config_groups/group_0/input_activations", None), where="")
    assert weights_only.scheme(UP).inputs is None


def test_the_largest_of_fused_input_scales_holds():
    from maskpro_serve.quantization.loaded import loaded_inputs

    def inputs(scale, scheme, *, dummy=False):
        layer = SimpleNamespace()
        if scale is not None:
            layer.input_scale = torch.nn.Parameter(torch.tensor(scale), requires_grad=False)
            layer.input_scale.complete = True
        return loaded_inputs(layer, scheme, "qkv_proj", dummy=dummy)

    static = LegacyFormat.from_dict(quantization("bitmask-fp8-tensor-static"), where="").scheme(UP)
    dynamic = LegacyFormat.from_dict(quantization("bitmask-fp8-channel-dynamic"), where="").scheme(UP)
    assert inputs([0.5, 2.0, 1.0], static).scale.tolist() == [2.0]
    assert inputs([torch.nan] * 3, static, dummy=True).scale is None
    assert inputs(None, dynamic).scale is None
    assert inputs(None, dynamic).dtype == torch.float8_e4m3fn
    assert inputs([1.0], replace(static, inputs=None)) is None
    for bad in (0.0, torch.inf):
        with pytest.raises(CheckpointError, match=r"qkv_proj\.input_scale: expected positive numbers, found \[1\.0, "):
            inputs([1.0, bad], static)


def test_fp8_values_that_are_nan_are_refused():
    from maskpro_serve.quantization.loaded import loaded_dense

    weight = torch.zeros(8, 16).to(torch.float8_e4m3fn)
    weight.view(torch.uint8)[3, 4] = 0xFF
    layer = SimpleNamespace(weight=torch.nn.Parameter(weight, requires_grad=False), weight_scale=torch.ones(8, 1))
    layer.weight.complete, layer.weight_scale.complete = True, True
    with pytest.raises(CheckpointError, match=r"^up_proj\.weight: expected numbers, found NaN$"):
        loaded_dense(layer, LegacyFormat.pattern, "up_proj", dummy=False)


@pytest.mark.vllm
def test_what_becomes_of_activations_is_said(monkeypatch, caplog):
    from maskpro_serve.quantization import config as module

    # Not caplog's messages: pytest hears vLLM's loggers by itself, but only if vLLM was imported before the test.
    messages = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: messages.append(record.getMessage()))
    logger = logging.getLogger("vllm.maskpro")
    monkeypatch.setattr(logger, "handlers", [handler])
    said = {}
    exact = f"cpu-{available_isas()[0]}"
    for cuda, kernel in ((False, exact), (True, "auto")):
        monkeypatch.setenv("MASKPRO_KERNEL", kernel)
        monkeypatch.setattr(module.current_platform, "is_cuda", lambda cuda=cuda: cuda, raising=False)
        messages.clear()
        with caplog.at_level(logging.INFO, logger="vllm.maskpro"):
            module.MaskProConfig.from_config(quantization(INT8))
        said[cuda] = messages.copy()
    assert said[False] == ["maskpro: activations are not quantized: 8-bit weights are multiplied by them as they are"]
    assert len(said[True]) == 1
    assert said[True][0].startswith("maskpro: activations are rounded to 8 bits where that is measured to be faster")
    monkeypatch.setattr(module.current_platform, "is_cuda", lambda: False, raising=False)
    messages.clear()
    with caplog.at_level(logging.INFO, logger="vllm.maskpro"):
        module.MaskProConfig.from_config(quantization(INT8))
    if exact == "cpu-amx-bf16" or not isa_available("avx512-vnni"):
        assert messages == said[False]
    else:
        hint = f"MASKPRO_KERNEL={exact} leaves them as they are"
        assert messages == [f"maskpro: activations are rounded to 8 bits, as this checkpoint allows; {hint}"]


@pytest.mark.vllm
def test_vllm_asks_us_first_and_gets_others_back():
    from vllm.model_executor.layers.quantization import get_quantization_config

    from maskpro_serve.plugin import register

    for _ in range(2):  # vLLM loads a plugin in every process, maybe twice
        register()
    method = get_quantization_config("maskpro")
    assert method.override_quantization_method(quantization(DENSE), None, hf_config=None) == "maskpro"
    other = changed(quantization(DENSE), "sparsity_config/sparsity_structure", "unstructured")
    assert method.override_quantization_method(other, None, hf_config=None) is None
    with pytest.raises(CheckpointError, match="strategy: expected channel or tensor, found 'group'"):
        method.from_config(changed(quantization(INT8), f"{WEIGHTS}/strategy", "group"))


@pytest.mark.vllm
@pytest.mark.parametrize("name", [DENSE, "bitmask-bf16"])
def test_plain_weights_may_be_fused_whatever_is_said_of_their_zeros(name):
    from vllm.model_executor.layers.linear import LinearBase

    from maskpro_serve.quantization.config import MaskProConfig
    from maskpro_serve.quantization.linear import NMLinearMethod

    up, fused = UP, UP.replace("up_proj", "gate_up_proj")
    config = MaskProConfig.from_config(changed(quantization(name), "sparsity_config/ignore", ["lm_head", up]))
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}
    layer = LinearBase.__new__(LinearBase)
    if name == DENSE:
        assert isinstance(config.get_quant_method(layer, fused), NMLinearMethod)
    else:
        with pytest.raises(CheckpointError, match=r"vLLM fuses .* not all packed, and quantized, in the same way"):
            config.get_quant_method(layer, fused)


@pytest.mark.vllm
def test_packed_rows_that_vllm_would_reorder_are_refused():
    from transformers import Llama4TextConfig, LlamaConfig
    from vllm.model_executor.layers.linear import LinearBase

    from maskpro_serve.quantization.config import MaskProConfig

    layer, query = LinearBase.__new__(LinearBase), UP.replace("mlp.up_proj", "self_attn.q_proj")
    for stored, model, refused in (
        ("bitmask-bf16", Llama4TextConfig(), True),
        ("bitmask-bf16", LlamaConfig(), False),
        (DENSE, Llama4TextConfig(), False),
    ):
        config = MaskProConfig.from_config(quantization(stored))
        config.maybe_update_config("nowhere", model)
        config.get_quant_method(layer, UP)
        if refused:
            with pytest.raises(
                CheckpointError, match=r"q_proj: expected a dense weight, found a packed one: vLLM reor"
            ):
                config.get_quant_method(layer, query)
        else:
            config.get_quant_method(layer, query)


@pytest.mark.vllm
def test_names_that_vllm_changes_are_known_in_both_ways():
    from vllm.model_executor.models.utils import WeightsMapper

    from maskpro_serve.quantization.config import MaskProConfig

    mapper = WeightsMapper(orig_to_new_prefix={"model.": "decoder."}, orig_to_new_substr={".conv.": ".short_conv."})
    packed = {"quant_method": "maskpro", "format": "nm-bitmask", "format_version": 1, "pattern": "2:4"}
    config = MaskProConfig.from_config(packed | {"ignore": ["model.layers.0.conv.in_proj", "lm_head"]})
    for _ in range(2):
        config.apply_vllm_mapper(mapper)
        assert config.format.ignore == (
            "model.layers.0.conv.in_proj", "lm_head", "decoder.layers.0.short_conv.in_proj",
        )  # fmt: skip
    legacy = quantization(INT8)
    legacy["sparsity_config"] |= {"targets": ["re:model.*up_proj", "Linear"], "ignore": [UP]}
    down = UP.replace("up_proj", "down_proj")
    legacy["config_groups"]["group_0"]["targets"] = [down]
    config = MaskProConfig.from_config(legacy)
    config.apply_vllm_mapper(mapper)
    assert config.format.targets == ("re:model.*up_proj", "Linear")
    assert config.format.scheme(UP.replace("model.", "decoder.", 1)) is None
    assert config.format.scheme(down.replace("model.", "decoder.", 1)).values == torch.int8


DAMAGES = {
    "a bitmask with 3 of 4": (
        lambda t: t[f"{UP}.bitmask"].__setitem__((5, 2), t[f"{UP}.bitmask"][5, 2] | 0x0F),
        rf"{UP}.bitmask: mask is not strictly 2:4: row 5, group 4",
    ),
    "a missing part": (lambda t: t.pop(f"{UP}.bitmask"), rf"tensor {UP}.bitmask is missing"),
    "a missing scale": (lambda t: t.pop(f"{UP}.weight_scale"), rf"{UP}: expected a packed weight with a weight_scale"),
    "a missing input scale": (lambda t: t.pop(f"{UP}.input_scale"), rf"tensor {UP}.input_scale is missing"),
    "a scale of another strategy": (
        lambda t: t.__setitem__(f"{UP}.weight_scale", torch.ones(96, 1)),
        rf"{UP}.weight_scale: expected a 16 or 32 bit float \(1,\), found torch.float32 \(96, 1\)",
    ),
    "a scale of NaN": (
        lambda t: t.__setitem__(f"{UP}.weight_scale", torch.tensor([torch.nan])),
        rf"{UP}.weight_scale: expected finite scales, found inf or NaN",
    ),
    "values of another dtype": (
        lambda t: t.__setitem__(f"{UP}.compressed", t[f"{UP}.compressed"].bfloat16()),
        rf"{UP}.compressed: expected torch.int8, as config.json says, found torch.bfloat16",
    ),
    "a dense twin": (
        lambda t: t.__setitem__(f"{UP}.weight", torch.zeros(96, 64)),
        rf"{UP}.weight: unexpected, {UP} is also there packed",
    ),
    "a packed head": (
        lambda t: t.__setitem__("lm_head.compressed", torch.zeros(128, 32, dtype=torch.int8)),
        "lm_head: an output head that is packed or quantized cannot be served",
    ),
    "a layer less": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("model.layers.1.self_attn.q_proj")],
        r"targets: model\.layers\.1\.self_attn\.q_proj: no such layer in the checkpoint",
    ),
    "a layer that is not packed": (
        lambda t: t.__setitem__(f"{O_PROJ}.weight_scale", torch.ones(1)),
        rf"{O_PROJ}: expected a dense weight without a weight_scale, as config.json says, found a dense weight with",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_named(tmp_path, damage):
    change, message = DAMAGES[damage]
    folder = shutil.copytree(FIXTURES / "bitmask-int8-tensor-static", tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        check_served(folder, contents=True)
    assert str(folder) in str(caught.value)


def test_a_shard_of_the_index_is_missed(tmp_path):
    folder = shutil.copytree(FIXTURES / "bitmask-bf16", tmp_path / "sharded")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: no such file"):
        check_served(folder, contents=False)


def test_a_checkpoint_of_another_kind_is_left_alone(tmp_path):
    folder = shutil.copytree(FIXTURES / "dense-bf16", tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["sparsity_config"]["sparsity_structure"] = "unstructured"
    (folder / "config.json").write_text(json.dumps(config))
    assert check_served(folder, contents=True) is None
