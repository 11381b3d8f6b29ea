"""Which model a mask or a recovery was made for: shapes alone do not tell a base model from its fine-tuned twin."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download

from maskpro_kernels.model_folder import INDEX, CheckpointError, weight_files

logger = logging.getLogger(__name__)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MODEL_FILES = (
    "*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "*.md", "LICENSE*", "NOTICE*",
)  # fmt: skip
"""What a model folder is served from; it may hold the same weights again for other frameworks, and runs' leftovers."""


def is_hub_id(name: str) -> bool:
    """Whether a name may be a hub's, ``organisation/model``; a folder of that name goes first."""
    return _HUB_ID.fullmatch(name) is not None


def model_folder(name: str) -> Path:
    """The folder of a model.

    Args:
        name: a folder, whether or not it is there, or a hub id, whose :data:`MODEL_FILES` are downloaded unless the
            hub's cache has them. What the cache lacks of them when the hub cannot be reached is logged as a warning.

    Raises:
        CheckpointError: neither the hub nor its cache gives the model.
    """
    folder = Path(name)
    if folder.exists() or not is_hub_id(name):
        return folder
    try:
        # Some repositories hold the weights a second time, in Mistral's own format.
        return Path(snapshot_download(name, allow_patterns=list(MODEL_FILES), ignore_patterns=["*/*", "consolidated*"]))
    except Exception as error:  # of the hub's client, or of whatever HTTP library it has
        reason = str(error).strip().partition("\n")[0]
        if incomplete := getattr(error, "snapshot_path", None):  # what is missing may not be needed
            logger.warning("%s: from the hub's cache, which has not all of it: %s", name, reason)
            return Path(incomplete)
        raise CheckpointError(f"{name}: no such folder, and the hub does not give it: {reason}") from error


def weights_sha256(name: str) -> str | None:
    """SHA-256 over a model's safetensors files, one after the other in name order: of one file, that file's own.

    Args:
        name: a folder or a hub id. None for a model without such files.

    Raises:
        CheckpointError: neither the hub nor its cache gives the model, or its index is wrong.
        OSError: a file cannot be read.
    """
    folder = model_folder(name)
    if not any((folder / file).is_file() for file in (INDEX, "model.safetensors")):  # a mask may lie there, too
        return None
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)  # goes on with the one it is given
    return digest.hexdigest()


def other_base(path: Path, provenance: Mapping[str, str], found: str | None) -> str | None:
    """A warning if a mask or a recovery was made for other weights.

    Args:
        path: its file.
        provenance: what it says of itself.
        found: the model's :func:`weights_sha256`.
    """
    expected = provenance.get("base_model_sha256")
    if expected is None or found is None or expected == found:
        return None
    made_for = provenance.get("base_model", "another model")
    return f"{path} was made for weights of another hash ({made_for}): expected {expected[:12]}, found {found[:12]}"
