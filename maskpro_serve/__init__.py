"""Serves (N:M)-sparse language models with vLLM.

>>> convert("dense-model", "packed-model", mask="mask.safetensors")
>>> config, weights = load_packed("packed-model")
"""

from maskpro_serve.checkpoint import CheckpointError, load_packed
from maskpro_serve.convert import convert

__version__ = "0.1.0"
__all__ = ["CheckpointError", "__version__", "convert", "load_packed"]
