"""Masks made elsewhere: our mask file, MaskLLM's npz, a folder of .pt masks, the zeros of a checkpoint.

Whatever the source, a mask is read some rows at a time, is strictly N:M, and an error names the file, the layer, the
group and the count found. The learner starts from these masks, and the packer packs under them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskpro_kernels.bits import pack_bits
from maskpro_kernels.maskllm import MaskLLMArchive
from maskpro_kernels.masks import MaskFileError, MaskReader
from maskpro_kernels.model_folder import CheckpointError, open_safetensors, read_config, read_headers
from maskpro_kernels.packing import check_mask, group_counts, top_n_mask
from maskpro_kernels.pattern import NMPattern

SOURCES = "a mask file, MaskLLM's .npz, a folder of .pt masks, or a folder with a pruned checkpoint"


class MaskSource(ABC):
    """Masks of a model's weights by name.

    Attributes:
        path: where they come from.
        pattern: what every mask obeys.
        names: the weights that there are masks of; None where any weight may have one.
        provenance: what the source says about itself.
    """

    path: Path
    pattern: NMPattern
    names: frozenset[str] | None
    provenance: dict[str, str]

    @abstractmethod
    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Finds out, before anything is written, whether there is a mask for a weight of this shape.

        Raises:
            MaskFileError: there is none; names expected and found.
        """

    @abstractmethod
    def read(self, name: str, weight: Tensor, first: int = 0) -> Tensor:
        """The mask of some rows of a weight that :meth:`check` was called for.

        Args:
            name: of the weight.
            weight: (rows, in_features), rows of the weight that the mask is for.
            first: the number of the first of them.

        Returns:
            Boolean (rows, in_features), strictly of the pattern.

        Raises:
            MaskFileError: the mask is not strict, or cannot be read.
        """

    def read_bits(self, name: str, weight: Tensor, first: int = 0) -> Tensor:
        """What :meth:`read` does, as a bitmask: uint8 (rows, ceil(in_features / 8))."""
        return pack_bits(self.read(name, weight, first))


def open_masks(path: Path, pattern: NMPattern | None) -> MaskSource:
    """Opens whatever ``path`` is.

    Args:
        path: :data:`SOURCES`.
        pattern: what the masks are expected to obey; required of a source that does not say.

    Raises:
        MaskFileError: it is no such source, or one of another pattern.
        CheckpointError: a folder that is neither of the two.
    """
    if not path.is_dir() and path.suffix in (".pt", ".pth", ".bin", ".pkl", ".pickle", ".npy"):
        raise MaskFileError(f"{path}: expected {SOURCES}; a single {path.suffix} file is none of these")
    if not path.is_dir() and path.suffix != ".npz":
        return _MaskFileSource(MaskReader(path), pattern)
    if pattern is None:
        raise MaskFileError(f"{path}: it does not say its pattern, so --pattern must say which N:M it is")
    if path.suffix == ".npz":
        return _ArchiveSource(path, pattern)
    if any(path.glob("*.pt")) and not (path / "config.json").exists():
        return _TorchFolderSource(path, pattern)
    return _ZerosSource(path, pattern)


def _no_mask(path: Path, name: str, shape: tuple[int, ...], found: object) -> MaskFileError:
    return MaskFileError(
        f"{path}: {name}: expected a mask of shape {shape}, found {found}: is it the mask of another model?"
    )


class _MaskFileSource(MaskSource):
    def __init__(self, reader: MaskReader, pattern: NMPattern | None) -> None:
        if pattern not in (None, reader.pattern):
            raise MaskFileError(f"{reader.path}: expected masks of pattern {pattern}, found {reader.pattern}")
        self.path, self.pattern, self.provenance = reader.path, reader.pattern, reader.provenance
        self.names = frozenset(reader.shapes)
        self._reader = reader

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        if (found := self._reader.shapes.get(name)) != shape:
            raise _no_mask(self.path, name, shape, found)

    def read(self, name: str, weight: Tensor, first: int = 0) -> Tensor:
        return self._reader.read(name, first, len(weight))

    def read_bits(self, name: str, weight: Tensor, first: int = 0) -> Tensor:
        return self._reader.read_bits(name, first, len(weight))


class _ArchiveSource(MaskSource):
    """MaskLLM's ``mask_compressed.npz``. It holds no shapes: those are the model's.

    It is made of what is not zero in a masked model, so a weight that is kept and zero counts as dropped there: among
    the billions of a float16 model there are some. Where a group keeps too few, its zero weights are kept, too.
    """

    def __init__(self, path: Path, pattern: NMPattern) -> None:
        self.path, self.pattern = path, pattern
        self.provenance = {"method": f"MaskLLM: {path.name}"}
        self._archive = MaskLLMArchive(path)
        self.names = frozenset(self._archive.names)
        self._shapes: dict[str, tuple[int, ...]] = {}

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._archive.names:
            raise _no_mask(self.path, name, shape, None)
        self._archive.check_size(name, shape)
        self._shapes[name] = shape

    def read(self, name: str, weight: Tensor, first: int = 0) -> Tensor:
        mask = _keep_zeros(self._archive.read(name, self._shapes[name], first, len(weight)), weight, self.pattern)
        _check_strict(mask, self.pattern, first, f"{self.path}: {name}")
        return mask


