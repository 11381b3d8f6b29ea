"""Packed checkpoints: what is written is read back exactly, and every damage is one clear error."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskpro_kernels import (
    LowRank,
    NMWeight,
    RecoveryFileError,
    read_masks,
    recovered,
    unpack,
    write_masks,
    write_recovery,
)
from maskpro_kernels.packing import magnitude_mask
from maskpro_serve import CheckpointError, convert, load_packed
from maskpro_serve.checkpoint import check_checkpoint

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture
def packed(tiny, tmp_path):
    """A copy of the packed tiny model, to damage."""
    return shutil.copytree(tiny["packed"], tmp_path / "packed")


def edit(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def test_unpacks_to_the_pruned_weights_bit_for_bit(tiny):
    config, weights = load_packed(tiny["packed"])
    pruned = load_file(tiny["pruned"] / "model.safetensors")
    assert config["quantization_config"]["pattern"] == "2:4"
    assert weights.keys() == pruned.keys()
    for name, weight in weights.items():
        dense = unpack(weight) if isinstance(weight, NMWeight) else weight
        assert torch.equal(dense + 0.0, pruned[name] + 0.0), name
    sparse = [weight for weight in weights.values() if isinstance(weight, NMWeight)]
    assert len(sparse) == 3 * 7
    assert sum(w.nbytes for w in sparse) == 0.5625 * sum(w.dense_nbytes for w in sparse)


def test_int8_values_are_within_half_a_level(tiny):
    config, weights = load_packed(tiny["int8"])
    pruned = load_file(tiny["pruned"] / "model.safetensors")
    assert config["quantization_config"]["values"] == "int8"
    sparse = {name: weight for name, weight in weights.items() if isinstance(weight, NMWeight)}
    assert len(sparse) == 3 * 7
    for name, weight in sparse.items():
        assert weight.values.dtype == torch.int8
        assert weight.values.abs().max() == 127
        error = (unpack(weight) - pruned[name].float()).abs()
        assert (error <= 0.5001 * weight.scale.unsqueeze(1)).all(), name
        assert error.max() > 0
    columns = {name: weight.shape[1] for name, weight in sparse.items()}
    stored = sum(weight.nbytes - weight.scale.nbytes for weight in sparse.values())
    assert stored == 5 / 8 * sum(weight.shape[0] * columns[name] for name, weight in sparse.items())


def test_zeros_are_a_mask(tiny, tmp_path):
    report = convert(tiny["pruned"], tmp_path / "out", pattern=read_masks(tiny["mask"]).pattern)
    assert len(report.packed) == 21
    assert not report.dense
    before, after = load_packed(tiny["packed"])[1], load_packed(tmp_path / "out")[1]
    for name, weight in before.items():
        if isinstance(weight, NMWeight):
            assert torch.equal(unpack(weight) + 0.0, unpack(after[name]) + 0.0)


def test_a_dense_model_without_mask_is_not_pruned(tiny, tmp_path):
    with pytest.raises(CheckpointError, match="no linear satisfies 2:4"):
        convert(tiny["dense"], tmp_path / "out", pattern=read_masks(tiny["mask"]).pattern)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_left_alone(tiny, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="already exists"):
        convert(tiny["dense"], tmp_path / "out", mask=tiny["mask"])


def test_a_mask_of_another_model_is_refused_before_writing(tiny, tmp_path):
    masks = read_masks(tiny["mask"])
    renamed = {name.replace("layers.2", "layers.9"): mask for name, mask in masks.masks.items()}
    write_masks(tmp_path / "mask", renamed, masks.pattern)
    with pytest.raises(CheckpointError, match=r"layers\.9.*the model has no such weight"):
        convert(tiny["dense"], tmp_path / "out", mask=tmp_path / "mask")
    assert not (tmp_path / "out").exists()


def test_a_part_is_missed_without_an_index_too(packed):
    (packed / "model.safetensors.index.json").unlink()
    check_checkpoint(packed, contents=True)
    edit(packed, lambda t: t.pop(f"{LAYER}.bitmask"))
    with pytest.raises(CheckpointError, match=rf"tensor {LAYER}.bitmask is missing"):
        check_checkpoint(packed, contents=True)


def test_a_mask_of_something_else_than_a_linear_is_refused(tiny, tmp_path):
    masks = read_masks(tiny["mask"])
    embedding = load_file(tiny["dense"] / "model.safetensors")["model.embed_tokens.weight"]
    more = masks.masks | {"model.embed_tokens.weight": magnitude_mask(embedding, masks.pattern)}
    write_masks(tmp_path / "mask", more, masks.pattern)
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight: .* linear layers only"):
        convert(tiny["dense"], tmp_path / "out", mask=tmp_path / "mask")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes", [{"num_attention_heads": 0}, {"hidden_size": "x"}, {"intermediate_size": -8}], ids=str
)
def test_an_impossible_configuration_is_one_sentence(tiny, tmp_path, changes):
    model = shutil.copytree(tiny["dense"], tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="transformers cannot build this model") as caught:
        convert(model, tmp_path / "out", mask=tiny["mask"])
    assert "\n" not in str(caught.value)


DAMAGES = {
    "a bitmask with 3 of 4": (
        lambda t: t[f"{LAYER}.bitmask"].__setitem__((5, 2), t[f"{LAYER}.bitmask"][5, 2] | 0x0F),
        rf"{LAYER}.bitmask: mask is not strictly 2:4: row 5, group 4 \(columns 16 to 19\) keeps 4 of 4",
    ),
    "a shape that disagrees": (
        lambda t: t.__setitem__(f"{LAYER}.shape", torch.tensor([[192], [64]])),
        rf"{LAYER}.compressed: expected shape \(192, 32\) .* found \(192, 64\)",
    ),
    "a shape no group divides": (
        lambda t: t.__setitem__(f"{LAYER}.shape", torch.tensor([[192], [-2]])),
        rf"{LAYER}.shape: \(192, -2\) is no shape",
    ),
    "a missing part": (lambda t: t.pop(f"{LAYER}.bitmask"), rf"{LAYER}.bitmask: listed in .* but missing"),
    "a missing dense tensor": (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight: listed in .* but missing"),
    "a dense twin": (
        lambda t: t.__setitem__(f"{LAYER}.weight", torch.zeros(192, 128)),
        rf"{LAYER}.weight: unexpected, {LAYER} is also there packed",
    ),
    "an unknown tensor": (lambda t: t.__setitem__("extra", torch.zeros(3)), "extra: unexpected, not listed in"),
    "a wrong dtype": (
        lambda t: t.__setitem__(f"{LAYER}.bitmask", t[f"{LAYER}.bitmask"].to(torch.int64)),
        rf"{LAYER}.bitmask: expected torch.uint8, found torch.int64",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors_are_named(packed, damage):
    change, message = DAMAGES[damage]
    edit(packed, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        check_checkpoint(packed, contents=True)
    assert str(packed) in str(caught.value)


def test_provenance_cannot_change_the_format(tiny, tmp_path):
    file = read_masks(tiny["mask"])
    mask = tmp_path / "mask"
    write_masks(mask, file.masks, file.pattern, provenance={"values": "int8", "method": "magnitude"})
    convert(tiny["dense"], tmp_path / "packed", mask=mask)
    assert check_checkpoint(tmp_path / "packed", contents=True).values is None


def test_a_scale_without_int8_values_is_refused(packed):
    edit(packed, lambda t: t.__setitem__(f"{LAYER}.weight_scale", torch.ones(192, 1)))
    (packed / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=rf"{LAYER}.weight_scale: unexpected, config.json does not say"):
        check_checkpoint(packed, contents=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LAYER}.weight_scale"), rf"{LAYER}.weight_scale: listed in .* but missing"),
        (
            lambda t: t.__setitem__(f"{LAYER}.weight_scale", torch.ones(192)),
            rf"{LAYER}.weight_scale: expected a 16 or 32 bit float \(192, 1\), found torch.float32 \(192,\)",
        ),
        (
            lambda t: t[f"{LAYER}.weight_scale"].__setitem__((7, 0), torch.nan),
            rf"{LAYER}.weight_scale: expected finite scales, found inf or NaN",
        ),
        (
            lambda t: t.__setitem__(f"{LAYER}.compressed", t[f"{LAYER}.compressed"].float()),
            rf"{LAYER}.compressed: expected torch.int8, as config.json says, found torch.float32",
        ),
    ],
)
def test_damaged_int8_values_are_named(tiny, tmp_path, change, message):
    folder = shutil.copytree(tiny["int8"], tmp_path / "int8")
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(folder, contents=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": "int4"}, "values: expected 'int8' or none, found 'int4'"),
        ({"values": "int8"}, r"weight_scale is missing, but other parts"),
        ({"values": "int8", "activations": "int4"}, "activations: expected 'int8' or none, found 'int4'"),
        ({"activations": "int8"}, "activations: expected none without int8 values, found 'int8'"),
        ({"head": 8}, "head: expected 'int8' or none, found 8"),
        ({"format_version": 2}, "format_version: expected 1, found 2; it was written by a newer maskpro-serve"),
        ({"format_version": None}, "format_version: expected 1, found None"),
        ({"pattern": "2:5"}, "pattern: .*m must be one of"),
        ({"pattern": "many"}, "unknown sparsity pattern 'many'"),
        ({"format": "zip"}, "format: expected 'nm-bitmask', found 'zip'"),
        ({"ignore": "lm_head"}, "ignore: expected a list"),
    ],
)
def test_a_wrong_quantization_config_is_named(packed, changes, message):
    edit_config(packed, **changes)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(packed, contents=False)


def test_truncated_and_missing_files_are_named(packed, tmp_path):
    weights = packed / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        check_checkpoint(packed, contents=False)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: no such file"):
        check_checkpoint(packed, contents=False)
    (packed / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        check_checkpoint(packed, contents=False)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_packed(tmp_path / "nowhere")
    (packed / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        load_packed(packed)


def test_an_index_cannot_point_outside(packed):
    index = {"weight_map": {"a": "../../etc/passwd"}}
    (packed / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected a file name"):
        check_checkpoint(packed, contents=False)


def _update(rows: int, columns: int) -> LowRank:
    generator = torch.Generator().manual_seed(7)
    return LowRank(0.1 * torch.randn(rows, 2, generator=generator), 0.1 * torch.randn(2, columns, generator=generator))


@pytest.fixture
def recovery(tiny, tmp_path):
    """A recovery file for one layer of the tiny model, made for its mask."""
    shape = read_masks(tiny["mask"]).masks[f"{LAYER}.weight"].shape
    path = tmp_path / "recovery.safetensors"
    digest = hashlib.sha256(tiny["mask"].read_bytes()).hexdigest()
    write_recovery(path, {f"{LAYER}.weight": _update(*shape)}, provenance={"mask_sha256": digest, "rank": "2"})
    return path


def test_a_recovery_is_merged_into_the_kept_weights(tiny, tmp_path, recovery):
    convert(tiny["dense"], tmp_path / "out", mask=tiny["mask"], recovery=recovery)
    config, after = load_packed(tmp_path / "out")
    before = load_packed(tiny["packed"])[1]
    assert config["quantization_config"]["recovery"]["rank"] == "2"
    for name, weight in before.items():
        if not isinstance(weight, NMWeight):
            continue
        assert torch.equal(weight.bitmask, after[name].bitmask)
        assert torch.equal(weight.values, after[name].values) == (name != f"{LAYER}.weight")
    dense = load_file(tiny["dense"] / "model.safetensors")[f"{LAYER}.weight"]
    mask = read_masks(tiny["mask"]).masks[f"{LAYER}.weight"]
    expected = recovered(dense, mask, _update(*mask.shape).rounded())
    assert torch.equal(unpack(after[f"{LAYER}.weight"]), expected)


def test_a_recovery_of_another_mask_or_model_is_refused(tiny, tmp_path, recovery):
    with pytest.raises(CheckpointError, match="needs the mask file"):
        convert(tiny["pruned"], tmp_path / "out", pattern=read_masks(tiny["mask"]).pattern, recovery=recovery)
    write_recovery(recovery, {f"{LAYER}.weight": _update(4, 4)}, provenance={"mask_sha256": "0" * 64})
    with pytest.raises(RecoveryFileError, match=r"mask_sha256: expected [0-9a-f]{64}, the one of .* found 0{64}"):
        convert(tiny["dense"], tmp_path / "out", mask=tiny["mask"], recovery=recovery)
    write_recovery(recovery, {f"{LAYER}.weight": _update(4, 4)})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight: expected shape .* found \(4, 4\)"):
        convert(tiny["dense"], tmp_path / "out", mask=tiny["mask"], recovery=recovery)
    write_recovery(recovery, {"model.embed_tokens.weight": _update(320, 128)})
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: the mask file has no mask for it"):
        convert(tiny["dense"], tmp_path / "out", mask=tiny["mask"], recovery=recovery)
    assert not (tmp_path / "out").exists()
