"""Mask files: both encodings round trip, and every way a file can be wrong is one clear error."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from maskpro_kernels import MaskFileError, NMPattern, read_masks, write_masks
from maskpro_kernels.masks import decode_states, encode_states
from maskpro_kernels.packing import magnitude_mask

NAME = "model.layers.0.mlp.up_proj.weight"
TWO_OF_FOUR = NMPattern(2, 4)


def random_mask(pattern: NMPattern, rows: int, groups: int, seed: int = 0) -> torch.Tensor:
    return magnitude_mask(
        torch.randn((rows, groups * pattern.m), generator=torch.Generator().manual_seed(seed)), pattern
    )


@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**31))
def test_states_round_trip(n, rows, groups, seed):
    pattern = NMPattern(n, 4)
    mask = random_mask(pattern, rows, groups, seed)
    assert torch.equal(decode_states(encode_states(mask, pattern), pattern, tuple(mask.shape)), mask)


def test_states_are_ranks_in_lexicographic_order():
    for rank, columns in enumerate(itertools.combinations(range(4), 2)):
        mask = torch.zeros((1, 4), dtype=torch.bool)
        mask[0, list(columns)] = True
        assert encode_states(mask, TWO_OF_FOUR).tolist() == [rank]
    three = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 1, 0]], dtype=torch.bool)  # ranks 0, 5, 1
    assert encode_states(three, TWO_OF_FOUR).tolist() == [0 + 5 * 6 + 1 * 36]


@pytest.mark.parametrize(("pattern", "encoding"), [("2:4", "states"), ("2:4", "bitmask"), ("5:16", "bitmask")])
def test_file_round_trip(tmp_path, pattern, encoding):
    pattern = NMPattern.parse(pattern)
    masks = {NAME: random_mask(pattern, 5, 3), "b.weight": random_mask(pattern, 2, 6, seed=1)}
    path = tmp_path / "mask.safetensors"
    write_masks(path, masks, pattern, provenance={"method": "wanda", "seed": "7"}, encoding=encoding)
    file = read_masks(path)
    assert file.pattern == pattern
    assert file.provenance == {"method": "wanda", "seed": "7"}
    assert file.masks.keys() == masks.keys()
    assert all(torch.equal(file.masks[name], masks[name]) for name in masks)
    assert list(tmp_path.iterdir()) == [path]  # no temporary left


def test_states_take_two_thirds_of_a_bit(tmp_path):
    mask = random_mask(TWO_OF_FOUR, 96, 96)
    write_masks(tmp_path / "m", {NAME: mask}, TWO_OF_FOUR, encoding="states")
    with safe_open(tmp_path / "m", framework="pt") as file:
        assert file.get_tensor(f"{NAME}.mask").numel() == mask.numel() // 12


def test_a_mask_that_is_not_strict_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=f"{NAME}: mask is not strictly 2:4: row 0, group 0"):
        write_masks(tmp_path / "m", {NAME: torch.ones((1, 4), dtype=torch.bool)}, TWO_OF_FOUR)
    with pytest.raises(ValueError, match="unknown mask encoding 'zip'"):
        write_masks(tmp_path / "m", {}, TWO_OF_FOUR, encoding="zip")
    assert list(tmp_path.iterdir()) == []


def written(tmp_path: Path, encoding: str = "bitmask") -> tuple[Path, dict[str, torch.Tensor], dict[str, str]]:
    path = tmp_path / "mask.safetensors"
    write_masks(path, {NAME: random_mask(TWO_OF_FOUR, 4, 6)}, TWO_OF_FOUR, encoding=encoding)
    with safe_open(path, framework="pt") as file:
        return path, {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"format": "other"}, "metadata format: expected 'maskpro-mask', found 'other'"),
        ({"format_version": "2"}, "format_version: expected 1, found '2'"),
        ({"encoding": "zip"}, "encoding: expected one of"),
        ({"pattern": "2:5"}, "m must be one of"),
        ({"pattern": "1:4"}, f"{NAME}.mask: mask is not strictly 1:4"),
        ({"shapes": "["}, "metadata pattern or shapes"),
        ({"shapes": "[]"}, "metadata pattern or shapes"),
        ({"shapes": json.dumps({NAME: [4, 28]})}, r"expected U8 \(4, 4\), found U8 \(4, 3\)"),
        ({"shapes": json.dumps({NAME: [-4, 24]})}, "a negative size"),
        ({"shapes": json.dumps({NAME: [4, 24], "b": [4, 24]})}, "tensor b.mask is listed in the metadata but missing"),
        ({"shapes": "{}"}, f"unexpected tensor {NAME}.mask"),
    ],
)
def test_wrong_metadata_is_named(tmp_path, metadata, message):
    path, tensors, good = written(tmp_path)
    save_file(tensors, path, {**good, **metadata})
    with pytest.raises(MaskFileError, match=message) as caught:
        read_masks(path)
    assert str(path) in str(caught.value)


def test_wrong_states_are_named(tmp_path):
    path, tensors, metadata = written(tmp_path, "states")
    tensors[f"{NAME}.mask"][3] = 216
    save_file(tensors, path, metadata)
    with pytest.raises(MaskFileError, match="byte 216 is no code of 3 2:4 groups"):
        read_masks(path)


def test_missing_and_truncated_files_are_named(tmp_path):
    with pytest.raises(MaskFileError, match="no such mask file"):
        read_masks(tmp_path / "nowhere")
    path, _, _ = written(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MaskFileError, match="not a readable safetensors file"):
        read_masks(path)