class _TorchFolderSource(MaskSource):
    """The MaskPro authors' folders: ``<module>.pt`` holds the boolean mask of ``<module>.weight``.

    A .pt file is a pickle: it is read with ``weights_only``, which constructs tensors and nothing else.
    """

    def __init__(self, path: Path, pattern: NMPattern) -> None:
        self.path, self.pattern = path, pattern
        self.provenance = {"method": f"MaskPro authors' masks: {path.name}"}
        self.names = frozenset(f"{file.name.removesuffix('.pt')}.weight" for file in path.glob("*.pt"))

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        if self.names is None or name not in self.names:
            raise _no_mask(self.path, name, shape, None)
        mask = self._load(name)
        if tuple(mask.shape) != shape:
            raise _no_mask(self._file(name), name, shape, tuple(mask.shape))

    def read(self, name: str, weight: Tensor, first: int = 0) -> Tensor:
        mask = self._load(name)[first : first + len(weight)].view(torch.uint8) != 0  # a file's bytes may be any
        _check_strict(mask, self.pattern, first, f"{self._file(name)}: {name}")
        return mask

    def _file(self, name: str) -> Path:
        return self.path / f"{name.removesuffix('.weight')}.pt"

    def _load(self, name: str) -> Tensor:
        file = self._file(name)
        try:
            mask = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # whatever torch makes of a file that is none of its own
            first = str(error).strip().partition("\n")[0]
            raise MaskFileError(f"{file}: {name}: not a readable .pt file of a tensor: {first}") from error
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.layout != torch.strided:
            found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise MaskFileError(f"{file}: {name}: expected a boolean mask, found {found}")
        return mask


class _ZerosSource(MaskSource):
    """What a pruned checkpoint keeps: its nonzeros.

    A group with fewer than n of them is filled up with the weights that are the largest in the model that the masks
    are for; ties, as where that model is the pruned one itself, go to the lower column.
    """

    names = None

    def __init__(self, path: Path, pattern: NMPattern) -> None:
        self.path, self.pattern = path, pattern
        self.provenance = {"method": f"zeros of {path.resolve().name}"}
        if (quantization := read_config(path).get("quantization_config")) and not _says_zeros_only(quantization):
            raise CheckpointError(
                f"{path / 'config.json'}: expected dense tensors with zeros, found a quantization_config"
            )
        self._headers = read_headers(path)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        info = self._headers.get(name)
        if info is None or info.shape != shape:
            raise _no_mask(self.path, name, shape, None if info is None else info.shape)

    def read(self, name: str, weight: Tensor, first: int = 0) -> Tensor:
        info, n, m = self._headers[name], self.pattern.n, self.pattern.m
        with open_safetensors(info.file) as file:
            kept = file.get_slice(name)[first : first + len(weight)] != 0
        counts = group_counts(kept, m)
        wrong = counts > n
        if bool(wrong.any()):
            row, group = (int(i) for i in wrong.nonzero()[0])
            raise MaskFileError(
                f"{self.path}: {name}: row {first + row}, group {group} (columns {group * m} to {group * m + m - 1}) "
                f"has {int(counts[row, group])} nonzeros, expected at most {n} of {m}; {int(wrong.sum())} of "
                f"{counts.numel()} groups have too many"
            )
        return fill_up(kept, counts, weight, self.pattern)


def _says_zeros_only(quantization: Any) -> bool:
    """Whether a ``quantization_config`` is compressed-tensors' word for plain tensors with zeros."""
    if not isinstance(quantization, dict) or quantization.get("config_groups"):
        return False
    sparsity = quantization.get("sparsity_config")
    return isinstance(sparsity, dict) and sparsity.get("format") == "dense"


def fill_up(kept: Tensor, counts: Tensor, weight: Tensor, pattern: NMPattern) -> Tensor:
    """Adds the largest weights to the groups that keep fewer than n; ties go to the lower column.

    Args:
        kept: boolean (rows, in_features), at most n in every group.
        counts: (rows, in_features / m), how many in each.
        weight: (rows, in_features); NaN counts as 0, infinity as the largest finite number.
        pattern: the pattern.

    Returns:
        Boolean (rows, in_features), exactly n in every group, all of ``kept`` among them.
    """
    short = (counts < pattern.n).flatten()
    if not bool(short.any()):
        return kept
    groups = kept.reshape(-1, pattern.m)
    size = weight.detach().to(kept.device).reshape(-1, pattern.m)[short].abs().float().nan_to_num(nan=0.0)
    filled = groups.clone()
    filled[short] = top_n_mask(size.masked_fill_(groups[short], torch.inf), pattern)
    return filled.reshape(kept.shape)


def _keep_zeros(kept: Tensor, weight: Tensor, pattern: NMPattern) -> Tensor:
    """Adds weights that are zero, lower columns first, to the groups that keep fewer than n."""
    missing = pattern.n - group_counts(kept, pattern.m).int()  # some may keep too many
    if not bool((missing > 0).any()):
        return kept
    groups = (len(kept), -1, pattern.m)
    zeros = (weight.to(kept.device) == 0).reshape(groups) & ~kept.reshape(groups)
    added = zeros & (zeros.cumsum(dim=-1) <= missing.unsqueeze(-1))
    return kept | added.reshape(kept.shape)


def _check_strict(mask: Tensor, pattern: NMPattern, first: int, where: str) -> None:
    try:
        check_mask(mask, pattern, first_row=first)
    except ValueError as error:
        raise MaskFileError(f"{where}: {error}") from error
