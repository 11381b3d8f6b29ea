"""maskpro-pack inspect: what it says against what the folder holds."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file

from maskpro_kernels import NMWeight
from maskpro_serve import load_packed
from maskpro_serve.pack_cli import main


def inspect(capsys, folder) -> dict:
    assert main(["inspect", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", ["packed", "int8"])
def test_packed(tiny, capsys, monkeypatch, kind):
    monkeypatch.setenv("MASKPRO_KERNEL", "cpu-portable")
    found = inspect(capsys, tiny[kind])
    weights = load_packed(tiny[kind])[1]
    sparse = {name.removesuffix(".weight"): w for name, w in weights.items() if isinstance(w, NMWeight)}
    assert (found["kind"], found["pattern"]) == ("packed", "2:4")
    assert found["provenance"]["method"] == "magnitude"
    assert {layer["name"] for layer in found["layers"]} == sparse.keys()
    for layer in found["layers"]:
        weight = sparse[layer["name"]]
        assert tuple(layer["shape"]) == weight.shape
        assert layer["nbytes"] == weight.nbytes + 16
        assert layer["dense_nbytes"] == weight.dense_nbytes
        assert f"torch.{layer['dtype']}" == str(weight.values.dtype)
        assert layer["backends"]["cpu"] == "cpu-portable"
    stored = load_file(tiny[kind] / "model.safetensors")
    assert found["other_nbytes"] + sum(layer["nbytes"] for layer in found["layers"]) == sum(
        tensor.nbytes for tensor in stored.values()
    )


def test_the_table(tiny, capsys):
    assert main(["inspect", str(tiny["packed"])]) == 0
    shown = capsys.readouterr().out
    assert "packed 2:4, 21 linears" in shown
    assert "(0.56" in shown
    assert "model.layers.*.mlp.up_proj" in shown


def test_dense_ones_say_so(tiny, capsys):
    found = inspect(capsys, tiny["pruned"])
    assert (found["kind"], found["pattern"], len(found["layers"])) == ("dense", None, 21)
    assert {layer["sampled"] for layer in found["layers"]} == {"2:4"}
    assert {layer["sampled"] for layer in inspect(capsys, tiny["dense"])["layers"]} == {None}


def test_legacy_sparse_24_bitmask(tiny, tmp_path, capsys):
    folder = shutil.copytree(tiny["packed"], tmp_path / "legacy")
    config = json.loads((folder / "config.json").read_text())
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4"}
    config["quantization_config"] = {"quant_method": "compressed-tensors", "sparsity_config": sparsity}
    (folder / "config.json").write_text(json.dumps(config))
    found, packed = inspect(capsys, folder), inspect(capsys, tiny["packed"])
    assert found["kind"] == "sparse-24-bitmask"
    assert found["layers"] == packed["layers"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "(a dense model), found 'gptq'",
        ),
        ({"model_type": "nothing"}, "transformers cannot build this model"),
    ],
)
def test_others_are_one_sentence(tiny, tmp_path, capsys, config, message):
    folder = shutil.copytree(tiny["dense"], tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    assert main(["inspect", str(folder)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
