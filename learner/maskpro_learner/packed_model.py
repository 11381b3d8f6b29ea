"""Opens whatever maskpro-eval measures as a transformers model: dense, dense with a mask, or a packed checkpoint.

A packed checkpoint (kernels/FORMAT.md) is unpacked to dense weights: what is measured is the model that is served,
not the kernels that serve it. Where it allows activations of 8 bits, and there are kernels that round them, they are
rounded, whether or not this machine's server does; so is the output head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from maskpro_kernels import LowRank, NMPattern, NMWeight, read_masks, read_recovery, recovered, unpack
from maskpro_kernels.activations import EightBitInputs
from maskpro_kernels.base_model import model_folder, other_base, weights_sha256
from maskpro_kernels.int8 import rows_to_int8
from maskpro_kernels.packed_checkpoint import MAY_BE_EIGHT_BITS, QUANT_METHOD, PackedFormat, packed_weights
from maskpro_kernels.support import has_rounding_kernel
from maskpro_learner.checkpoints import check_model, load_model
from maskpro_learner.errors import LearnerError, ModelError
from maskpro_learner.layers import apply_masks


@dataclass(frozen=True)
class EvaluatedModel:
    """A model to measure, and what its numbers are the numbers of.

    Attributes:
        model: frozen, on its device.
        kind: dense, masked or packed.
        pattern: of the mask, None for a dense model.
        provenance: what the mask file or the packed checkpoint says about where its mask comes from.
        warnings: sentences a reader of the numbers should know.
    """

    model: PreTrainedModel
    kind: str
    pattern: NMPattern | None = None
    provenance: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def load_for_evaluation(
    name: str, mask: Path | None, dtype: torch.dtype, device: str = "cpu", *, recovery: Path | None = None
) -> EvaluatedModel:
    """Loads a model for measuring.

    Args:
        name: a folder, dense or packed, or a hub id.
        mask: a mask file to apply to a dense model.
        dtype: of the weights and activations.
        device: where to put it.
        recovery: a recovery file, to merge under the mask as packing would, but rounded to ``dtype``.

    Raises:
        ModelError: the model cannot be read, or the mask or the recovery is not for it.
        MaskFileError, RecoveryFileError: the mask or recovery file cannot be used.
        LearnerError: a mask for a packed model, or a recovery without a mask.
    """
    if recovery is not None and mask is None:
        raise LearnerError(f"--recovery {recovery}: expected the --mask that it was made with, found none")
    packed = packed_format(name)
    if packed is not None:
        if mask is not None:
            raise LearnerError(f"--mask {mask}: expected a dense --model, found {name}, which is packed already")
        model, pattern = load_packed_model(name, dtype, device)
        provenance = {key: str(value) for key, value in (packed.provenance or {}).items()}
        provenance |= {key: kind for key in MAY_BE_EIGHT_BITS if (kind := getattr(packed, key))}
        return EvaluatedModel(model, "packed", pattern, provenance)
    if mask is None:
        return EvaluatedModel(load_model(name, dtype, device), "dense")
    file = read_masks(mask)
    model = load_model(name, dtype, device)
    if recovery is not None:
        _merge(model, file.masks, read_recovery(recovery, mask).updates, recovery)
    apply_masks(model, file.masks)
    warning = other_base(mask, file.provenance, weights_sha256(name))
    warnings = () if warning is None else (f"{warning}: these are the numbers of a mixture",)
    return EvaluatedModel(model, "masked", file.pattern, file.provenance, warnings)


def _merge(model: PreTrainedModel, masks: dict[str, Tensor], updates: dict[str, LowRank], file: Path) -> None:
    """Merges the updates into the weights under their masks, in place."""
    parameters = dict(model.named_parameters())
    for name, update in updates.items():
        weight, mask = parameters.get(name), masks.get(name)
        if weight is None or mask is None:
            raise ModelError(f"{file}: {name}: expected an update of a masked weight, found none of that name")
        try:
            weight.data = recovered(weight.data, mask, update)
        except ValueError as error:
            raise ModelError(f"{file}: {name}: {error}") from error


def packed_format(name: str) -> PackedFormat | None:
    """The format of a packed checkpoint; None for any other model.

    Args:
        name: a folder or a hub id.

    Raises:
        ModelError: there is no such model, or its config.json is unreadable.
        CheckpointError: it is packed in an unknown version or pattern.
    """
    check_model(name)
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}: not a readable config.json: {str(error).strip().partition(chr(10))[0]}") from error
    found = config.get("quantization_config")
    if not isinstance(found, dict) or found.get("quant_method") != QUANT_METHOD:
        return None
    return PackedFormat.from_dict(found, where=f"{name}: config.json: quantization_config")


def load_packed_model(name: str, dtype: torch.dtype, device: str = "cpu") -> tuple[PreTrainedModel, NMPattern]:
    """Unpacks a packed checkpoint into the transformers model its config describes.

    Args:
        name: a folder, or a hub id, which is downloaded whole.
        dtype: of the weights and activations; the checkpoint's own values are cast to it.
        device: where to put it.

    Raises:
        CheckpointError: a file or tensor of the packed format is missing, unexpected or wrong; names it.
        ModelError: the weights do not fit the model that config.json describes.

    Memory: the dense weights in the checkpoint's dtype and in ``dtype``; where the output head may be rounded, it
        another time, and while it is, once in float32.
    """
    found = packed_format(name)
    if found is None:
        raise ModelError(f"{name}: config.json: expected quantization_config.quant_method {QUANT_METHOD!r}, found none")
    folder = model_folder(name)
    try:
        config = AutoConfig.from_pretrained(folder)
        architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder / 'config.json'}: not a causal language model's: {error}") from error
    del config.quantization_config  # else transformers looks for a quantizer of that name
    weights = {
        tensor: unpack(weight) if isinstance(weight, NMWeight) else weight for tensor, weight in packed_weights(folder)
    }
    try:
        # Given a state dict, transformers opens no file, so it cannot mistake the packed tensors for unknown ones.
        model, report = architecture.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder}: its tensors do not fit its config.json: {' '.join(str(error).split())}") from error
    for tensor_name, its, expected in sorted(report["mismatched_keys"]):
        raise ModelError(f"{folder}: tensor {tensor_name}: expected shape {tuple(expected)}, found {tuple(its)}")
    for problem in ("missing", "unexpected"):
        if names := sorted(report[f"{problem}_keys"]):
            raise ModelError(f"{folder}: tensor {names[0]} is {problem} ({len(names)} in all)")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if found.activations is not None and has_rounding_kernel(found.pattern):
        for layer, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and layer not in found.ignore:
                module.register_forward_pre_hook(_round_inputs)
    if found.head is not None:
        _round_head(model.get_output_embeddings())
    model.train(False).requires_grad_(False)
    moved: PreTrainedModel = model.to(device)
    return moved, found.pattern


def _round_head(head: torch.nn.Linear) -> None:
    """To what a CPU server multiplies by; 16 bits round once more. An embedding that it is tied to stays as it is."""
    levels, scale = rows_to_int8(head.weight.data)
    head.weight = torch.nn.Parameter((levels * scale.unsqueeze(1)).to(head.weight.dtype))


def _round_inputs(_: torch.nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Of a linear: to what its int8 kernel multiplies, each token by a scale of its own; 16 bits round once more."""
    (x,) = inputs
    return (EightBitInputs(torch.int8).simulated(x).to(x.dtype),)
