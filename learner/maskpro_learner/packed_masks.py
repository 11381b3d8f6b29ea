"""Masks in memory at one bit a weight: next to a model and its logits, a byte a weight would be a tenth more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping

from torch import Tensor

from maskpro_kernels.bits import pack_bits, unpack_bits


class PackedMasks(MutableMapping[str, Tensor]):
    """Boolean (out_features, in_features) masks by weight name, on the CPU, in the order they came.

    Each is unpacked when it is asked for: what one gets is a copy, and changing it changes nothing here.
    """

    def __init__(self, masks: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] = ()) -> None:
        self._packed: dict[str, tuple[Tensor, int]] = {}
        self.update(masks)

    def __setitem__(self, name: str, mask: Tensor) -> None:
        self._packed[name] = pack_bits(mask.cpu()), mask.shape[1]

    def __getitem__(self, name: str) -> Tensor:
        return unpack_bits(*self._packed[name])

    def __delitem__(self, name: str) -> None:
        del self._packed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)
