"""Reads ``quantization_config`` of a packed checkpoint and decides which vLLM layers are sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

import maskpro_kernels.ops  # noqa: F401  (registers torch.ops.maskpro in every vLLM process)
from maskpro_kernels import NMPattern
from maskpro_serve.checkpoint import CheckpointError, PackedFormat, check_checkpoint
from maskpro_serve.metrics import LayerTally
from maskpro_serve.quantization.head import HeadMethod
from maskpro_serve.quantization.linear import NMLinearMethod


class MaskProConfig(QuantizationConfig):
    """Quantization config ``maskpro``.

    Importable at module level: vLLM pickles it to its worker processes.

    Attributes:
        pattern: the (N:M) pattern of every packed linear.
        ignore: checkpoint names of linears that stayed dense.
        values: ``int8``, or None for kept values of the model's own dtype.
        tally: counts the layers of this process as they load.
    """

    def __init__(self, pattern: NMPattern, ignore: tuple[str, ...] = (), values: str | None = None) -> None:
        super().__init__()
        self.pattern = pattern
        self.values = values
        self.ignore = frozenset(ignore)
        self.tally = LayerTally(pattern)

    def __repr__(self) -> str:
        return f"MaskProConfig(pattern={self.pattern}, values={self.values}, ignore={sorted(self.ignore)})"

    @classmethod
    def get_name(cls) -> str:
        return "maskpro"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # everything is in config.json

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MaskProConfig:
        packed = PackedFormat.from_dict(config, where="quantization_config")
        return cls(packed.pattern, packed.ignore, packed.values)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Checks a local checkpoint's headers, once, before any weight is read."""
        if Path(model_name).is_dir():
            check_checkpoint(Path(model_name), contents=False)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, ParallelLMHead):
            return HeadMethod()
        if not isinstance(layer, LinearBase):
            return None
        dense = [name in self.ignore for name in self._checkpoint_names(prefix)]
        if all(dense):
            return UnquantizedLinearMethod()
        if any(dense):
            raise CheckpointError(
                f"{prefix}: vLLM fuses {', '.join(self._checkpoint_names(prefix))}, but only some of them are packed; "
                "pack all of them or none"
            )
        return NMLinearMethod(self, prefix)

    def _checkpoint_names(self, prefix: str) -> list[str]:
        """The checkpoint's names of a vLLM layer: several for qkv_proj and gate_up_proj."""
        parent, _, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name, [name])
        return [f"{parent}.{part}" if parent else part for part in parts]
