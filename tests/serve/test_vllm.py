"""A packed model in a real vLLM engine says what its unpacked twin says."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from processes import GREEDY, greedy_tokens, needs_vnni, run_python, serve_greedily
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from maskpro_kernels.model_folder import INDEX
from maskpro_learner.packed_model import load_packed_model
from maskpro_serve import convert

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


def test_packed_equals_its_unpacked_twin(tiny, greedy):
    packed = greedy["packed"]
    assert packed == greedy["pruned"]
    assert len({token for row in packed for token in row}) > 5  # not one token over and over
    # The same weights run by transformers.
    model = AutoModelForCausalLM.from_pretrained(tiny["pruned"], dtype=torch.float32)
    ids = torch.arange(40, 73).unsqueeze(0)
    length = {"max_new_tokens": 24, "min_new_tokens": 24}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)
    # min_new_tokens forbids the end token, which vLLM may choose: compare up to its first appearance.
    tokens = packed[1][: packed[1].index(2)] if 2 in packed[1] else packed[1]
    assert tokens == expected[0, 33 : 33 + len(tokens)].tolist()


def test_int8_values_equal_their_unpacked_twin(greedy):
    """The twin holds what the levels stand for."""
    assert greedy["int8"] == greedy["twin"]
    assert greedy["int8"] != greedy["packed"]


@needs_vnni
def test_activations_are_rounded_where_the_checkpoint_allows_it(tiny, tmp_path, monkeypatch):
    """The tokens of the model that maskpro-eval measures."""
    folder, prompts = tmp_path / "w8a8", [list(range(3, 8)), list(range(40, 73))]
    convert(tiny["dense"], folder, mask=tiny["mask"], values="int8", activations="int8")
    (folder / "expected.json").write_text(json.dumps({"prompts": prompts}))
    monkeypatch.setenv("MASKPRO_KERNEL", "cpu-avx512-vnni")
    (document,), log = serve_greedily([folder], tmp_path)
    assert "maskpro: activations are rounded to 8 bits" in log
    assert "linear layers: 21 on cpu-avx512-vnni" in log
    model, _ = load_packed_model(str(folder), torch.float32)
    count = len(document["tokens"][0])
    assert document["tokens"] == greedy_tokens(model, prompts, count)
    exact, _ = load_packed_model(str(tiny["int8"]), torch.float32)
    assert document["tokens"] != greedy_tokens(exact, prompts, count)  # or this would show nothing


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_rounded_where_the_checkpoint_allows_it(tiny, tmp_path, tied):
    """The tokens of the model that maskpro-eval measures."""
    folder, prompts = tmp_path / "head", [list(range(3, 8)), list(range(40, 73))]
    convert(tiny["dense"], folder, mask=tiny["mask"], values="int8", head="int8")
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    tensors["model.embed_tokens.weight"][:, 0] = 8  # the same for every token, but rounding gets coarse by it
    if not tied:
        config["tie_word_embeddings"] = False
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"]["lm_head.weight"] = "model.safetensors"
        (folder / INDEX).write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    (folder / "expected.json").write_text(json.dumps({"prompts": prompts}))
    (document,), log = serve_greedily([folder], tmp_path)
    assert "maskpro: the output head is rounded to 8 bits" in log
    assert document["head"]
    model, _ = load_packed_model(str(folder), torch.float32)
    count = len(document["tokens"][0])
    assert document["tokens"] == greedy_tokens(model, prompts, count)
    assert config["quantization_config"].pop("head") == "int8"
    (folder / "config.json").write_text(json.dumps(config))
    exact, _ = load_packed_model(str(folder), torch.float32)
    assert document["tokens"] != greedy_tokens(exact, prompts, count)  # or this would show nothing


def test_the_reference_serves_as_well(tiny, greedy, monkeypatch, tmp_path):
    monkeypatch.setenv("MASKPRO_KERNEL", "reference")
    (document,), _ = serve_greedily([tiny["int8"]], tmp_path)
    assert not document["head"]
    assert document["tokens"] == greedy["int8"]


def test_a_damaged_checkpoint_stops_the_engine_with_our_sentence(tiny, tmp_path):
    folder = shutil.copytree(tiny["packed"], tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 256
    (folder / "config.json").write_text(json.dumps(config))
    run = run_python(GREEDY, tmp_path / "tokens.json", "{}", folder)
    assert run.returncode != 0
    sentence = r"model\.layers\.0\.mlp\.\w+\.\w+: expected shape \(\d+, \d+\) from the model's config.json, found \("
    assert re.search(sentence, run.stderr + run.stdout)


def test_dummy_weights_need_no_files(tiny, tmp_path):
    folders = [tmp_path / name for name in ("packed", "int8")]
    for folder in folders:
        folder.mkdir()
        shutil.copy(tiny[folder.name] / "config.json", folder)
    documents, log = serve_greedily(folders, tmp_path, load_format="dummy")
    assert [len(tokens) for document in documents for tokens in document["tokens"]] == [24] * 6
    assert log.count("2:4 linear layers: 21 on ") == 2
