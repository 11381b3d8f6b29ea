"""maskpro-pack inspect: what it says against what the folder holds."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path

import pytest
from processes import ONE_SCALE, needs_vnni
from safetensors.torch import load_file, save_file

from maskpro_kernels import NMWeight
from maskpro_kernels._cpu import available_isas
from maskpro_serve import convert, load_packed
from maskpro_serve.pack_cli import main

UP_PROJ = "model.layers.0.mlp.up_proj"
LEGACY = Path(__file__).parent.parent / "fixtures" / "legacy"


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


@needs_vnni
def test_the_kernel_that_rounds_is_named_where_that_is_allowed(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MASKPRO_KERNEL", "cpu-avx512-vnni")
    convert(tiny["dense"], tmp_path / "w8a8", mask=tiny["mask"], values="int8", activations="int8")
    for folder in (tmp_path / "w8a8", ONE_SCALE):
        assert {layer["backends"]["cpu"] for layer in inspect(capsys, folder)["layers"]} == {"cpu-avx512-vnni"}
    (kernel,) = {layer["backends"]["cpu"] for layer in inspect(capsys, tiny["int8"])["layers"]}
    assert kernel == f"cpu-{available_isas()[0]}"


def test_the_table(tiny, capsys):
    assert main(["inspect", str(tiny["packed"])]) == 0
    shown = capsys.readouterr().out
    assert "packed 2:4, 21 linears" in shown
    assert "(0.56" in shown
    assert "model.layers.*.mlp.up_proj" in shown
    assert "may round" not in shown


def test_what_may_be_rounded_is_said(tiny, tmp_path, capsys):
    convert(tiny["dense"], tmp_path / "all", mask=tiny["mask"], values="int8", activations="int8", head="int8")
    assert inspect(capsys, tmp_path / "all")["may_round"] == ["activations", "head"]
    assert main(["inspect", str(tmp_path / "all")]) == 0
    assert "a server may round to 8 bits: activations, head\n" in capsys.readouterr().out
    assert inspect(capsys, ONE_SCALE)["may_round"] == ["activations"]
    assert inspect(capsys, tiny["int8"])["may_round"] == []


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


def test_legacy_dense_w8a8(capsys):
    """The linears are those with a scale; one of the fixture's was left without zeros."""
    found = inspect(capsys, LEGACY / "dense-int8-channel-dynamic")
    assert found["kind"] == "dense"
    sampled = {layer["name"]: layer["sampled"] for layer in found["layers"]}
    assert len(sampled) == 14
    assert [name for name, pattern in sampled.items() if pattern != "2:4"] == ["model.layers.1.self_attn.o_proj"]
    assert {layer["dtype"] for layer in found["layers"]} == {"int8"}


def test_a_damaged_legacy_checkpoint_is_one_sentence(tmp_path, capsys):
    folder = shutil.copytree(LEGACY / "bitmask-bf16", tmp_path / "model")
    (file,) = [path for path in folder.glob("*.safetensors") if f"{UP_PROJ}.bitmask" in load_file(path)]
    tensors = load_file(file)
    del tensors[f"{UP_PROJ}.bitmask"]
    save_file(tensors, file, {"format": "pt"})
    assert main(["inspect", str(folder)]) == 2
    assert f"tensor {UP_PROJ}.bitmask is missing" in capsys.readouterr().err


def renamed(folder, tmp_path, name: str):
    """A copy of a packed folder in which one layer has another name."""
    copy = shutil.copytree(folder, tmp_path / "renamed")
    tensors = load_file(copy / "model.safetensors")
    tensors = {key.replace(UP_PROJ, name): tensor for key, tensor in tensors.items()}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    (copy / "model.safetensors.index.json").unlink()
    return copy


def test_names_are_shown_as_they_are(tiny, tmp_path, capsys):
    """Square brackets are no markup."""
    folder = renamed(tiny["packed"], tmp_path, "model.[/bold]up_proj")
    assert main(["inspect", str(folder)]) == 0
    assert "model.[/bold]up_proj" in capsys.readouterr().out


def test_names_that_would_change_the_terminal_are_refused(tiny, tmp_path, capsys):
    folder = renamed(tiny["packed"], tmp_path, "model.\x1b[2Jup_proj")
    assert main(["inspect", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "cannot be printed: 'model.\\x1b[2Jup_proj" in error
    assert "\x1b" not in error


def test_a_folders_own_code_is_never_run(tiny, tmp_path, capsys, monkeypatch):
    """Not even where someone answers yes to what transformers asks."""
    folder = shutil.copytree(tiny["dense"], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    ours = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": ours}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert main(["inspect", str(folder)]) == 2
    assert "transformers cannot build this model" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_pipe_is_no_file(tiny, tmp_path, capsys, name):
    folder = shutil.copytree(tiny["dense"], tmp_path / "model")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert main(["inspect", str(folder)]) == 2
    assert name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "(a dense model), found 'gptq'",
        ),
        ({"model_type": "nothing"}, "transformers cannot build this model"),
        ({"num_hidden_layers": 200_000}, "num_hidden_layers: 200000 layers cannot be in the 29 tensors there are"),
    ],
)
def test_others_are_one_sentence(tiny, tmp_path, capsys, config, message):
    folder = shutil.copytree(tiny["dense"], tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    assert main(["inspect", str(folder)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
