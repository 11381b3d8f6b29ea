"""Initial masks made elsewhere: every source gives the masks that were put in, and every bad one is one sentence."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from maskpro_kernels import MaskFileError, NMPattern, read_masks, write_masks
from maskpro_kernels.mask_sources import open_masks
from maskpro_kernels.model_folder import CheckpointError
from maskpro_kernels.packing import top_n_mask
from maskpro_learner import LearnerError, ModelError, initial_masks, select_layers
from maskpro_learner.cli import main
from maskpro_learner.initial_masks import InitialMasks
from maskpro_learner.mask_sources import masks_from_source

Build = Callable[..., PreTrainedModel]
PATTERN = NMPattern.parse("2:4")
UP = "model.layers.1.mlp.up_proj.weight"  # (64, 32)


def masks_from_path(
    path: Path, model: PreTrainedModel, pattern: NMPattern, *, include: Sequence[str] = ("*",)
) -> InitialMasks:
    return masks_from_source(open_masks(path, pattern), model, pattern, include=include)


@pytest.fixture
def model(tiny_model: Build) -> PreTrainedModel:
    return tiny_model()


@pytest.fixture
def masks(tiny_model: Build) -> dict[str, Tensor]:
    return dict(initial_masks(tiny_model(), PATTERN, "random", seed=7).masks)


def save_npz(path: Path, masks: dict[str, Tensor]) -> Path:
    """As MaskLLM writes it."""
    np.savez_compressed(path, **{f"{name}.mask": np.packbits(mask.numpy().flatten()) for name, mask in masks.items()})
    return path


def save_pruned(folder: Path, model: PreTrainedModel, masks: dict[str, Tensor]) -> Path:
    """A dense checkpoint with zeros, as llm-compressor writes it."""
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name: torch.where(masks.get(name, torch.tensor(True)), t, 0) for name, t in tensors.items()}, file)
    return folder


def save_torch(folder: Path, masks: dict[str, Tensor]) -> Path:
    """As the MaskPro authors write them: one file for each module."""
    folder.mkdir()
    for name, mask in masks.items():
        torch.save(mask, folder / f"{name.removesuffix('.weight')}.pt")
    return folder


def rewrite(folder: Path, name: str, tensor: Tensor | None) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file) | ({name: tensor} if tensor is not None else {})
    if tensor is None:
        del tensors[name]
    save_file(tensors, file)


def equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return list(got) == list(expected) and all(torch.equal(got[name], mask) for name, mask in expected.items())


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "3:16"])
def test_every_source_gives_the_masks_back(tiny_model: Build, tmp_path: Path, pattern: str) -> None:
    chosen = NMPattern.parse(pattern)
    masks = initial_masks(tiny_model(), chosen, "random", seed=3).masks
    ours = tmp_path / "mask.safetensors"
    write_masks(ours, masks, chosen)
    sources = [
        ours,
        save_npz(tmp_path / "mask.npz", masks),
        save_torch(tmp_path / "torch", masks),
        save_pruned(tmp_path / "pruned", tiny_model(), masks),
    ]
    for source in sources:
        result = masks_from_path(source, tiny_model(), chosen)
        assert equal(result.masks, masks), source
        assert result.dense == {}


def test_npz_bits_are_msb_first_over_the_flattened_mask(model: PreTrainedModel, tmp_path: Path) -> None:
    shapes = {name: p.shape for name, p in model.named_parameters() if "proj" in name}
    golden = {f"{name}.mask": np.full(shape.numel() // 8, 0b11000101, np.uint8) for name, shape in shapes.items()}
    np.savez(tmp_path / "mask.npz", **golden)
    row = masks_from_path(tmp_path / "mask.npz", model, PATTERN).masks[UP][5]
    assert row.tolist() == [True, True, False, False, False, True, False, True] * 4


def test_selected_layers_only(model: PreTrainedModel, masks: dict[str, Tensor], tmp_path: Path) -> None:
    some = {name: mask for name, mask in masks.items() if ".mlp." in name}
    for source in (save_npz(tmp_path / "mask.npz", some), save_pruned(tmp_path / "pruned", model, some)):
        result = masks_from_path(source, model, PATTERN, include=["*.mlp.*"])
        assert equal(result.masks, some)
        assert set(result.dense.values()) == {"not included"}
    with pytest.raises(ModelError, match="no linear layer is left"):
        masks_from_path(tmp_path / "pruned", model, PATTERN, include=["nothing"])


def test_groups_with_fewer_nonzeros_are_filled_up_by_the_model_s_largest(
    model: PreTrainedModel, masks: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = save_pruned(tmp_path / "pruned", model, masks)
    thin = load_file(folder / "model.safetensors")[UP].clone()
    thin[:, 4:8] = 0
    thin[3, 0:4] = torch.tensor([0.0, 0.0, 0.0, 1.0])
    rewrite(folder, UP, thin)
    with torch.no_grad():
        model.get_parameter(UP)[3, 0:4] = torch.tensor([0.1, -9.0, 9.0, 0.0])
        model.get_parameter(UP)[4, 4:8] = torch.tensor([torch.nan, 2.0, torch.inf, -torch.inf])
    got = masks_from_path(folder, model, PATTERN).masks[UP]
    assert got[3, 0:4].tolist() == [False, True, False, True]  # its own one, then the lower of the two largest
    assert got[4, 4:8].tolist() == [False, False, True, True]
    expected = top_n_mask(model.get_parameter(UP)[5:, 4:8].abs(), PATTERN)
    assert torch.equal(got[5:, 4:8], expected)
    assert torch.equal(got[5:, 8:], masks[UP][5:, 8:])


def test_a_group_with_too_many_nonzeros_is_named(
    model: PreTrainedModel, masks: dict[str, Tensor], tmp_path: Path
) -> None:
    folder = save_pruned(tmp_path / "pruned", model, masks)
    weight = load_file(folder / "model.safetensors")[UP].clone()
    weight[9, 12:15] = 1.0
    weight[9, 15] = torch.nan
    rewrite(folder, UP, weight)
    with pytest.raises(MaskFileError, match=r"layers\.1\.mlp\.up_proj\.weight: row 9, group 3 \(columns 12 to 15\)"):
        masks_from_path(folder, model, PATTERN)
    with pytest.raises(MaskFileError, match=r"has 4 nonzeros, expected at most 2 of 4; 1 of 512 groups"):
        masks_from_path(folder, model, PATTERN)


def npy(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def replace_member(path: Path, name: str, content: bytes) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, old in members.items():
            archive.writestr(member, content if member == name else old)


HUGE = b"\x93NUMPY\x01\x00\x76\x00" + (
    b"{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,), }".ljust(117) + b"\n"
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.packbits(np.zeros(64 * 32, bool))), r"row 0, group 0 \(columns 0 to 3\) keeps 0 of 4, expected 2"),
        (npy(np.zeros(255, np.uint8)), r"expected uint8 \(256,\) from np.packbits, found uint8 \(255,\)"),
        (npy(np.zeros((16, 16), np.uint8)), r"found uint8 \(16, 16\)"),
        (npy(np.zeros(256, np.int8)), r"found int8 \(256,\)"),
        (npy(np.zeros(1 << 20, np.uint8)), r"expected 256 bytes for shape \(64, 32\), found 10487"),
        (HUGE, r"found uint8 \(1099511627776,\)"),
        (npy(np.zeros(256, np.uint8))[:-9], "expected 256 bytes, found fewer"),
        (npy(np.zeros(256, np.uint8)) + b"more", "expected 256 bytes, found more"),
        (b"", "not an array"),
        (b"no array", "not an array"),
        (npy(np.array([{}] * 4), allow_pickle=True), r"found object \(4,\)"),
    ],
    ids=["loose", "short", "shape", "dtype", "bomb", "header", "cut", "longer", "empty", "text", "pickle"],
)
def test_hostile_npz(
    model: PreTrainedModel, masks: dict[str, Tensor], tmp_path: Path, content: bytes, message: str
) -> None:
    path = save_npz(tmp_path / "mask.npz", masks)
    replace_member(path, f"{UP}.mask.npy", content)
    with pytest.raises(MaskFileError, match=message) as raised:
        masks_from_path(path, model, PATTERN)
    assert f"{path}: {UP}: " in str(raised.value)


def test_npz_of_another_model_or_no_npz(model: PreTrainedModel, masks: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "mask.npz"
    save_npz(path, {name: mask for name, mask in masks.items() if name != UP})
    with pytest.raises(MaskFileError, match=r"up_proj\.weight: expected a mask of shape .*, found None"):
        masks_from_path(path, model, PATTERN)
    save_npz(path, masks | {"model.layers.2.mlp.up_proj.weight": masks[UP]})
    with pytest.raises(LearnerError, match=r"layers\.2\.mlp\.up_proj\.weight: a mask for no selected layer"):
        masks_from_path(path, model, PATTERN)
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(MaskFileError, match=r"expected keys <weight>\.mask, found 'weights'"):
        masks_from_path(path, model, PATTERN)
    for content in (b"", b"PK nothing", save_npz(tmp_path / "good.npz", masks).read_bytes()[:-30]):
        path.write_bytes(content)
        with pytest.raises(MaskFileError, match="not a readable npz file"):
            masks_from_path(path, model, PATTERN)
    bits = np.packbits(masks[UP].numpy().flatten())
    np.savez(path, **{f"{name}.mask": np.packbits(mask.numpy().flatten()) for name, mask in masks.items()})
    stored = path.read_bytes()
    assert stored.count(bits.tobytes()) == 1
    path.write_bytes(stored.replace(bits.tobytes(), bits[::-1].tobytes()))
    with pytest.raises(MaskFileError, match="not a readable npz file: Bad CRC-32"):
        masks_from_path(path, model, PATTERN)


def test_pickles_are_refused_unread(model: PreTrainedModel, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    for suffix in (".pt", ".pkl", ".npz", ".npy", ".safetensors"):
        path = tmp_path / f"mask{suffix}"
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(MaskFileError):
            masks_from_path(path, model, PATTERN)
    assert not (tmp_path / "ran").exists()


def test_bad_folders_of_torch_masks(model: PreTrainedModel, masks: dict[str, Tensor], tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return Path.touch, (tmp_path / "ran",)  # type: ignore[return-value]

    folder = save_torch(tmp_path / "torch", masks)
    file = folder / f"{UP.removesuffix('.weight')}.pt"
    loose = masks[UP].clone()
    loose[9, 12:16] = True
    for content, message in (
        (
            loose,
            r"up_proj\.pt: .*up_proj\.weight: .* row 9, group 3 \(columns 12 to 15\) keeps 4 of 4, expected 2",
        ),
        (masks[UP].float(), r"expected a boolean mask, found torch\.float32"),
        ({"mask": masks[UP]}, "expected a boolean mask, found dict"),
        (masks[UP].T, r"expected a mask of shape \(64, 32\), found \(32, 64\)"),
        (Bomb(), r"not a readable \.pt file of a tensor"),
    ):
        torch.save(content, file)
        with pytest.raises(MaskFileError, match=message) as raised:
            masks_from_path(folder, model, PATTERN)
        assert "\n" not in str(raised.value)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(MaskFileError, match=r"not a readable \.pt file of a tensor"):
        masks_from_path(folder, model, PATTERN)
    file.unlink()
    with pytest.raises(MaskFileError, match=r"expected a mask of shape \(64, 32\), found None"):
        masks_from_path(folder, model, PATTERN)
    assert not (tmp_path / "ran").exists()


def test_bad_checkpoint_folders(model: PreTrainedModel, masks: dict[str, Tensor], tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    folder.mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        masks_from_path(folder, model, PATTERN)
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        masks_from_path(folder, model, PATTERN)
    save_pruned(folder, model, masks)
    with pytest.raises(MaskFileError, match=r"nonzeros, expected at most 1 of 4"):
        masks_from_path(folder, model, NMPattern.parse("1:4"))
    rewrite(folder, UP, torch.ones(4, 4))
    with pytest.raises(MaskFileError, match=r"up_proj\.weight: expected a mask of shape \(64, 32\), found \(4, 4\)"):
        masks_from_path(folder, model, PATTERN)
    rewrite(folder, UP, None)
    with pytest.raises(MaskFileError, match=r"up_proj\.weight: expected a mask of shape \(64, 32\), found None"):
        masks_from_path(folder, model, PATTERN)
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        masks_from_path(folder, model, PATTERN)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "maskpro"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="found a quantization_config"):
        masks_from_path(folder, model, PATTERN)


def test_the_command_takes_them(
    model_folder: Path, model: PreTrainedModel, masks: dict[str, Tensor], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "out.safetensors"
    arguments = ["--model", str(model_folder), "--output", str(output), "--device", "cpu", "--init"]
    for source in (save_npz(tmp_path / "mask.npz", masks), save_pruned(tmp_path / "pruned", model, masks)):
        assert main([*arguments, str(source)]) == 0
        file = read_masks(output)
        assert file.masks.keys() == masks.keys()
        assert all(torch.equal(file.masks[name], mask) for name, mask in masks.items())
        assert file.provenance["method"] == source.name
    assert len(select_layers(model, PATTERN).linears) == 14
    capsys.readouterr()
    assert main([*arguments, str(model_folder)]) == 2
    assert "nonzeros, expected at most 2 of 4" in capsys.readouterr().err
