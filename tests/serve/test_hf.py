"""transformers on packed folders: the numbers, the memory and the files of the dense twin with zeros."""

from __future__ import annotations

import json
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import maskpro_serve.hf  # noqa: F401  (registers the quantizer)
from maskpro_kernels import NMPattern, NMWeight, unpack
from maskpro_serve import CheckpointError, convert, load_packed
from maskpro_serve.checkpoint import PackedFormat
from maskpro_serve.nm_module import NMLinear

LAYER = "model.layers.1.mlp.up_proj"
TOKENS = torch.arange(3, 35).reshape(2, 16)


def load(folder, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def logits(model):
    with torch.inference_mode():
        return model(TOKENS).logits


def same(a, b) -> bool:
    """Whether two packed folders hold the same config and tensors."""
    (config, weights), (other, others) = load_packed(a), load_packed(b)
    assert config["quantization_config"] == other["quantization_config"]
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        its = others[name]
        if isinstance(weight, NMWeight):
            assert torch.equal(weight.values, its.values), name
            assert torch.equal(weight.bitmask, its.bitmask), name
            assert weight.shape == its.shape
            assert weight.scale is None or torch.equal(weight.scale, its.scale)
        else:
            assert weight.dtype == its.dtype
            assert torch.equal(weight, its), name
    return True


@pytest.fixture
def twin(tiny, tmp_path):
    """A dense folder with the very weights of a packed one, unpacked."""

    def build(packed):
        folder = shutil.copytree(tiny["dense"], tmp_path / "twin")
        weights = load_packed(packed)[1]
        dense = {n: unpack(w) if isinstance(w, NMWeight) else w for n, w in weights.items()}
        save_file(
            {name: tensor.contiguous() for name, tensor in dense.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        return folder

    return build


@pytest.mark.parametrize("kind", ["packed", "int8"])
def test_forward_and_greedy_tokens_are_the_dense_twin_s(tiny, twin, kind):
    model, dense = load(tiny[kind], torch.float32), load(twin(tiny[kind]), torch.float32)
    assert sum(isinstance(module, NMLinear) for module in model.modules()) == 21
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    settings = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(TOKENS, **settings), dense.generate(TOKENS, **settings))


def test_memory_is_that_of_the_packed_weights(tiny):
    weights = load_packed(tiny["packed"])[1]
    shapes = sum(16 for weight in weights.values() if isinstance(weight, NMWeight))
    expected = sum(weight.nbytes for weight in weights.values()) + shapes
    model = load(tiny["packed"])
    assert expected <= model.get_memory_footprint() <= 1.01 * expected  # the rotary embedding's frequencies
    logits(model)
    assert model.get_memory_footprint() <= 1.01 * expected


@pytest.mark.parametrize("kind", ["packed", "int8"])
def test_save_pretrained_gives_the_folder_back(tiny, tmp_path, kind):
    model = load(tiny[kind])
    model.save_pretrained(tmp_path / "again")
    assert same(tiny[kind], tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_saved_from_another_dtype_it_still_serves_in_its_own(tiny, tmp_path, dtype):
    """config.json then has the dtype it was loaded in; the kept values have not."""
    from maskpro_serve.quantization.config import MaskProConfig

    load(tiny["packed"], dtype).save_pretrained(tmp_path / "again")
    said = json.loads((tmp_path / "again" / "config.json").read_text())["dtype"]
    assert said == str(dtype).removeprefix("torch.")
    config = MaskProConfig(PackedFormat(NMPattern(2, 4)))
    config.maybe_update_config(str(tmp_path / "again"), hf_config=SimpleNamespace(dtype=dtype))
    assert config.stored == torch.bfloat16


def test_a_pickled_model_is_settled_where_it_is_read(tiny):
    model = load(tiny["packed"])
    text = pickle.dumps(model)
    assert len(text) < 1.1 * model.get_memory_footprint()
    assert torch.equal(logits(pickle.loads(text)), logits(model))


def test_another_pattern_with_a_layer_left_dense(tiny, tmp_path):
    pattern = NMPattern(3, 8)
    model = shutil.copytree(tiny["dense"], tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    for name, tensor in tensors.items():
        if "proj" in name and "layers.2" not in name:
            tensor.reshape(-1, pattern.m)[:, 1:6] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    convert(model, tmp_path / "packed", pattern=pattern)
    packed = load(tmp_path / "packed", torch.float32)
    assert sum(isinstance(module, NMLinear) for module in packed.modules()) == 14
    torch.testing.assert_close(logits(packed), logits(load(model, torch.float32)), rtol=1e-4, atol=1e-4)
    packed.save_pretrained(tmp_path / "again")


def test_casts_and_state_dicts(tiny):
    model = load(tiny["int8"], torch.float32)
    cast = load(tiny["int8"], torch.float32).to(torch.bfloat16).to(torch.float32)
    kept = load(tiny["packed"]).to(torch.float32)
    values = {module.packed().values.dtype for module in kept.modules() if isinstance(module, NMLinear)}
    assert values == {torch.bfloat16}
    assert torch.equal(logits(kept), logits(load(tiny["packed"], torch.float32)))
    scales = [module.weight_scale for module in cast.modules() if isinstance(module, NMLinear)]
    assert {scale.dtype for scale in scales} == {torch.float32}
    for module, its in zip(model.modules(), cast.modules(), strict=True):
        if isinstance(module, NMLinear):
            assert torch.equal(module.weight_scale, its.weight_scale)
            assert torch.equal(module.interleaved, its.interleaved)
    other = load(tiny["int8"], torch.float32)
    for module in other.modules():
        if isinstance(module, NMLinear):
            module.interleaved.zero_()
            module.weight_scale.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))


def test_the_base_model_alone(tiny):
    base = AutoModel.from_pretrained(tiny["packed"], dtype=torch.float32)
    whole = load(tiny["packed"], torch.float32)
    with torch.inference_mode():
        assert torch.equal(base(TOKENS).last_hidden_state, whole.model(TOKENS).last_hidden_state)


def test_the_reference_kernel_is_served_too(tiny, monkeypatch):
    expected = logits(load(tiny["packed"], torch.float32))
    monkeypatch.setenv("MASKPRO_KERNEL", "reference")
    torch.testing.assert_close(logits(load(tiny["packed"], torch.float32)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[f"{LAYER}.bitmask"].fill_(255), rf"{LAYER}\.bitmask: mask is not strictly 2:4: row 0, group 0"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"norm\.weight: expected shape \(128,\) .* \(7,\)"),
        (lambda t: t.pop(f"{LAYER}.shape"), rf"{LAYER}\.shape: listed in .* but missing"),
    ],
)
def test_damage_is_one_sentence(tiny, tmp_path, change, message):
    folder = shutil.copytree(tiny["packed"], tmp_path / "packed")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_another_configuration_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny["packed"], tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with pytest.raises(CheckpointError, match=r"down_proj\.compressed: expected a 2:4 weight of 128 x 256"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(CheckpointError, match=r"the model of config\.json has no linear layer model\.layers\.2"):
        load(folder)


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_s_own_model_scores_as_on_the_dense_twin(test_data, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    assert lm_eval
    source = test_data / "stories260K"
    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "pruned")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "pruned")
    tensors = load_file(tmp_path / "pruned" / "model.safetensors")
    for name, tensor in tensors.items():
        if "proj" in name:
            tensor.reshape(-1, 4)[:, ::2] = 0
    save_file(tensors, tmp_path / "pruned" / "model.safetensors", {"format": "pt"})
    convert(tmp_path / "pruned", tmp_path / "packed", pattern="auto")
    pairs = [("Once upon a time", " there was a little girl"), ("Tom had a", " red ball."), ("The dog", " ran away")]
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    scores = [
        HFLM(pretrained=str(tmp_path / name), device="cpu", batch_size=2).loglikelihood(requests, disable_tqdm=True)
        for name in ("packed", "pruned")
    ]
    for (packed, greedy), (dense, its) in zip(*scores, strict=True):
        assert packed == pytest.approx(dense, abs=1e-3)
        assert greedy == its
