"""maskpro-pack: patterns found by their zeros, masks from elsewhere, and conversions that are killed and run again."""

from __future__ import annotations

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import run_python
from safetensors.torch import load_file, save_file

from maskpro_kernels import MaskFileError, NMPattern, NMWeight, base_model, read_masks, unpack, write_masks
from maskpro_kernels.base_model import weights_sha256
from maskpro_kernels.model_folder import TensorInfo
from maskpro_kernels.packing import magnitude_mask
from maskpro_kernels.recovery import LowRank, write_recovery
from maskpro_kernels.servable import why_dense
from maskpro_serve import CheckpointError, convert, load_packed, shard_writer
from maskpro_serve.pack_cli import main
from maskpro_serve.partial_output import partial_output
from maskpro_serve.zero_patterns import find_zeros

LAYER = "model.layers.1.mlp.up_proj.weight"


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite(folder, change):
    """Changes the tensors of a dense folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def prune(folder, pattern, but=()):
    """Magnitude-prunes every decoder linear, but some."""

    def change(tensors):
        for name, tensor in tensors.items():
            if "proj" in name and name not in but:
                tensors[name] = torch.where(magnitude_mask(tensor, pattern), tensor, 0)

    return rewrite(folder, change)


def same_weights(packed, pruned) -> None:
    dense = load_file(pruned / "model.safetensors")
    for name, weight in load_packed(packed)[1].items():
        unpacked = unpack(weight) if isinstance(weight, NMWeight) else weight
        assert torch.equal(unpacked + 0.0, dense[name] + 0.0), name


@pytest.mark.parametrize("text", ["2:4", "1:4", "4:8", "5:8", "3:16"])
def test_auto_finds_the_pattern(tiny, tmp_path, text):
    model = prune(shutil.copytree(tiny["dense"], tmp_path / "model"), NMPattern.parse(text))
    report = convert(model, tmp_path / "out", pattern="auto")
    assert str(report.pattern) == text
    assert set(report.found.values()) == {text}
    assert (len(report.packed), report.dense) == (21, {})
    same_weights(tmp_path / "out", model)


def test_auto_decides_by_bytes_and_reports_each_layer(tiny, tmp_path, capsys):
    dense_layer, thin, uneven = LAYER, LAYER.replace("up", "down"), LAYER.replace("up", "gate")
    model = prune(shutil.copytree(tiny["dense"], tmp_path / "model"), NMPattern(2, 4), but=(dense_layer,))
    rewrite(model, lambda tensors: tensors[thin].zero_())
    rewrite(model, lambda tensors: tensors[uneven][3, 4:8].fill_(1.0))
    assert main(["--model", str(model), "--pattern", "auto", "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "19 linears packed 2:4" in shown
    assert "zeros satisfy 1:32: 1 linears" in shown
    for name in (dense_layer, uneven):
        prefix = name.removesuffix(".weight")
        assert f"left dense: {prefix}: its zeros do not satisfy 2:4: a group keeps 4 of 4" in shown
        assert prefix in load_packed(tmp_path / "out")[0]["quantization_config"]["ignore"]
    same_weights(tmp_path / "out", model)


def test_what_vllm_fuses_is_packed_as_a_whole(tiny, tmp_path):
    """Or the checkpoint could not be served."""
    up, key = LAYER, next(name for name in load_file(tiny["dense"] / "model.safetensors") if "k_proj" in name)
    model = prune(shutil.copytree(tiny["dense"], tmp_path / "model"), NMPattern(2, 4), but=(up, key))
    masks = read_masks(tiny["mask"])
    left = {name: mask for name, mask in masks.masks.items() if name not in (up, key)}
    write_masks(tmp_path / "mask.safetensors", left, masks.pattern)
    by_zeros = convert(model, tmp_path / "zeros", pattern=NMPattern(2, 4))
    by_masks = convert(tiny["dense"], tmp_path / "masks", mask=tmp_path / "mask.safetensors")
    fused = {
        up.replace("up", "gate"): "up_proj", key.replace("k_proj", "q_proj"): "k_proj",
        key.replace("k_proj", "v_proj"): "k_proj",
    }  # fmt: skip
    for report in (by_zeros, by_masks):
        assert len(report.packed) == 16
        for name, other in fused.items():
            prefix = name.removesuffix(".weight")
            expected = f"vLLM fuses it with {prefix.rpartition('.')[0]}.{other}, which stays dense"
            assert report.dense[prefix] == expected


def test_what_is_half_of_a_fused_layer_decides_nothing(tiny, tmp_path):
    """Of q, k and v one alone is 1:4, which cannot be packed: the 6:8 of others counts."""

    def sparse(tensors):
        for name, tensor in tensors.items():
            if "proj" in name:
                pattern = NMPattern(1, 4) if "q_proj" in name else NMPattern(6, 8) if "down" in name else None
                if pattern is not None:
                    tensors[name] = torch.where(magnitude_mask(tensor, pattern), tensor, 0)

    model = rewrite(shutil.copytree(tiny["dense"], tmp_path / "model"), sparse)
    report = convert(model, tmp_path / "out", pattern="auto")
    assert str(report.pattern) == "6:8"
    assert {name.rpartition(".")[2] for name in report.packed} == {"down_proj"}
    with pytest.raises(CheckpointError, match=r"q_proj: cannot be packed: vLLM fuses it with .*k_proj, which stays"):
        convert(model, tmp_path / "none", pattern=NMPattern(1, 4))
    masks = read_masks(tiny["mask"])
    left = {name: mask for name, mask in masks.masks.items() if "q_proj" in name}
    write_masks(tmp_path / "mask.safetensors", left, masks.pattern)
    with pytest.raises(CheckpointError, match=r"mask.safetensors: no linear of .* can be packed: .*q_proj: vLLM fuses"):
        convert(tiny["dense"], tmp_path / "none", mask=tmp_path / "mask.safetensors")


def test_what_vllm_keeps_dense():
    assert why_dense("model.layers.0.mlp.gate", 8) == "a router, which vLLM keeps dense"
    assert why_dense("model.layers.0.feed_forward.router", 8) == "a router, which vLLM keeps dense"
    assert why_dense("model.layers.0.mlp.shared_expert_gate", 1) == "a gate of one output, which vLLM keeps dense"
    assert why_dense("transformer.blocks.0.ffn.router.layer", 8) == "a router, which vLLM keeps dense"
    assert why_dense("model.layers.0.mlp.gate.wg", 8) == "a router, which vLLM keeps dense"
    assert why_dense("model.layers.0.mlp.gate_proj", 64) is None
    assert "Mamba" in (why_dense("model.layers.0.mamba.in_proj", 64, "jamba") or "")
    assert why_dense("model.layers.0.mixer.in_proj", 64, "mamba2") is None
    assert "reorders" in (why_dense("transformer.h.0.self_attention.query_key_value", 64, "bloom") or "")
    assert why_dense("gpt_neox.layers.0.attention.query_key_value", 64, "gpt_neox") is None


def test_auto_refuses_a_dense_model(tiny, tmp_path):
    with pytest.raises(CheckpointError, match=r"dense: a dense model: the zeros of its 21 linears satisfy no N:M"):
        convert(tiny["dense"], tmp_path / "out", pattern="auto")
    with pytest.raises(CheckpointError, match="auto is for a model's own zeros"):
        convert(tiny["dense"], tmp_path / "out", mask=tiny["mask"], pattern="auto")
    assert list(tmp_path.iterdir()) == []


@given(
    n=st.integers(0, 8), m=st.sampled_from([4, 8, 16, 32]), groups=st.integers(1, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_zeros_are_counted_as_a_loop_counts_them(tmp_path_factory, n, m, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.rand(3, m * groups, generator=generator) < n / 8).float()
    file = tmp_path_factory.mktemp("zeros") / "w.safetensors"
    save_file({"w": weight}, file)
    found = find_zeros(TensorInfo(file, "w", torch.float32, tuple(weight.shape)))
    for size in (4, 8, 16, 32):
        if weight.shape[1] % size:
            assert size not in found.most
        else:
            counts = [int(row[i : i + size].sum()) for row in weight for i in range(0, len(row), size)]
            assert found.most[size] == max(counts)


LEGACY = {
    "quant_method": "compressed-tensors",
    "config_groups": {},
    "format": "dense",
    "ignore": ["lm_head"],
    "sparsity_config": {"format": "dense", "sparsity_structure": "2:4", "targets": ["Linear"], "ignore": ["lm_head"]},
}


@pytest.mark.parametrize(
    ("pattern", "key"), [(None, "quantization_config"), ("auto", "quantization_config"), (None, "compression_config")]
)
def test_a_legacy_sparsity_config_of_format_dense_is_dropped(tiny, tmp_path, pattern, key):
    model = shutil.copytree(tiny["pruned"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {key: LEGACY}
    (model / "config.json").write_text(json.dumps(config))
    report = convert(model, tmp_path / "out", pattern=pattern)
    assert (str(report.pattern), len(report.packed)) == ("2:4", 21)
    written = load_packed(tmp_path / "out")[0]
    assert written["quantization_config"]["quant_method"] == "maskpro"
    assert "compression_config" not in written
    same_weights(tmp_path / "out", model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "with a sparsity_config of format 'sparse-24-b"),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 8}}}}, "config_groups: expected none, the weights are"),
        ({"quant_method": "gptq"}, r"format 'dense' \(a dense model\), found 'gptq'"),
        ({"sparsity_config": {"format": "dense", "sparsity_structure": "0:0"}}, "--pattern must say"),
    ],
)
def test_other_quantized_models_are_refused(tiny, tmp_path, change, message):
    model = shutil.copytree(tiny["pruned"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": LEGACY | change}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        convert(model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture(scope="module")
def sources(tiny, tmp_path_factory):
    """The tiny model's masks in every format: a mask file, MaskLLM's npz, a folder of .pt files, a pruned model."""
    folder = tmp_path_factory.mktemp("masks")
    masks = read_masks(tiny["mask"]).masks
    np.savez(folder / "mask.npz", **{f"{name}.mask": np.packbits(mask.numpy()) for name, mask in masks.items()})
    (folder / "torch").mkdir()
    for name, mask in masks.items():
        torch.save(mask, folder / "torch" / f"{name.removesuffix('.weight')}.pt")
    return {"file": tiny["mask"], "npz": folder / "mask.npz", "torch": folder / "torch", "zeros": tiny["pruned"]}


@pytest.mark.parametrize("source", ["npz", "torch", "zeros"])
@pytest.mark.parametrize("block", [1 << 24, 1000])
def test_masks_from_elsewhere_pack_the_same(tiny, sources, tmp_path, monkeypatch, source, block):
    monkeypatch.setattr("maskpro_kernels.model_folder.BLOCK", block)
    report = convert(tiny["dense"], tmp_path / "out", mask=sources[source], pattern=NMPattern(2, 4))
    assert len(report.packed) == 21
    assert files(tmp_path / "out")["model.safetensors"] == files(tiny["packed"])["model.safetensors"]
    with pytest.raises(MaskFileError, match="it does not say its pattern"):
        convert(tiny["dense"], tmp_path / "again", mask=sources[source])


def test_layers_that_transformers_leaves_out_are_listed_as_dense(tiny, tmp_path):
    """Multi-token prediction's, which vLLM builds like the others: as packed, unless the config says otherwise."""
    model = shutil.copytree(tiny["dense"], tmp_path / "model")
    names = ["model.layers.3.eh_proj", "model.layers.3.mlp.up_proj"]
    rewrite(model, lambda tensors: tensors.update({f"{name}.weight": torch.ones(8, 8) for name in names}))
    report = convert(model, tmp_path / "out", mask=tiny["mask"])
    assert (len(report.packed), report.dense) == (21, {})
    _, found = load_packed(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"] == [
        "lm_head", *names,
    ]  # fmt: skip
    assert torch.equal(found[f"{names[1]}.weight"], torch.ones(8, 8))


