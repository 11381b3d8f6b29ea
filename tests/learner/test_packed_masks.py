"""Masks at one bit a weight are the masks."""

from __future__ import annotations

import torch

from maskpro_kernels import NMPattern
from maskpro_kernels.packing import check_mask
from maskpro_learner.initial_masks import random_mask
from maskpro_learner.packed_masks import PackedMasks


def test_masks_come_back_in_order():
    generator, pattern = torch.Generator().manual_seed(0), NMPattern(2, 4)
    masks = {name: random_mask(shape, pattern, generator) for name, shape in (("b", (3, 12)), ("a", (5, 16)))}
    packed = PackedMasks(masks)
    assert list(packed) == ["b", "a"]
    assert len(packed) == 2
    for name, mask in packed.items():
        assert torch.equal(mask, masks[name])
        check_mask(mask, pattern)
    packed["b"].zero_()  # a copy
    assert torch.equal(packed["b"], masks["b"])
    packed["b"] = ~masks["b"]
    del packed["a"]
    assert {name: int(mask.sum()) for name, mask in packed.items()} == {"b": 18}
