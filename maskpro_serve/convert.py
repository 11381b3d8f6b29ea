"""Packs a dense Hugging Face checkpoint and its mask: what ``maskpro-pack`` runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from maskpro_kernels import (
    LowRank,
    NMPattern,
    NMWeight,
    RecoveryFile,
    pack,
    read_masks,
    read_recovery,
    recovered,
    to_int8,
)
from maskpro_kernels.files import temporary_sibling
from maskpro_kernels.packing import WEIGHT_DTYPES, magnitude_mask
from maskpro_serve.checkpoint import (
    INDEX,
    SCALE_SUFFIX,
    CheckpointError,
    PackedFormat,
    TensorInfo,
    open_safetensors,
    read_config,
    read_headers,
    weight_files,
)


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        pattern: the pattern packed.
        packed: linears packed.
        dense: linears left dense, with the reason.
        packed_bytes: bytes of the packed linears.
        dense_bytes: bytes the same linears took before.
    """

    pattern: NMPattern
    packed: tuple[str, ...]
    dense: dict[str, str]
    packed_bytes: int
    dense_bytes: int


def convert(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    mask: str | os.PathLike[str] | None = None,
    pattern: NMPattern | None = None,
    recovery: str | os.PathLike[str] | None = None,
    values: str | None = None,
    progress: bool = False,
) -> ConversionReport:
    """Packs every linear that the mask names; kept weights are copied bit for bit but for a recovery or int8 values.

    Args:
        model: a dense Hugging Face folder with safetensors weights.
        output: the folder to write; must not exist. It appears whole or not at all.
        mask: a mask file. None packs the linears that already satisfy ``pattern`` by their zeros.
        pattern: required without a mask; with one, must agree with it.
        recovery: a recovery file made with this mask: its low-rank updates are merged into the kept weights.
        values: ``int8`` rounds the kept values to 8 bits, with a scale for each output; None keeps them as they are.
        progress: draw a progress bar on stderr.

    Returns:
        What was packed and what stayed dense.

    Raises:
        CheckpointError: the model, the mask, the recovery or these together are wrong; names file and tensor.
        MaskFileError, RecoveryFileError: the mask file or the recovery file is.
        FileExistsError: ``output`` exists.

    Memory: the largest safetensors file of the model and its packed form, and a byte per weight of the masks.
    """
    source, target = Path(model), Path(output)
    if values not in (None, "int8"):
        raise CheckpointError(f"values: expected 'int8' or none, found {values!r}")
    if target.exists():
        raise FileExistsError(f"{target}: already exists; remove it or choose another --output")
    config = read_config(source)
    if config.get("quantization_config"):
        raise CheckpointError(f"{source / 'config.json'}: expected a dense model, found a quantization_config")
    headers = read_headers(source)
    masks, chosen, provenance = _masks(mask, pattern)
    if masks is not None:
        _check_shapes(headers, {name: tuple(each.shape) for name, each in masks.items()}, Path(str(mask)), "mask")
    updates = _recovery(recovery, mask, headers, provenance)
    if others := sorted(updates.keys() - (masks or {}).keys()):
        raise CheckpointError(f"{recovery}: {others[0]}: the mask file has no mask for it")
    linears = set(_linear_weights(source, headers))
    if masks is not None and (others := sorted(masks.keys() - linears)):
        raise CheckpointError(f"{mask}: {others[0]}: expected masks of the decoder's linear layers only, this is none")
    writer = _Writer(chosen, masks, linears, updates, values)
    with temporary_sibling(target) as folder:
        _copy_other_files(source, folder)
        with _progress_bar(len(headers), enabled=progress) as advance:
            index: dict[str, str] = {}
            for path in weight_files(source):
                tensors = {}
                with open_safetensors(path) as file:
                    for name in file.keys():  # noqa: SIM118  (safe_open is no dict)
                        tensors.update(writer.transform(name, file.get_tensor(name), path))
                        advance()
                try:
                    save_file(tensors, folder / path.name, metadata={"format": "pt"})
                except SafetensorError as error:  # a full disk, among others
                    raise OSError(f"{folder / path.name}: cannot be written: {error}") from error
                index.update(dict.fromkeys(tensors, path.name))
        if not writer.packed:
            raise CheckpointError(f"{source}: no linear satisfies {chosen}; learn a mask with maskpro-learn")
        # Written for one file too: without it, a reader cannot know that a dense tensor is missing.
        size = sum((folder / name).stat().st_size for name in set(index.values()))
        document = {"metadata": {"total_size": size}, "weight_map": index}
        (folder / INDEX).write_text(json.dumps(document, indent=2) + "\n")
        packed = PackedFormat(chosen, ("lm_head", *sorted(writer.dense)), provenance, values)
        config["quantization_config"] = packed.to_dict()
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return ConversionReport(chosen, tuple(writer.packed), writer.dense, writer.packed_bytes, writer.dense_bytes)


