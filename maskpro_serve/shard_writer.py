"""Writes the files of a packed checkpoint, some rows of one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from maskpro_kernels import LowRank, NMWeight, recovered, to_int8
from maskpro_kernels.base_model import MODEL_FILES
from maskpro_kernels.bits import pack_bits, unpack_bits
from maskpro_kernels.files import PutRows, atomic_file, safetensors_stream, write_atomically
from maskpro_kernels.mask_sources import MaskSource, fill_up
from maskpro_kernels.model_folder import INDEX, CheckpointError, TensorInfo, blocks, read_block
from maskpro_kernels.packed_checkpoint import SCALE_SUFFIX, PackedFormat
from maskpro_kernels.packing import group_counts, pack_under
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
            bitmask = pack_bits(fill_up(kept, group_counts(kept, self._pattern.m), rows, self._pattern))
        else:
            bitmask = self._masks.read_bits(info.name, rows, first)
        if (update := self._updates.get(info.name)) is not None:
            rows = recovered(
                rows, unpack_bits(bitmask, rows.shape[1]), LowRank(update.b[first : first + len(rows)], update.a)
            )
        try:
            weight = pack_under(bitmask, rows, self._pattern)
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
        with safetensors_stream(path, shard.specs, {"format": "pt"}) as put, _threads() as pool:

            def write(block: tuple[TensorInfo, range]) -> int:
                info, place = block
                rows = read_block(info, place)
                if (weight := packer.pack(info, place.start, rows)) is not None:
                    _put_packed(put, info, place.start, weight)
                else:
                    put(info.name, rows, place.start)
                return rows.nbytes

            for read in pool.map(write, [(info, place) for info, _ in shard.sources for place in blocks(info)]):
                advance(read)
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(f"{path}: cannot be written: {error}; what is written so far is kept, run again") from error


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """Threads for reading, packing and writing at once; when one fails, what no thread has begun is dropped.

    Two more than cores, for the files are mapped, so that a thread also waits for its own block's disk; four at most,
    for each may hold a block in float64 a few times over.
    """
    pool = ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0)) + 2))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _put_packed(put: PutRows, info: TensorInfo, first: int, weight: NMWeight) -> None:
    prefix = info.name.removesuffix(".weight")
    put(f"{prefix}.compressed", weight.values, first)
    put(f"{prefix}.bitmask", weight.bitmask, first)
    if weight.scale is not None:
        put(prefix + SCALE_SUFFIX, weight.scale.unsqueeze(1), first)
    if first == 0:
        put(f"{prefix}.shape", torch.tensor(info.shape, dtype=torch.int64).unsqueeze(1))


def write_rest(folder: Path, dense: DenseModel, shards: list[Shard], packed: PackedFormat) -> None:
    """Everything but the weights: the other files that the model is served with, its index, and its config."""
    replaced = ("*.safetensors", "*.index.json", "config.json")
    for path in sorted(dense.folder.iterdir()):
        copied = any(path.match(glob) for glob in MODEL_FILES) and not any(path.match(glob) for glob in replaced)
        if path.is_file() and copied:
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
