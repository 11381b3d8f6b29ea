"""Recovery files: what is written is read back, rounding is bounded, and every damage is one clear error."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskpro_kernels import LowRank, RecoveryFileError, read_recovery, recovered, write_recovery
from maskpro_kernels.packing import magnitude_mask
from maskpro_kernels.pattern import NMPattern


def update(out_features=24, in_features=40, rank=3, seed=0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        torch.randn(out_features, rank, generator=generator), torch.randn(rank, in_features, generator=generator)
    )


def test_a_file_gives_back_the_rounded_factors(tmp_path):
    path = tmp_path / "r.safetensors"
    updates = {"x.weight": update(), "y.weight": LowRank(torch.zeros(8, 2), torch.ones(2, 4))}
    write_recovery(path, updates, provenance={"rank": "3"})
    file = read_recovery(path)
    assert file.provenance == {"rank": "3"}
    assert file.updates.keys() == updates.keys()
    for name, found in file.updates.items():
        expected = updates[name].rounded()
        assert torch.equal(found.b, expected.b)
        assert torch.equal(found.a, expected.a)
        # half a step of each vector's own scale
        for factor, exact, along in ((found.b, updates[name].b, 0), (found.a, updates[name].a, 1)):
            assert ((factor - exact).abs() <= exact.abs().amax(along, keepdim=True) / 253).all()
    assert path.stat().st_size < 3 * (24 + 40) + 2 * (8 + 4) + 2000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recovered_weights_are_merged_under_the_mask(dtype):
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = magnitude_mask(weight, NMPattern(2, 4))
    result = recovered(weight, mask, update())
    assert result.dtype == dtype
    assert not result[~mask].any()
    exact = weight.double() + update().b.double() @ update().a.double()
    assert torch.equal(result[mask], exact.to(dtype)[mask])
    with pytest.raises(ValueError, match=r"expected an update of shape \(24, 40\), found \(24, 44\)"):
        recovered(weight, mask, update(in_features=44))


def test_factors_that_are_not_finite_are_not_written(tmp_path):
    broken = update()
    broken.a[1, 2] = torch.nan
    with pytest.raises(ValueError, match=r"x\.weight: recovery: a factor is not finite"):
        write_recovery(tmp_path / "r.safetensors", {"x.weight": broken})
    assert list(tmp_path.iterdir()) == []


def _drop(tensors):
    del tensors["x.weight.a"]


def _shorten(tensors):
    tensors["x.weight.a"] = tensors["x.weight.a"][:2].contiguous()


def _widen(tensors):
    tensors["x.weight.b"] = tensors["x.weight.b"].float()


def _add(tensors):
    tensors["z.weight.c"] = torch.zeros(1)


def _flatten(tensors):
    tensors["x.weight.b_scale"] = tensors["x.weight.b_scale"][0].clone()


def _poison(tensors):
    tensors["x.weight.b_scale"][0] = torch.inf


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, r"tensor x\.weight\.a is missing"),
        (_shorten, r"x\.weight: a: expected torch\.int8 \(3, 40\), found torch\.int8 \(2, 40\)"),
        (_widen, r"x\.weight: b: expected torch\.int8 \(24, 3\), found torch\.float32"),
        (_add, r"unexpected tensor z\.weight\.c"),
        (_flatten, r"x\.weight: b_scale: expected 1 dimensions, found \(\)"),
        (_poison, "a scale is not finite"),
    ],
)
def test_damaged_files(tmp_path, damage, message):
    path = tmp_path / "r.safetensors"
    write_recovery(path, {"x.weight": update()})
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path, metadata={"format": "maskpro-recovery", "format_version": "1"})
    with pytest.raises(RecoveryFileError, match=message):
        read_recovery(path)


def test_other_files(tmp_path):
    path = tmp_path / "r.safetensors"
    with pytest.raises(RecoveryFileError, match="no such recovery file"):
        read_recovery(path)
    path.write_bytes(b"no")
    with pytest.raises(RecoveryFileError, match="not a readable safetensors file"):
        read_recovery(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"format": "maskpro-mask"})
    with pytest.raises(RecoveryFileError, match="format: expected 'maskpro-recovery', found 'maskpro-mask'"):
        read_recovery(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"format": "maskpro-recovery", "format_version": "2"})
    with pytest.raises(RecoveryFileError, match="format_version: expected '1', found '2'"):
        read_recovery(path)
