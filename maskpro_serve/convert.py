"""Packs a dense Hugging Face checkpoint and its mask, some rows at a time: what ``maskpro-pack`` runs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from maskpro_kernels import LowRank, NMPattern, read_recovery
from maskpro_kernels.base_model import model_folder, other_base, weights_sha256
from maskpro_kernels.mask_sources import MaskSource, open_masks
from maskpro_kernels.model_folder import CheckpointError
from maskpro_kernels.packed_checkpoint import PackedFormat, check_eight_bits
from maskpro_kernels.support import has_rounding_kernel
from maskpro_serve.dense_model import DenseModel, open_dense_model
from maskpro_serve.packing_plan import Plan, packed_specs, plan_by_masks, plan_by_zeros, plan_shards
from maskpro_serve.partial_output import PartialOutput, file_identity, partial_output
from maskpro_serve.read_ahead import reading_ahead
from maskpro_serve.shard_writer import RowPacker, write_rest, write_shard

SHARD_BYTES = 1 << 30
"""The largest file, but for a tensor that is larger: the most that a kill makes a run do again; 7B take 8 files."""
_LAYOUT = 5
"""Counted up when equal inputs would make other files: a partial output of another layout is not taken up."""


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        pattern: the pattern packed.
        packed: linears packed.
        dense: linears left dense, with the reason.
        packed_bytes: bytes of the packed linears.
        dense_bytes: bytes the same linears took before.
        found: where the model's own zeros decided, the tightest pattern of each linear that has one.
        resumed: files that an earlier, killed run had written.
        warnings: sentences about a mask or a recovery that was made for other weights, and activations that nothing
            rounds.
    """

    pattern: NMPattern
    packed: tuple[str, ...]
    dense: dict[str, str]
    packed_bytes: int
    dense_bytes: int
    found: dict[str, str]
    resumed: int
    warnings: tuple[str, ...]


