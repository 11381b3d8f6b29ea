"""What packing makes of a dense model: which linears are packed, and what each file will hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from maskpro_kernels import NMPattern
from maskpro_kernels.bits import bitmask_width
from maskpro_kernels.files import TensorSpec
from maskpro_kernels.mask_sources import MaskSource
from maskpro_kernels.model_folder import CheckpointError, TensorInfo
from maskpro_kernels.packed_checkpoint import SCALE_SUFFIX
from maskpro_kernels.servable import fused_with, text_model_type, why_dense
from maskpro_serve.dense_model import DenseModel
from maskpro_serve.zero_patterns import Zeros, choose_pattern, find_zeros


@dataclass(frozen=True)
class Plan:
    """Which linears are packed.

    Attributes:
        pattern: the pattern of all of them.
        packed: their names, without ``.weight``.
        dense: linears that stay dense, with the reason.
        found: where the model's own zeros decide, the tightest pattern of each linear that has one.
    """

    pattern: NMPattern
    packed: tuple[str, ...]
    dense: dict[str, str]
    found: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "pattern": str(self.pattern), "packed": list(self.packed)}

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Plan:
        """The inverse of :meth:`to_dict`."""
        pattern, packed = NMPattern.parse(document["pattern"]), tuple(document["packed"])
        return cls(pattern, packed, document["dense"], document["found"])


def plan_by_masks(model: DenseModel, masks: MaskSource) -> Plan:
    """Packs what there are masks of; a linear without one stays dense.

    Raises:
        CheckpointError, MaskFileError: a mask is of no linear of this model, or of another shape, or there is none of
            what can be packed.
    """
    linears = set(model.linears)
    for name in sorted(masks.names if masks.names is not None else linears):
        if name not in model.headers:
            raise CheckpointError(f"{masks.path}: {name}: the model has no such weight; was the mask made for another?")
        if name not in linears:
            raise CheckpointError(
                f"{masks.path}: {name}: expected masks of the decoder's linear layers only, this is none"
            )
        masks.check(name, model.headers[name].shape)
    packed: list[str] = []
    dense: dict[str, str] = {}
    for name in model.linears:
        prefix = name.removesuffix(".weight")
        if (reason := _why_dense(model, name)) is not None:
            dense[prefix] = reason
        elif masks.names is None or name in masks.names:
            packed.append(prefix)
        else:
            dense[prefix] = "there is no mask for it"
    plan = Plan(masks.pattern, *_fused_alike(packed, dense))
    if not plan.packed:
        first = next(iter([*packed, *dense]), None)
        why = "it has none" if first is None else f"{first}: {plan.dense[first]}"
        raise CheckpointError(f"{masks.path}: no linear of {model.folder} can be packed: {why}")
    return plan


def plan_by_zeros(model: DenseModel, pattern: NMPattern | None, advance: Callable[[int], None]) -> Plan:
    """Packs the linears whose zeros satisfy a pattern; reads all of them.

    Args:
        model: the model.
        pattern: None chooses the one that makes the checkpoint smallest.
        advance: called with the bytes read.

    Raises:
        CheckpointError: no linear satisfies it, or any, or only some of those that vLLM fuses.
    """
    zeros = {}
    for name in model.linears:
        zeros[name] = find_zeros(model.headers[name])
        advance(model.headers[name].nbytes)
    usable = {name: each for name, each in zeros.items() if _why_dense(model, name) is None}
    chosen = pattern or choose_pattern(_as_fused(usable), model.headers)
    if chosen is None:
        raise CheckpointError(
            f"{model.folder}: a dense model: the zeros of its {len(zeros)} linears satisfy no N:M that would make it "
            "smaller; learn a mask with maskpro-learn, or give --mask"
        )
    satisfying: list[str] = []
    dense: dict[str, str] = {}
    found = {}
    for name, each in zeros.items():
        prefix = name.removesuffix(".weight")
        if (tightest := each.tightest) is not None:
            found[prefix] = str(tightest)
        if (reason := _why_dense(model, name)) is not None:
            dense[prefix] = reason
        elif each.satisfies(chosen):
            satisfying.append(prefix)
        else:
            dense[prefix] = each.why_not(chosen)
    packed, dense = _fused_alike(satisfying, dense)
    if satisfying and not packed:
        raise CheckpointError(f"{model.folder}: {satisfying[0]}: cannot be packed: {dense[satisfying[0]]}")
    if not packed:
        raise CheckpointError(f"{model.folder}: no linear satisfies {chosen}; learn a mask with maskpro-learn")
    return Plan(chosen, packed, dense, found)


def _why_dense(model: DenseModel, name: str) -> str | None:
    return why_dense(name.removesuffix(".weight"), model.headers[name].shape[0], text_model_type(model.config))


def _as_fused(zeros: dict[str, Zeros]) -> dict[str, Zeros]:
    """What each may be packed to together with those that vLLM fuses it with, by weight name."""
    fused = {}
    for name, own in zeros.items():
        names = (f"{other}.weight" for other in fused_with(name.removesuffix(".weight")))
        group = [own, *(zeros[other] for other in names if other in zeros)]
        fused[name] = Zeros(own.in_features, {m: max(each.most.get(m, m) for each in group) for m in own.most})
    return fused


def _fused_alike(packed: list[str], dense: dict[str, str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Leaves dense what vLLM fuses with a dense linear: such a layer could not be served."""
    reasons: dict[str, str] = {}
    for prefix in packed:
        if left := [other for other in fused_with(prefix) if other in dense]:
            reasons[prefix] = f"vLLM fuses it with {left[0]}, which stays dense"
    return tuple(prefix for prefix in packed if prefix not in reasons), dense | reasons


