"""Writes the files of a packed checkpoint, some rows of one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from maskpro_kernels import LowRank, NMWeight, pack, recovered, to_int8
from maskpro_kernels.files import PutRows, atomic_file, safetensors_stream, write_atomically
from maskpro_kernels.mask_sources import MaskSource, fill_up
from maskpro_kernels.model_folder import INDEX, CheckpointError, TensorInfo, read_blocks
from maskpro_kernels.packed_checkpoint import SCALE_SUFFIX, PackedFormat
from maskpro_kernels.packing import group_counts
from maskpro_serve.dense_model import DenseModel
from maskpro_serve.packing_plan import Plan, Shard


class RowPacker:
    """Packs some rows of a weight.

    Args:
        plan: says which weights.
        masks: where the masks come from; None for the model's own zeros.
        updates: low-rank updates to merge under the mask, by weight name.
        values: ``int8``, or None.

    Attributes:
        names: of the weights that are packed.
    """

    def __init__(
        self, plan: Plan, masks: MaskSource | None, updates: Mapping[str, LowRank], values: str | None
    ) -> None:
        self.names = {f"{prefix}.weight" for prefix in plan.packed}
        self._pattern = plan.pattern
        self._masks = masks
        self._updates = updates
        self._values = values

    def pack(self, info: TensorInfo, first: int, rows: Tensor) -> NMWeight | None:
        """Packs rows of tensor ``info`` from number ``first`` on; None for one that stays as it is. Thread-safe.

        Raises:
            CheckpointError, MaskFileError: the mask is not strict, or a value cannot be rounded; names file and weight.
        """
        if info.name not in self.names:
            return None
        if self._masks is None:
            kept = rows != 0
            mask = fill_up(kept, group_counts(kept, self._pattern.m), rows, self._pattern)
        else:
            mask = self._masks.read(info.name, rows, first)
        if (update := self._updates.get(info.name)) is not None:
            rows = recovered(rows, mask, LowRank(update.b[first : first + len(rows)], update.a))
        try:
            weight = pack(rows, self._pattern, mask)
            return weight if self._values is None else to_int8(weight)
        except ValueError as error:
            raise CheckpointError(f"{info}: {error}") from error


def write_shard(path: Path, shard: Shard, packer: RowPacker, advance: Callable[[int], None]) -> None:
    """Writes one file, unless an earlier run had.

    Args:
        path: where.
        shard: what it holds.
        packer: packs the weights that are to be.
        advance: called with the bytes read.

    Raises:
        CheckpointError, MaskFileError: an input is wrong.
        OSError: it cannot be written; the message says that a run goes on from here.
    """
    if path.exists():
        advance(sum(info.nbytes for info, _ in shard.sources))
        return
    try:
        with safetensors_stream(path, shard.specs, {"format": "pt"}) as put:
            blocks = ((info, first, rows) for info, _ in shard.sources for first, rows in read_blocks(info))
            for info, first, rows, weight in _in_threads(packer.pack, blocks):
                if weight is not None:
                    _put_packed(put, info, first, weight)
                else:
                    put(info.name, rows, first)
                advance(rows.nbytes)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{path}: cannot be written: {error}; what is written so far is kept, run again") from error


def _in_threads(
    pack: Callable[[TensorInfo, int, Tensor], NMWeight | None], blocks: Iterable[tuple[TensorInfo, int, Tensor]]
) -> Iterator[tuple[TensorInfo, int, Tensor, NMWeight | None]]:
    """Every block and what is made of it, in order; as many at once as there are cores, up to four.

    The files are mapped, so a thread also waits for its own block's disk.
    """
    workers = min(4, len(os.sched_getaffinity(0)))
    waiting: deque[tuple[TensorInfo, int, Tensor, Future[NMWeight | None]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for info, first, rows in blocks:
            waiting.append((info, first, rows, pool.submit(pack, info, first, rows)))
            if len(waiting) > workers:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())


def _finished(
    info: TensorInfo, first: int, rows: Tensor, packed: Future[NMWeight | None]
) -> tuple[TensorInfo, int, Tensor, NMWeight | None]:
    return info, first, rows, packed.result()


def _put_packed(put: PutRows, info: TensorInfo, first: int, weight: NMWeight) -> None:
    prefix = info.name.removesuffix(".weight")
    put(f"{prefix}.compressed", weight.values, first)
    put(f"{prefix}.bitmask", weight.bitmask, first)
    if weight.scale is not None:
        put(prefix + SCALE_SUFFIX, weight.scale.unsqueeze(1), first)
    if first == 0:
        put(f"{prefix}.shape", torch.tensor(info.shape, dtype=torch.int64).unsqueeze(1))


def write_rest(folder: Path, dense: DenseModel, shards: list[Shard], packed: PackedFormat) -> None:
    """Everything but the weights: all small files of the model, its index, and its config."""
    skipped = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
    for path in sorted(dense.folder.iterdir()):
        if path.is_file() and path.name != "config.json" and not path.name.endswith(skipped):
            with path.open("rb") as original, atomic_file(folder / path.name) as copy:
                shutil.copyfileobj(original, copy)
    # Written for one file too: without it, a reader cannot know that a dense tensor is missing.
    index = {
        "metadata": {"total_size": sum(spec.nbytes for shard in shards for spec in shard.specs)},
        "weight_map": {spec.name: shard.file for shard in shards for spec in shard.specs},
    }
    write_atomically(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    config = {**dense.config, "quantization_config": packed.to_dict()}
    write_atomically(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