def convert(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    mask: str | os.PathLike[str] | None = None,
    pattern: NMPattern | Literal["auto"] | None = None,
    recovery: str | os.PathLike[str] | None = None,
    values: str | None = None,
    activations: str | None = None,
    head: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> ConversionReport:
    """Packs every linear that the mask names; kept weights are copied bit for bit but for a recovery or int8 values.

    Args:
        model: a dense Hugging Face folder with safetensors weights, or one with a compressed-tensors
            ``sparsity_config`` of format ``dense``, which is dropped; or a hub id.
        output: the folder to write; must not exist. It appears whole or not at all. What a killed run had written is
            kept beside it, and taken up by the next one.
        mask: a mask file, MaskLLM's npz, a folder of .pt masks, or a pruned checkpoint. None packs the linears that
            already satisfy ``pattern`` by their zeros.
        pattern: required without a mask, unless the model's ``sparsity_config`` declares one; ``auto`` finds the one
            that makes the checkpoint smallest. With a mask file, must agree with it.
        recovery: a recovery file made with this mask: its low-rank updates are merged into the kept weights.
        values: ``int8`` rounds the kept values to 8 bits, with a scale for each output; None keeps them as they are.
        activations: ``int8``, beside int8 values, allows whoever serves the model to round activations as well.
        head: ``int8`` allows whoever serves the model to round the output head's rows to 8 bits; it is stored as it is.
        shard_bytes: the largest file to write, but for a tensor that is larger.
        progress: draw a progress bar on stderr.

    Returns:
        What was packed and what stayed dense.

    Raises:
        CheckpointError: the model, the mask, the recovery or these together are wrong; names file and tensor.
        MaskFileError, RecoveryFileError: the mask or the recovery file is.
        FileExistsError: ``output`` exists, or another process is writing it.

    Memory: some rows of one tensor and their packed form, and of a mask in a zip archive one bit a weight.

    The model's files are read once, and beside that hashed where the mask says which weights it was made for.
    """
    target = Path(output)
    check_eight_bits(values, activations, head)
    if target.exists():
        raise FileExistsError(f"{target}: already exists; remove it or choose another --output")
    source = model_folder(os.fspath(model))
    with reading_ahead(sorted(source.glob("*.safetensors"))):
        dense = open_dense_model(source)  # imports transformers, which takes seconds
    masks = None
    if mask is not None:
        if pattern == "auto":
            raise CheckpointError(
                f"{mask}: --pattern auto is for a model's own zeros; with --mask, give N:M or nothing"
            )
        masks = open_masks(Path(mask), pattern)
    elif pattern is None and (pattern := dense.declared) is None:
        raise CheckpointError("without --mask, --pattern must say which N:M the model's zeros satisfy, or auto")
    provenance: dict[str, Any] = {"method": "zeros of the dense checkpoint"} if masks is None else masks.provenance
    updates = _recovery(recovery, masks, dense, provenance)
    claims = [] if masks is None else [(masks.path, provenance)]
    check = _BaseCheck(source, claims if recovery is None else [*claims, (Path(recovery), provenance["recovery"])])
    inputs = _inputs(dense, mask, pattern, recovery, values, activations, head, shard_bytes)
    with partial_output(target, inputs) as partial:
        plan = _plan(partial, dense, masks, None if pattern == "auto" else pattern, progress)
        shards = plan_shards(dense, plan, values, shard_bytes)
        resumed = sum((partial.folder / shard.file).exists() for shard in shards)
        packer = RowPacker(plan, masks, updates, values)
        with _progress_bar("packing", sum(info.nbytes for info in dense.headers.values()), progress) as advance:
            for shard in shards:
                write_shard(partial.folder / shard.file, shard, packer, advance)
        warnings = (*check.warnings(provenance), *_without_kernel(activations, plan.pattern))
        write_rest(partial.folder, dense, shards, PackedFormat(
            plan.pattern, ("lm_head", *sorted({*plan.dense, *dense.beyond})), provenance, values, activations,
            head,
        ))  # fmt: skip
    linears = [dense.headers[f"{prefix}.weight"] for prefix in plan.packed]
    packed_bytes = sum(
        spec.nbytes
        for info in linears
        for spec in packed_specs(info, plan.pattern, values)
        if not spec.name.endswith(".shape")
    )
    dense_bytes = sum(info.nbytes for info in linears)
    return ConversionReport(
        plan.pattern, plan.packed, plan.dense, packed_bytes, dense_bytes, plan.found, resumed, warnings
    )


def _plan(
    partial: PartialOutput, dense: DenseModel, masks: MaskSource | None, pattern: NMPattern | None, progress: bool
) -> Plan:
    """The plan, which reading the model's zeros may take a while for: an interrupted run leaves it to the next."""
    if partial.state is not None and masks is None:
        return Plan.from_dict(partial.state)
    if masks is not None:
        plan = plan_by_masks(dense, masks)
    else:
        total = sum(dense.headers[name].nbytes for name in dense.linears)
        with _progress_bar("finding zeros", total, progress) as advance:
            plan = plan_by_zeros(dense, pattern, advance)
    partial.remember(plan.to_dict())
    return plan


def _without_kernel(activations: str | None, pattern: NMPattern) -> list[str]:
    if activations is None or has_rounding_kernel(pattern):
        return []
    return [f"activations of {activations}: no kernel rounds them beside {pattern} weights, only beside 2:4 ones"]


def _inputs(
    dense: DenseModel, mask: str | os.PathLike[str] | None, pattern: NMPattern | str | None,
    recovery: str | os.PathLike[str] | None, values: str | None, activations: str | None, head: str | None,
    shard_bytes: int,
) -> dict[str, Any]:  # fmt: skip
    """All that the output depends on."""
    files = sorted({info.file for info in dense.headers.values()})
    given = [Path(path) for path in (mask, recovery) if path is not None]
    for path in given:
        files += sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
    return {
        "layout": _LAYOUT, "files": [file_identity(path) for path in files], "config": dense.config,
        "pattern": None if pattern is None else str(pattern), "values": values, "activations": activations,
        "head": head, "shard_bytes": shard_bytes, "given": [str(path) for path in given],
    }  # fmt: skip


def _recovery(
    recovery: str | os.PathLike[str] | None, masks: MaskSource | None, dense: DenseModel, provenance: dict[str, Any]
) -> dict[str, LowRank]:
    """The updates of a recovery file, which must have been made with the very mask file; adds to the provenance."""
    if recovery is None:
        return {}
    path = Path(recovery)
    if masks is None or not masks.path.is_file():
        raise CheckpointError(f"{path}: a recovery needs the mask file that it was made with: give --mask")
    file = read_recovery(path, masks.path)
    for name, update in sorted(file.updates.items()):
        info = dense.headers.get(name)
        if info is None:
            raise CheckpointError(f"{path}: {name}: the model has no such weight; was the update made for another?")
        if info.shape != update.shape:
            raise CheckpointError(f"{path}: {name}: expected shape {info.shape} from {info.file}, found {update.shape}")
        if masks.names is None or name not in masks.names:
            raise CheckpointError(f"{path}: {name}: the mask file has no mask for it")
    provenance["recovery"] = dict(file.provenance)
    return file.updates


class _BaseCheck:
    """Finds out, while the weights are packed, whether a mask and its recovery were made for them.

    Hashing goes on beside packing, in a thread that ends with the process: it reads the same files.
    """

    def __init__(self, folder: Path, claims: Sequence[tuple[Path, Mapping[str, Any]]]) -> None:
        self._claims = [claim for claim in claims if "base_model_sha256" in claim[1]]
        self._found: Future[str | None] = Future()
        if self._claims:
            threading.Thread(target=self._hash, args=(folder,), daemon=True).start()

    def warnings(self, provenance: dict[str, Any]) -> tuple[str, ...]:
        """A sentence for each that was made for others; the provenance then says which these are.

        Raises:
            OSError, CheckpointError: the weights cannot be read.
        """
        if not self._claims:
            return ()
        found = self._found.result()
        warnings = [warning for path, claim in self._claims if (warning := other_base(path, claim, found)) is not None]
        if warnings:
            provenance["packed_model_sha256"] = found
        return tuple(warnings)

    def _hash(self, folder: Path) -> None:
        try:
            self._found.set_result(weights_sha256(str(folder)))
        except BaseException as error:  # or whoever asks waits for ever
            self._found.set_exception(error)


@contextmanager
def _progress_bar(what: str, total: int, enabled: bool) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