class _Writer:
    """Turns dense tensors into packed ones, and keeps count."""

    def __init__(
        self, pattern: NMPattern, masks: dict[str, Tensor] | None, linears: set[str], updates: dict[str, LowRank],
        values: str | None,
    ) -> None:  # fmt: skip
        self.pattern = pattern
        self.masks = masks
        self.linears = linears
        self.updates = updates
        self.values = values
        self.packed: list[str] = []
        self.dense: dict[str, str] = {}
        self.packed_bytes = 0
        self.dense_bytes = 0

    def transform(self, name: str, tensor: Tensor, file: Path) -> dict[str, Tensor]:
        """The tensors that replace ``name`` in the packed checkpoint: itself, or its parts."""
        weight = self._pack(name, tensor, file)
        if weight is None:
            return {name: tensor}
        prefix = name.removesuffix(".weight")
        self.packed.append(prefix)
        self.packed_bytes += weight.nbytes
        self.dense_bytes += tensor.nbytes
        parts = {
            f"{prefix}.compressed": weight.values,
            f"{prefix}.bitmask": weight.bitmask,
            f"{prefix}.shape": torch.tensor(weight.shape, dtype=torch.int64).unsqueeze(1),
        }
        if weight.scale is not None:
            parts[f"{prefix}{SCALE_SUFFIX}"] = weight.scale.unsqueeze(1)
        return parts

    def _pack(self, name: str, tensor: Tensor, file: Path) -> NMWeight | None:
        if name not in self.linears:
            return None
        prefix = name.removesuffix(".weight")
        if tensor.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(f"{file}: {name}: expected one of {WEIGHT_DTYPES}, found {tensor.dtype}")
        if self.masks is None:
            if not self.pattern.divides(tensor.shape[1]):
                self.dense[prefix] = f"{self.pattern.m} does not divide in_features = {tensor.shape[1]}"
                return None
            mask = magnitude_mask(tensor, self.pattern)
            if tensor[~mask].any():
                self.dense[prefix] = f"its zeros do not satisfy {self.pattern}"
                return None
        elif (mask := self.masks.get(name)) is None:  # type: ignore[assignment]
            self.dense[prefix] = "the mask file has no mask for it"
            return None
        if (update := self.updates.get(name)) is not None:
            tensor = recovered(tensor, mask, update)
        try:
            weight = pack(tensor, self.pattern, mask)
            return weight if self.values is None else to_int8(weight)
        except ValueError as error:
            raise CheckpointError(f"{file}: {name}: {error}") from error


def _masks(
    mask: str | os.PathLike[str] | None, pattern: NMPattern | None
) -> tuple[dict[str, Tensor] | None, NMPattern, dict[str, Any]]:
    if mask is None:
        if pattern is None:
            raise CheckpointError("without --mask, --pattern must say which N:M the model's zeros satisfy")
        return None, pattern, {"method": "zeros of the dense checkpoint"}
    file = read_masks(Path(mask))
    if pattern not in (None, file.pattern):
        raise CheckpointError(f"{mask}: pattern: expected {pattern} (--pattern), found {file.pattern}")
    return file.masks, file.pattern, dict(file.provenance)


def _recovery(
    recovery: str | os.PathLike[str] | None,
    mask: str | os.PathLike[str] | None,
    headers: dict[str, TensorInfo],
    provenance: dict[str, Any],
) -> dict[str, LowRank]:
    """The updates of a recovery file, which must have been made with the very mask file; adds to the provenance."""
    if recovery is None:
        return {}
    if mask is None:
        raise CheckpointError(f"{recovery}: a recovery needs the mask file that it was made with: give --mask")
    file: RecoveryFile = read_recovery(Path(recovery), Path(mask))
    _check_shapes(headers, {name: update.shape for name, update in file.updates.items()}, Path(recovery), "update")
    provenance["recovery"] = dict(file.provenance)
    return file.updates


def _check_shapes(headers: dict[str, TensorInfo], shapes: dict[str, tuple[int, ...]], file: Path, what: str) -> None:
    """Every mask or update must have its weight, of its shape, before anything is written."""
    for name, shape in shapes.items():
        info = headers.get(name)
        if info is None:
            raise CheckpointError(
                f"{file}: {name}: the model has no such weight; was the {what} made for another model?"
            )
        if info.shape != shape:
            raise CheckpointError(f"{file}: {name}: expected shape {info.shape} from {info.file}, found {shape}")


def _linear_weights(folder: Path, headers: dict[str, TensorInfo]) -> Iterator[str]:
    """Names of the checkpoint's decoder linears, from the architecture itself; the output head is not one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a model's constructor makes of a bad configuration
        first = str(error).strip().split("\n")[0]
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers cannot build this model: {type(error).__name__}: {first}"
        ) from error
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head and f"{name}.weight" in headers:
            yield f"{name}.weight"


def _copy_other_files(source: Path, target: Path) -> None:
    """Tokenizer, chat template, generation config: all small files but the weights and what we write."""
    skipped = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name != "config.json" and not path.name.endswith(skipped):
            shutil.copyfile(path, target / path.name)


@contextmanager
def _progress_bar(total: int, *, enabled: bool) -> Iterator[Any]:
    from rich.console import Console

    columns = (TextColumn("packing"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as bar:
        task = bar.add_task("packing", total=total)
        yield lambda: bar.advance(task)
