"""Calibration rows from a dataset of the Hugging Face hub, read as a stream: only what is needed is fetched.

A source is written ``hub:NAME``, ``hub:NAME:CONFIG`` or ``hub:NAME:CONFIG:SPLIT`` (the split is train by default):
``hub:allenai/c4:en``. NAME may also be a local folder that the datasets library can read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from maskpro_learner.errors import CalibrationError

PREFIX = "hub:"


def hub_rows(source: str) -> Iterator[dict[str, Any]]:
    """The rows of a dataset in their order, fetched as they are asked for.

    Args:
        source: ``hub:NAME[:CONFIG[:SPLIT]]``.

    Raises:
        CalibrationError: the datasets library is missing, the source names nothing, or its rows cannot be had,
            at the first row or, when the network goes, at a later one.
    """
    name, _, rest = source.removeprefix(PREFIX).partition(":")
    config, _, split = rest.partition(":")
    if not name:
        raise CalibrationError(f"{source}: expected hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT")
    if name.startswith((".", "/")) and not Path(name).is_dir():
        raise CalibrationError(f"{source}: no such dataset folder")
    try:
        import datasets
    except ImportError as error:
        raise CalibrationError(f"{source}: needs the datasets library: pip install maskpro-serve[eval]") from error
    try:
        yield from datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    # It raises its own kinds, the network's, the file formats', and OSError.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CalibrationError(f"{source}: its rows cannot be read: {reason}") from error
