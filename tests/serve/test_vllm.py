"""A packed model in a real vLLM engine says what its unpacked twin says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from processes import run_python
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from maskpro_kernels import NMWeight, unpack
from maskpro_serve import load_packed

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

GREEDY = Path(__file__).parent / "greedy.py"


@pytest.fixture
def greedy(tmp_path):
    """Runs vLLM on a model folder, in processes of its own; checks whether the head was interleaved."""

    def run(folder: Path, *, head: bool) -> list[list[int]]:
        output = tmp_path / f"{folder.name}.json"
        finished = run_python(GREEDY, folder, output)
        assert finished.returncode == 0, finished.stderr[-3000:]
        document = json.loads(output.read_text())
        assert document["head"] == head
        return document["tokens"]

    return run


def test_packed_equals_its_unpacked_twin(tiny, greedy):
    packed = greedy(tiny["packed"], head=True)
    assert packed == greedy(tiny["pruned"], head=False)
    assert len({token for row in packed for token in row}) > 5  # not one token over and over
    # The same weights run by transformers.
    model = AutoModelForCausalLM.from_pretrained(tiny["pruned"], dtype=torch.float32)
    ids = torch.arange(40, 73).unsqueeze(0)
    length = {"max_new_tokens": 24, "min_new_tokens": 24}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **length)
    # min_new_tokens forbids the end token, which vLLM may choose: compare up to its first appearance.
    tokens = packed[1][: packed[1].index(2)] if 2 in packed[1] else packed[1]
    assert tokens == expected[0, 33 : 33 + len(tokens)].tolist()


def test_int8_values_equal_their_unpacked_twin(tiny, greedy, tmp_path):
    """The twin holds what the levels stand for, in float32."""
    config, weights = load_packed(tiny["int8"])
    del config["quantization_config"]
    twin = tmp_path / "twin"
    twin.mkdir()
    (twin / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    dense = {name: unpack(weight) if isinstance(weight, NMWeight) else weight for name, weight in weights.items()}
    save_file({name: tensor.float().contiguous() for name, tensor in dense.items()}, twin / "model.safetensors")
    assert greedy(tiny["int8"], head=True) == greedy(twin, head=False)


def test_the_reference_serves_as_well(tiny, greedy, monkeypatch):
    monkeypatch.setenv("MASKPRO_KERNEL", "reference")
    assert len(greedy(tiny["int8"], head=False)) == 3


def test_a_damaged_checkpoint_stops_the_engine_with_our_sentence(tiny, tmp_path):
    folder = shutil.copytree(tiny["packed"], tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 256
    (folder / "config.json").write_text(json.dumps(config))
    run = run_python(GREEDY, folder, tmp_path / "tokens.json")
    assert run.returncode != 0
    sentence = r"model\.layers\.0\.mlp\.\w+\.\w+: expected shape \(\d+, \d+\) from the model's config.json, found \("
    assert re.search(sentence, run.stderr + run.stdout)