def packed_specs(info: TensorInfo, pattern: NMPattern, values: str | None) -> list[TensorSpec]:
    """The tensors that replace a packed weight."""
    prefix, (rows, columns) = info.name.removesuffix(".weight"), info.shape
    dtype = torch.int8 if values == "int8" else info.dtype
    assert dtype is not None
    scale = [TensorSpec(prefix + SCALE_SUFFIX, torch.float32, (rows, 1))] if values == "int8" else []
    return [
        TensorSpec(f"{prefix}.compressed", dtype, (rows, pattern.kept(columns))),
        TensorSpec(f"{prefix}.bitmask", torch.uint8, (rows, bitmask_width(columns))),
        TensorSpec(f"{prefix}.shape", torch.int64, (2, 1)),
        *scale,
    ]


@dataclass(frozen=True)
class Shard:
    """One file of the packed checkpoint.

    Attributes:
        file: its name.
        sources: the tensors of the dense model that it holds, packed or as they are, each with what is written of it.
    """

    file: str
    sources: tuple[tuple[TensorInfo, tuple[TensorSpec, ...]], ...]

    @property
    def specs(self) -> list[TensorSpec]:
        """All tensors of the file."""
        return [spec for _, specs in self.sources for spec in specs]


def plan_shards(model: DenseModel, plan: Plan, values: str | None, shard_bytes: int) -> list[Shard]:
    """Deals the tensors, in the order they are read, to files of at most ``shard_bytes``, or one tensor's parts."""
    packed = {f"{prefix}.weight" for prefix in plan.packed}
    files: list[list[tuple[TensorInfo, tuple[TensorSpec, ...]]]] = [[]]
    size = 0
    for name, info in model.headers.items():
        assert info.dtype is not None
        if name in packed:
            specs = packed_specs(info, plan.pattern, values)
        else:
            specs = [TensorSpec(name, info.dtype, info.shape)]
        nbytes = sum(spec.nbytes for spec in specs)
        if files[-1] and size + nbytes > shard_bytes:
            files.append([])
            size = 0
        files[-1].append((info, tuple(specs)))
        size += nbytes
    if len(files) == 1:
        return [Shard("model.safetensors", tuple(files[0]))]
    return [
        Shard(f"model-{number:05}-of-{len(files):05}.safetensors", tuple(sources))
        for number, sources in enumerate(files, start=1)
    ]
