"""Every way a model may be opened for measuring, against the model it must equal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from maskpro_kernels import (
    LowRank,
    MaskFileError,
    NMPattern,
    RecoveryFileError,
    read_masks,
    recovered,
    write_masks,
    write_recovery,
)
from maskpro_kernels.model_folder import CheckpointError
from maskpro_kernels.packing import magnitude_mask
from maskpro_learner import LearnerError, ModelError, initial_masks
from maskpro_learner.checkpoints import load_model
from maskpro_learner.packed_model import load_for_evaluation, load_packed_model, packed_format
from maskpro_serve import convert

PATTERN = NMPattern.parse("2:4")
Edit = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def packed(model_folder: Path, mask_file: Path, tmp_path: Path) -> Path:
    """The tiny model, packed."""
    convert(model_folder, tmp_path / "packed", mask=mask_file)
    return tmp_path / "packed"


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(torch.arange(24)[None]).logits


def test_a_packed_model_is_the_masked_model(model_folder: Path, mask_file: Path, packed: Path) -> None:
    dense = load_for_evaluation(str(model_folder), None, torch.float32)
    masked = load_for_evaluation(str(model_folder), mask_file, torch.float32)
    unpacked = load_for_evaluation(str(packed), None, torch.float32)
    assert (dense.kind, masked.kind, unpacked.kind) == ("dense", "masked", "packed")
    assert (dense.pattern, masked.pattern, unpacked.pattern) == (None, PATTERN, PATTERN)
    assert masked.provenance == unpacked.provenance == {"method": "random"}
    assert torch.equal(logits(masked.model), logits(unpacked.model))
    assert not torch.equal(logits(dense.model), logits(masked.model))
    assert not any(parameter.requires_grad for parameter in unpacked.model.parameters())
    assert not unpacked.model.training


def test_int8_values_are_multiplied_by_their_scale(model_folder: Path, mask_file: Path, tmp_path: Path) -> None:
    convert(model_folder, tmp_path / "int8", mask=mask_file, values="int8")
    rounded, _ = load_packed_model(str(tmp_path / "int8"), torch.float32)
    masked = load_for_evaluation(str(model_folder), mask_file, torch.float32).model
    expected = dict(masked.named_parameters())
    linears = read_masks(mask_file).masks
    for name, parameter in rounded.named_parameters():
        error = (parameter - expected[name]).abs().amax(-1)
        level = expected[name].abs().amax(-1) / 127
        assert (error <= 0.5001 * level).all() if name in linears else torch.equal(parameter, expected[name]), name


def test_activations_are_rounded_where_the_checkpoint_allows_it(
    model_folder: Path, mask_file: Path, tmp_path: Path
) -> None:
    """What a packed linear is given, to 255 levels a token; the head's stays as it is."""
    convert(model_folder, tmp_path / "w8", mask=mask_file, values="int8")
    convert(model_folder, tmp_path / "w8a8", mask=mask_file, values="int8", activations="int8")
    exact, _ = load_packed_model(str(tmp_path / "w8"), torch.float32)
    rounding, _ = load_packed_model(str(tmp_path / "w8a8"), torch.float32)
    x = torch.randn(2, 3, exact.config.hidden_size)
    largest = x.abs().amax(-1, keepdim=True)
    linears = {name.removesuffix(".weight") for name in read_masks(mask_file).masks}
    twins = dict(exact.named_modules())
    for name, module in rounding.named_modules():
        if isinstance(module, torch.nn.Linear) and module.in_features == x.shape[-1]:
            given = (x / largest * 127).round() * largest / 127 if name in linears else x
            torch.testing.assert_close(module(x), twins[name](given), rtol=1e-5, atol=1e-6)
    assert not torch.equal(logits(rounding), logits(exact))
    measured = load_for_evaluation(str(tmp_path / "w8a8"), None, torch.float32)
    assert (measured.provenance["values"], measured.provenance["activations"]) == ("int8", "int8")
    assert torch.equal(logits(measured.model), logits(rounding))


def tied_model(model: PreTrainedModel, root: Path) -> tuple[Path, Path]:
    """A folder of the model, its head now tied to its embedding, and the file of a magnitude mask for it."""
    model.config.tie_word_embeddings = True
    model.tie_weights()
    folder, mask = root / "tied", root / "mask.safetensors"
    model.save_pretrained(folder)
    write_masks(mask, initial_masks(model, PATTERN, "magnitude").masks, PATTERN)
    return folder, mask