def test_tensors_of_other_names_are_said(tiny, tmp_path):
    model = shutil.copytree(tiny["dense"], tmp_path / "model")
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    message = r"model: expected tensors named as transformers does, model\.layers\.0\.\S+ and so on, found \w+"
    with pytest.raises(CheckpointError, match=message):
        convert(model, tmp_path / "out", mask=tiny["mask"])


@pytest.mark.parametrize("values", [None, "int8"])
def test_weights_read_in_parts_are_packed_as_in_one(tiny, tmp_path, monkeypatch, values):
    """Above all, each part's rows of the update and its scales."""
    generator = torch.Generator().manual_seed(4)
    update = LowRank(torch.randn(192, 3, generator=generator), torch.randn(3, 128, generator=generator) / 50)
    recovery = tmp_path / "recovery.safetensors"
    write_recovery(recovery, {LAYER: update})
    convert(tiny["dense"], tmp_path / "whole", mask=tiny["mask"], recovery=recovery, values=values)
    monkeypatch.setattr("maskpro_kernels.model_folder.BLOCK", 1000)
    convert(tiny["dense"], tmp_path / "parts", mask=tiny["mask"], recovery=recovery, values=values)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_zeros_are_counted_in_every_part(tiny, tmp_path, monkeypatch):
    model = prune(shutil.copytree(tiny["dense"], tmp_path / "model"), NMPattern(2, 4))

    def change(tensors):
        tensors[LAYER][0, 8:12] = 1

    rewrite(model, change)
    monkeypatch.setattr("maskpro_kernels.model_folder.BLOCK", 1000)
    report = convert(model, tmp_path / "out", pattern="auto")
    assert report.dense[LAYER.removesuffix(".weight")] == "its zeros do not satisfy 2:4: a group keeps 4 of 4"


