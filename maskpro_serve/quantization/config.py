"""Reads ``quantization_config`` of a sparse checkpoint and decides which vLLM layers are sparse."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

import maskpro_kernels.ops  # noqa: F401  (registers torch.ops.maskpro in every vLLM process)
from maskpro_kernels.packing import WEIGHT_DTYPES
from maskpro_kernels.servable import is_reordered, is_router
from maskpro_kernels.support import select_backend
from maskpro_serve.checkpoint import CheckpointError, PackedFormat
from maskpro_serve.legacy import LegacyFormat, claims
from maskpro_serve.metrics import LayerTally
from maskpro_serve.quantization.head import HeadMethod
from maskpro_serve.quantization.linear import NMLinearMethod
from maskpro_serve.scheme import LinearScheme, scheme_of_packed
from maskpro_serve.served import check_served, stored_dtype, stored_schemes

if TYPE_CHECKING:
    from vllm.model_executor.models.utils import WeightsMapper

logger = logging.getLogger("vllm.maskpro")


class MaskProConfig(QuantizationConfig):
    """Quantization config ``maskpro``: of our own packed checkpoints, and of 2:4 ones that compressed-tensors wrote.

    Importable at module level: vLLM pickles it to its worker processes.

    Attributes:
        format: what the checkpoint's configuration says of every linear.
        pattern: the (N:M) pattern of every packed linear.
        stored: dtype of the checkpoint's weights that are not of 8 bits; None where it is not known. `--dtype float32`
            widens activations, never the stored weights.
        tally: counts the layers of this process as they load.
    """

    def __init__(self, format: PackedFormat | LegacyFormat) -> None:
        super().__init__()
        self.format = format
        self.pattern = format.pattern
        self.stored: torch.dtype | None = None
        self._model_type = ""
        self._may_round_head = isinstance(format, PackedFormat) and format.head == "int8"
        self.tally = LayerTally(format.pattern, unclaimed_head=self._may_round_head)

    def __repr__(self) -> str:
        return f"MaskProConfig({self.format})"

    @property
    def values(self) -> str | None:
        """What the kept values are stored as, where that is not the model's own dtype."""
        if isinstance(self.format, PackedFormat):
            return self.format.values
        kinds = {str(scheme.values).removeprefix("torch.") for _, scheme in self.format.groups}
        return "+".join(sorted(kinds)) or None

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
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claims compressed-tensors' 2:4 checkpoints, which vLLM itself refuses; leaves all others alone."""
        return cls.get_name() if claims(hf_quant_cfg) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MaskProConfig:
        if not claims(config):
            stored: PackedFormat | LegacyFormat = PackedFormat.from_dict(config, where="quantization_config")
        else:
            stored = LegacyFormat.from_dict(config, where="quantization_config")
        _say_what_is_rounded(stored)
        return cls(stored)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Checks a local checkpoint's headers, once, before any weight is read; there may be none (dummy weights).

        The weights' dtype is their own, not what config.json says: whoever loads and saves a model changes that.
        """
        decoder = getattr(hf_config, "text_config", None) or hf_config
        self._model_type = str(getattr(decoder, "model_type", ""))
        said = getattr(hf_config, "dtype", None)  # now, for vLLM may overwrite it when it builds the model
        self.stored = said if said in WEIGHT_DTYPES else None
        folder = Path(model_name)
        if any(folder.glob("*.safetensors*")):
            check_served(folder, contents=False)
            self.stored = stored_dtype(folder) or self.stored

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Adds vLLM's names of modules to the checkpoint's, which stay: this may be called more than once."""

        def both(names: tuple[str, ...]) -> tuple[str, ...]:
            paths = [name for name in names if "." in name and not name.startswith("re:")]
            return tuple(dict.fromkeys([*names, *hf_to_vllm_mapper.apply_list(paths)]))

        if isinstance(self.format, PackedFormat):
            self.format = replace(self.format, ignore=both(self.format.ignore))
        else:
            self.format = replace(
                self.format,
                targets=both(self.format.targets),
                ignore=both(self.format.ignore),
                groups=tuple((both(targets), scheme) for targets, scheme in self.format.groups),
                unquantized=both(self.format.unquantized),
            )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, ParallelLMHead):
            self.tally.unclaimed_head = False
            return HeadMethod(self.stored, may_round=self._may_round_head)
        if not isinstance(layer, LinearBase):
            if prefix.rpartition(".")[2].endswith("experts"):
                self.tally.experts()
            return None
        if isinstance(self.format, PackedFormat) and is_router(prefix):
            return UnquantizedLinearMethod()  # whether `ignore` names it or not: to transformers it may be no linear
        names = self._checkpoint_names(prefix)
        schemes = {self._scheme(name) for name in names}
        if schemes == {None, LinearScheme(compressed=False)}:
            schemes = {LinearScheme(compressed=False)}  # all are plain weights: their zeros decide
        if len(schemes) > 1:
            raise CheckpointError(
                f"{prefix}: vLLM fuses {', '.join(names)}, but they are not all packed, and quantized, in the same way"
            )
        scheme: LinearScheme | None = schemes.pop()
        if scheme is not None and scheme.compressed and any(is_reordered(name, self._model_type) for name in names):
            raise CheckpointError(
                f"{prefix}: expected a dense weight, found a packed one: vLLM reorders the rows of {self._model_type} "
                "models while it loads them, but not those of packed layers"
            )
        return UnquantizedLinearMethod() if scheme is None else NMLinearMethod(self, prefix, scheme)

    def _scheme(self, name: str) -> LinearScheme | None:
        if isinstance(self.format, PackedFormat):
            return scheme_of_packed(self.format, name)
        return self.format.scheme(name)

    def _checkpoint_names(self, prefix: str) -> list[str]:
        """The checkpoint's names of a vLLM layer: several for qkv_proj and gate_up_proj."""
        parent, _, name = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(name, [name])
        return [f"{parent}.{part}" if parent else part for part in parts]


def _say_what_is_rounded(stored: PackedFormat | LegacyFormat) -> None:
    """Logs of 8-bit weights whether activations are rounded, too."""
    schemes = stored_schemes(stored)
    if not any(scheme.values for scheme in schemes):
        return
    allowed = {scheme.inputs for scheme in schemes} - {None}
    if current_platform.is_cuda() and allowed:
        logger.info(
            "maskpro: activations are rounded to 8 bits where that is measured to be faster; MASKPRO_KERNEL=triton "
            "leaves them as they are"
        )
        return
    types = stored.pattern, torch.float32, torch.int8, "cpu"
    if torch.int8 in allowed and select_backend(*types, may_round=True).rounds:
        logger.info(
            "maskpro: activations are rounded to 8 bits, as this checkpoint allows; MASKPRO_KERNEL=%s leaves them as "
            "they are",
            select_backend(*types).name,
        )
    else:
        logger.info("maskpro: activations are not quantized: 8-bit weights are multiplied by them as they are")