def test_the_head_is_rounded_where_the_checkpoint_allows_it(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    """To 255 levels a row; the embedding that it is tied to stays as it is."""
    tied, mask = tied_model(tiny_model(), tmp_path)
    convert(tied, tmp_path / "exact", mask=mask)
    convert(tied, tmp_path / "rounded", mask=mask, head="int8")
    exact, _ = load_packed_model(str(tmp_path / "exact"), torch.float32)
    measured = load_for_evaluation(str(tmp_path / "rounded"), None, torch.float32)
    assert measured.provenance["head"] == "int8"
    stored, weight = exact.get_output_embeddings().weight, measured.model.get_output_embeddings().weight
    assert torch.equal(measured.model.get_input_embeddings().weight, stored)
    levels = weight / stored.abs().amax(1, keepdim=True) * 127
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert ((weight - stored).abs() <= 0.5001 * stored.abs().amax(1, keepdim=True) / 127).all()
    assert not torch.equal(weight, stored)
    ids = torch.arange(12).unsqueeze(0)
    hidden = exact.model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(measured.model(input_ids=ids).logits, hidden @ weight.T)


def test_dtype_is_the_one_asked_for(packed: Path) -> None:
    model, _ = load_packed_model(str(packed), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_real_model_in_bfloat16(test_data: Path, tmp_path: Path) -> None:
    folder = test_data / "stories15M"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    mask = tmp_path / "mask.safetensors"
    write_masks(mask, initial_masks(model, PATTERN, "magnitude").masks, PATTERN)
    convert(folder, tmp_path / "packed", mask=mask)
    masked = load_for_evaluation(str(folder), mask, torch.float32)
    unpacked = load_for_evaluation(str(tmp_path / "packed"), None, torch.float32)
    assert torch.equal(logits(masked.model), logits(unpacked.model))
    assert unpacked.model.generation_config.to_dict() == masked.model.generation_config.to_dict()


def test_tied_embeddings_stay_tied(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    tied, mask = tied_model(tiny_model(), tmp_path)
    convert(tied, tmp_path / "packed", mask=mask)
    unpacked, _ = load_packed_model(str(tmp_path / "packed"), torch.float32)
    assert unpacked.get_output_embeddings().weight is unpacked.get_input_embeddings().weight
    masked = load_for_evaluation(str(tied), mask, torch.float32)
    assert torch.equal(logits(unpacked), logits(masked.model))


def test_the_parts_of_a_linear_may_lie_in_different_files(packed: Path) -> None:
    expected = logits(load_packed_model(str(packed), torch.float32)[0])
    tensors = load_file(packed / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, packed / file)
    (packed / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (packed / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(load_packed_model(str(packed), torch.float32)[0]), expected)


def test_a_packed_model_from_the_hub(packed: Path, on_the_hub: Callable[[str, Path], None]) -> None:
    on_the_hub("somebody/sparse", packed)
    model, pattern = load_packed_model("somebody/sparse", torch.float32)
    assert pattern == PATTERN
    assert torch.equal(logits(model), logits(load_packed_model(str(packed), torch.float32)[0]))


def test_a_mask_made_for_other_weights_is_said_to_be(
    model_folder: Path, tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    masks = initial_masks(tiny_model(), PATTERN, "magnitude").masks
    path = tmp_path / "mask.safetensors"
    write_masks(path, masks, PATTERN, provenance={"base_model": "twin", "base_model_sha256": "0" * 64})
    (warning,) = load_for_evaluation(str(model_folder), path, torch.float32).warnings
    assert "made for weights of another hash (twin)" in warning


NAME = "model.layers.1.mlp.up_proj"


def flip(tensors: dict[str, Tensor]) -> None:
    tensors[f"{NAME}.bitmask"][3, 1] ^= 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(f"{NAME}.shape"), rf"{NAME}\.shape: listed in .* but missing"),
        (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight: listed in .* but missing"),
        (lambda t: t.update(extra=torch.ones(2)), "extra: unexpected, not listed in"),
        (flip, rf"model\.safetensors: {NAME}\.bitmask: mask is not strictly 2:4: row 3, group 2"),
        (lambda t: t.update({f"{NAME}.shape": torch.ones(2, dtype=torch.int64)}), r"shape: expected int64 \(2, "),
        (
            lambda t: t.update({f"{NAME}.compressed": torch.ones((64, 8))}),
            rf"{NAME}\.compressed: expected shape \(64, 16\) .* found \(64, 8\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(7)}),
            r"model\.norm\.weight: expected shape \(32,\), found \(7,\)",
        ),
    ],
)
def test_a_broken_checkpoint_is_one_sentence(packed: Path, edit: Edit, message: str) -> None:
    tensors = load_file(packed / "model.safetensors")
    edit(tensors)
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises((CheckpointError, ModelError), match=message) as raised:
        load_packed_model(str(packed), torch.float32)
    assert "\n" not in str(raised.value)


def test_broken_files(packed: Path, model_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"expected quantization_config\.quant_method 'maskpro', found none"):
        load_packed_model(str(model_folder), torch.float32)
    index = packed / "model.safetensors.index.json"
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="not a readable index"):
        load_packed_model(str(packed), torch.float32)
    index.unlink()
    (packed / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_packed_model(str(packed), torch.float32)
    (packed / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load_packed_model(str(packed), torch.float32)


def edit_format(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def test_formats(packed: Path, model_folder: Path, tmp_path: Path) -> None:
    assert packed_format(str(model_folder)) is None
    edit_format(packed, pattern="two of four")
    with pytest.raises(CheckpointError, match=r"config\.json: .*'two of four'"):
        load_packed_model(str(packed), torch.float32)
    edit_format(packed, format_version=2)
    with pytest.raises(CheckpointError, match="format_version: expected 1, found 2"):
        packed_format(str(packed))
    (packed / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"packed: not a readable config\.json"):
        packed_format(str(packed))
    with pytest.raises(ModelError, match="nowhere: no such model folder"):
        packed_format("nowhere")


def test_masks_that_do_not_go_with_the_model(packed: Path, mask_file: Path, test_data: Path) -> None:
    with pytest.raises(LearnerError, match=r"expected a dense --model, found .*packed, which is packed already"):
        load_for_evaluation(str(packed), mask_file, torch.float32)
    with pytest.raises(ModelError, match="expected a weight of shape"):
        load_for_evaluation(str(test_data / "stories260K"), mask_file, torch.float32)
    with pytest.raises(MaskFileError, match="no such mask file"):
        load_for_evaluation(str(test_data / "stories260K"), packed / "absent.safetensors", torch.float32)


def test_a_recovery_is_merged_under_the_mask(model_folder, tmp_path):
    dense = load_for_evaluation(str(model_folder), None, torch.float32).model
    name = "model.layers.1.mlp.up_proj.weight"
    weight = dict(dense.named_parameters())[name]
    mask = magnitude_mask(weight, PATTERN)
    generator = torch.Generator().manual_seed(0)
    rows, columns = weight.shape
    update = LowRank(torch.randn(rows, 2, generator=generator), torch.randn(2, columns, generator=generator))
    masks, recovery = tmp_path / "m.safetensors", tmp_path / "r.safetensors"
    write_masks(masks, {name: mask}, PATTERN)
    write_recovery(recovery, {name: update})
    found = dict(
        load_for_evaluation(str(model_folder), masks, torch.float32, recovery=recovery).model.named_parameters()
    )
    assert torch.equal(found[name], recovered(weight, mask, update.rounded()))
    with pytest.raises(LearnerError, match="expected the --mask that it was made with"):
        load_for_evaluation(str(model_folder), None, torch.float32, recovery=recovery)
    write_recovery(recovery, {name: update}, provenance={"mask_sha256": "0" * 64})
    with pytest.raises(RecoveryFileError, match=r"mask_sha256: expected [0-9a-f]{64}, the one of .* found 0{64}"):
        load_for_evaluation(str(model_folder), masks, torch.float32, recovery=recovery)
    write_recovery(recovery, {name: LowRank(update.b[:4], update.a)})
    with pytest.raises(ModelError, match=r"up_proj\.weight: recovery: expected an update of shape"):
        load_for_evaluation(str(model_folder), masks, torch.float32, recovery=recovery)
    write_recovery(recovery, {"x.weight": update})
    with pytest.raises(ModelError, match=r"x\.weight: expected an update of a masked weight"):
        load_for_evaluation(str(model_folder), masks, torch.float32, recovery=recovery)


def test_a_packed_folder_is_no_dense_model(model_folder, mask_file, tmp_path):
    convert(model_folder, tmp_path / "packed", mask=mask_file)
    with pytest.raises(ModelError, match="expected a dense model, found one that maskpro-pack has packed"):
        load_model(str(tmp_path / "packed"), torch.float32)