@pytest.mark.parametrize("source", ["npz", "torch"])
def test_a_loose_mask_is_named(tiny, sources, tmp_path, source):
    mask = read_masks(tiny["mask"]).masks[LAYER].clone()
    mask[150, 8:12] = True
    path = tmp_path / "mask"
    if source == "npz":
        path = path.with_suffix(".npz")
        arrays = dict(np.load(sources["npz"]))
        np.savez(path, **arrays | {f"{LAYER}.mask": np.packbits(mask.numpy())})
    else:
        shutil.copytree(sources["torch"], path)
        torch.save(mask, path / f"{LAYER.removesuffix('.weight')}.pt")
    with pytest.raises(MaskFileError, match=r"up_proj\.weight: .* row 150, group 2 .* keeps 4 of 4, expected 2; 1 of"):
        convert(tiny["dense"], tmp_path / "out", mask=path, pattern=NMPattern(2, 4))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.partial").exists()


def test_a_kept_zero_of_a_maskllm_archive_is_kept(tiny, sources, tmp_path):
    """Such an archive does not tell it from a dropped weight; the mask that does gives the same file."""
    model = shutil.copytree(tiny["dense"], tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    mask = read_masks(tiny["mask"]).masks[LAYER]
    row, columns = 7, mask[7, :4].nonzero().flatten()
    tensors[LAYER][row, columns] = 0  # both that are kept
    tensors[LAYER][row + 1, mask[row + 1].nonzero()[0]] = 0
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    loose = np.packbits((mask & (tensors[LAYER] != 0)).numpy())
    np.savez(tmp_path / "mask.npz", **dict(np.load(sources["npz"])) | {f"{LAYER}.mask": loose})
    convert(model, tmp_path / "out", mask=tmp_path / "mask.npz", pattern=NMPattern(2, 4))
    convert(model, tmp_path / "expected", mask=tiny["mask"])
    assert files(tmp_path / "out")["model.safetensors"] == files(tmp_path / "expected")["model.safetensors"]


def test_a_maskllm_archive_that_keeps_too_little_is_refused(tiny, sources, tmp_path):
    mask = read_masks(tiny["mask"]).masks[LAYER].clone()
    mask[150, 8:12] = False  # none of these weights is zero
    np.savez(tmp_path / "mask.npz", **dict(np.load(sources["npz"])) | {f"{LAYER}.mask": np.packbits(mask.numpy())})
    with pytest.raises(MaskFileError, match=r"up_proj\.weight: .* row 150, group 2 .* keeps 0 of 4, expected 2; 1 of"):
        convert(tiny["dense"], tmp_path / "out", mask=tmp_path / "mask.npz", pattern=NMPattern(2, 4))


KILLED = """
import os, signal, sys
import maskpro_serve.shard_writer as module
from maskpro_serve import convert
count = int(sys.argv[3])
put_packed = module._put_packed
def counting(*arguments):
    global count
    count -= 1
    if not count:
        os.kill(os.getpid(), signal.SIGKILL)
    put_packed(*arguments)
module._put_packed = counting
convert(sys.argv[1], sys.argv[2], pattern="auto", shard_bytes=100_000)
"""


def test_a_killed_conversion_goes_on_to_the_same_bytes(tiny, tmp_path):
    convert(tiny["pruned"], tmp_path / "whole", pattern="auto", shard_bytes=100_000)
    expected = files(tmp_path / "whole")
    assert len(list((tmp_path / "whole").glob("model-*-of-*.safetensors"))) > 4
    work = tmp_path / ".out.partial"
    for count in (8, 13):
        run = run_python("-c", KILLED, tiny["pruned"], tmp_path / "out", count)
        assert run.returncode == -signal.SIGKILL, run.stderr
        assert not (tmp_path / "out").exists()
    before = {path: path.stat().st_mtime_ns for path in work.glob("content/model-*")}
    assert len(before) > 1
    report = convert(tiny["pruned"], tmp_path / "out", pattern="auto", shard_bytes=100_000)
    assert report.resumed == len(before)
    assert all((tmp_path / "out" / path.name).stat().st_mtime_ns == time for path, time in before.items())
    assert files(tmp_path / "out") == expected
    assert not work.exists()


def test_equal_inputs_make_equal_bytes(tiny, tmp_path):
    """What a mask says of itself is read in another order each time."""
    said = {f"key {number}": "value" for number in range(12)}
    write_masks(tmp_path / "mask.safetensors", read_masks(tiny["mask"]).masks, NMPattern(2, 4), provenance=said)
    for name in ("one", "two"):
        convert(tiny["dense"], tmp_path / name, mask=tmp_path / "mask.safetensors")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_a_mask_of_other_weights_is_said_to_be(tiny, tmp_path, capsys):
    mask, of_these = tmp_path / "mask.safetensors", weights_sha256(str(tiny["dense"]))
    arguments = ["--model", str(tiny["dense"]), "--mask", str(mask), "--output"]
    for name, claim in (("same", of_these), ("other", "0" * 64)):
        made = {"base_model": "twin", "base_model_sha256": claim}
        write_masks(mask, read_masks(tiny["mask"]).masks, NMPattern(2, 4), provenance=made)
        assert main([*arguments, str(tmp_path / name)]) == 0
        warned = "was made for weights of another hash (twin): expected 000000000000, found" in capsys.readouterr().err
        assert warned == (name == "other")
        config = json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        assert made.items() <= config.items()
        assert config.get("packed_model_sha256") == (of_these if warned else None)


def test_a_model_of_the_hub(tiny, tmp_path, monkeypatch, caplog, on_the_hub):
    on_the_hub("somebody/dense", tiny["dense"])
    convert("somebody/dense", tmp_path / "out", mask=tiny["mask"])
    assert files(tmp_path / "out") == files(tiny["packed"])
    with pytest.raises(CheckpointError, match="somebody/else: no such folder, and the hub does not give it: "):
        convert("somebody/else", tmp_path / "none", mask=tiny["mask"])

    def incomplete(*_, **__):
        error = RuntimeError("README.md is missing")
        error.snapshot_path = str(tiny["dense"])
        raise error

    monkeypatch.setattr(base_model, "snapshot_download", incomplete)
    convert("somebody/some", tmp_path / "some", mask=tiny["mask"])
    assert files(tmp_path / "some") == files(tiny["packed"])
    assert "somebody/some: from the hub's cache, which has not all of it: README.md is missing" in caplog.text


def test_only_what_serves_is_copied(tiny, tmp_path):
    model = shutil.copytree(tiny["dense"], tmp_path / "model")
    for name in ("tf_model.h5", "pytorch_model.bin", "mask.checkpoint", "mask.jsonl", "model.onnx", "original.pth"):
        (model / name).write_text("weights")
    for name in ("LICENSE", "README.md", "tokenizer.model", "merges.txt", "chat_template.jinja", "modeling_own.py"):
        (model / name).write_text(name)
    convert(model, tmp_path / "out", mask=tiny["mask"])
    copied = {"LICENSE", "README.md", "tokenizer.model", "merges.txt", "chat_template.jinja", "modeling_own.py"}
    assert files(tmp_path / "out").keys() == files(tiny["packed"]).keys() | copied


def interrupt(monkeypatch, after: int) -> None:
    """Ctrl-C in the middle of a file."""
    count, put_packed = after, shard_writer._put_packed

    def counting(*arguments):
        nonlocal count
        count -= 1
        if not count:
            raise KeyboardInterrupt
        put_packed(*arguments)

    monkeypatch.setattr(shard_writer, "_put_packed", counting)


def test_an_interrupted_command_goes_on(tiny, tmp_path, monkeypatch, capsys):
    arguments = ["--model", str(tiny["dense"]), "--mask", str(tiny["mask"]), "--output", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        assert main([*arguments, "--values", "int8"]) == 130
        assert "interrupted; run it again to go on" in capsys.readouterr().err
    assert main([*arguments, "--values", "int8"]) == 0
    assert files(tmp_path / "out") == files(tiny["int8"])


def test_activations_may_be_rounded_too(tiny, tmp_path, capsys):
    """The weights are those of int8 values alone; config.json allows more."""
    arguments = ["--model", str(tiny["dense"]), "--mask", str(tiny["mask"]), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--activations", "int8"]) == 2
    assert "activations: expected none without int8 values, found 'int8'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*arguments, "--values", "int8", "--activations", "int8"]) == 0
    said = capsys.readouterr()
    assert "linears packed 2:4, values of int8, activations may be int8" in said.out
    assert "warning" not in said.err
    written, alone = files(tmp_path / "out"), files(tiny["int8"])
    allowed, expected = json.loads(written.pop("config.json")), json.loads(alone.pop("config.json"))
    assert written == alone
    assert allowed["quantization_config"].pop("activations") == "int8"
    assert allowed == expected
    report = convert(tiny["pruned"], tmp_path / "4:8", pattern=NMPattern(4, 8), values="int8", activations="int8")
    assert report.warnings == ("activations of int8: no kernel rounds them beside 4:8 weights, only beside 2:4 ones",)


def test_the_head_may_be_rounded(tiny, tmp_path, capsys):
    """It is stored as it is; config.json allows it."""
    arguments = ["--model", str(tiny["dense"]), "--mask", str(tiny["mask"]), "--output", str(tmp_path / "out")]
    assert main([*arguments, "--head", "int8"]) == 0
    assert "linears packed 2:4, head may be int8" in capsys.readouterr().out
    written, without = files(tmp_path / "out"), files(tiny["packed"])
    allowed, expected = json.loads(written.pop("config.json")), json.loads(without.pop("config.json"))
    assert written == without
    assert allowed["quantization_config"].pop("head") == "int8"
    assert allowed == expected


def test_a_partial_output_of_other_inputs_is_not_taken_up(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 13)
        with pytest.raises(KeyboardInterrupt):
            convert(tiny["pruned"], tmp_path / "out", pattern="auto", shard_bytes=100_000)
    assert len(list((tmp_path / ".out.partial").glob("content/model-*"))) > 1
    report = convert(tiny["pruned"], tmp_path / "out", pattern="auto", shard_bytes=100_000, values="int8")
    assert report.resumed == 0
    assert load_packed(tmp_path / "out")[0]["quantization_config"]["values"] == "int8"


def test_two_at_once_are_refused(tiny, tmp_path):
    with (
        partial_output(tmp_path / "out", {}),
        pytest.raises(FileExistsError, match="another process is writing"),
    ):
        convert(tiny["dense"], tmp_path / "out", mask=tiny["mask"])


def test_small_shards_are_read_back(tiny, tmp_path):
    convert(tiny["dense"], tmp_path / "out", mask=tiny["mask"], shard_bytes=1)
    whole, cut = load_packed(tiny["packed"])[1], load_packed(tmp_path / "out")[1]
    assert whole.keys() == cut.keys()
    for name, weight in whole.items():
        if isinstance(weight, NMWeight):
            assert torch.equal(weight.values, cut[name].values)
            assert torch.equal(weight.bitmask, cut[name].bitmask)
        else:
            assert torch.equal(weight, cut[name])
