"""How one linear layer lies in a checkpoint: what every format's configuration says of a layer's name."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from maskpro_kernels.packed_checkpoint import PackedFormat


@dataclass(frozen=True)
class LinearScheme:
    """A linear layer that is stored packed, or that is to be packed while it loads.

    Attributes:
        compressed: it is stored as ``compressed``, ``bitmask`` and ``shape``; else as a dense ``weight`` with zeros.
        values: int8 or float8_e4m3fn, in units of ``weight_scale``; None for the model's own dtype and no scale.
        scale: ``channel`` for a (out_features, 1) ``weight_scale``, ``tensor`` for one number, None with ``values``.
        input_scale: there is a static ``input_scale`` of the activations.
        input_zero_point: there is an ``input_zero_point`` as well.
        inputs: activations may be rounded to this dtype, that of ``values``: to multiples of ``input_scale`` where
            there is one, else of a scale for each token. None if they may not.
    """

    compressed: bool
    values: torch.dtype | None = None
    scale: str | None = None
    input_scale: bool = False
    input_zero_point: bool = False
    inputs: torch.dtype | None = None


def scheme_of_packed(packed: PackedFormat, name: str) -> LinearScheme | None:
    """How the linear of this name is stored in a packed checkpoint; None where it stayed dense."""
    if name in packed.ignore:
        return None
    if packed.values is None:
        return LinearScheme(True)
    return LinearScheme(True, torch.int8, "channel", inputs=None if packed.activations is None else torch.int8)
