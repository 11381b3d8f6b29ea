"""What the runtime asks of a packed checkpoint (kernels/FORMAT.md): that it is whole, or its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from maskpro_kernels import NMWeight
from maskpro_kernels.model_folder import CheckpointError, read_config, read_headers
from maskpro_kernels.packed_checkpoint import PackedFormat, checked_names, packed_format, packed_weights, read_packed

__all__ = ["CheckpointError", "PackedFormat", "check_checkpoint", "load_packed"]


def check_checkpoint(folder: Path, *, contents: bool) -> PackedFormat | None:
    """Checks a local checkpoint before a server is started on it.

    Args:
        folder: a Hugging Face folder; one that is not packed by us only has its headers read.
        contents: also check every bitmask (reads 1/8 byte per weight and the kept values' pages not at all).

    Returns:
        The packed format, or None for a checkpoint of another kind.

    Raises:
        CheckpointError: the first thing that is wrong, in one sentence.
    """
    packed = packed_format(folder)
    if packed is None:
        return None
    headers = read_headers(folder)
    for name in checked_names(folder, headers, packed):
        read_packed(headers, name, packed, contents=contents)
    return packed


def load_packed(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor | NMWeight]]:
    """Reads a packed checkpoint whole.

    Args:
        folder: the checkpoint's folder.

    Returns:
        ``config.json``, and for every weight its tensor; packed linears appear as an :class:`NMWeight`
        under the dense name (``X.weight``).

    Raises:
        CheckpointError: the folder is no packed checkpoint, or something in it is wrong.
    """
    path = Path(folder)
    return read_config(path), dict(packed_weights(path))
