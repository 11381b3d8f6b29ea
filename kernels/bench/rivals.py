"""The ways to multiply that are compared: ours, ours of a dense weight, and dense torch at its dtypes and layouts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from maskpro_kernels import NMPattern, NMWeight, nm_linear, pack, to_int8, unpack
from maskpro_kernels.activations import EightBitInputs
from maskpro_kernels.interleaved import InterleavedWeight, interleave, interleave_dense
from maskpro_kernels.reference import nm_linear_reference

OURS = "maskpro"
OURS_DENSE = "maskpro dense bfloat16"


@dataclass(frozen=True)
class Rival:
    """``run(x)`` multiplies x of ``dtype`` by the next of several copies of the weight, each of ``weight_bytes``.

    ``weight_dtype`` is what the weight was rounded to, at the most; ``inputs`` how the activations are, if they are.
    """

    name: str
    dtype: torch.dtype
    weight_dtype: torch.dtype
    weight_bytes: int
    copies: int
    run: Callable[[Tensor], Tensor]
    inputs: EightBitInputs | None = None


def rivals(
    rows: int, columns: int, pattern: NMPattern, weight_dtype: torch.dtype, act_dtype: torch.dtype, set_bytes: int,
    generator: torch.Generator,
) -> tuple[NMWeight, list[Rival]]:  # fmt: skip
    """One random weight, and every way to multiply by it, ours first, which takes activations of ``act_dtype``.

    int8 stands for bfloat16 ones that are rounded to 8 bits, each token by a scale of its own. Each way walks through
    enough copies of its weight to fill ``set_bytes``, so that none is found in a cache.
    """
    dense = torch.randn((rows, columns), generator=generator)
    weight = to_int8(pack(dense, pattern)) if weight_dtype == torch.int8 else pack(dense.to(weight_dtype), pattern)
    dense = unpack(weight).float()
    inputs = EightBitInputs(torch.int8) if act_dtype == torch.int8 else None
    dtype = torch.bfloat16 if inputs else act_dtype
    found = [
        _ours(OURS, lambda: interleave(weight, inputs), dtype, set_bytes, inputs),
        _ours(OURS_DENSE, lambda: interleave_dense(dense.bfloat16()), dtype, set_bytes),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        found.append(_dense(dense.to(dtype), set_bytes))
    if torch.backends.mkldnn.is_available():
        found.append(_prepacked("oneDNN prepacked", dense, set_bytes))
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            found.append(_prepacked("oneDNN prepacked bfloat16", dense.bfloat16(), set_bytes))
    return weight, found


def check(rival: Rival, x: Tensor, weight: NMWeight) -> None:
    """Compares every 32nd output with the float64 reference.

    Raises:
        AssertionError: an output is further off than the rounding of the rival's dtype explains.
    """
    some = slice(None, None, 32)
    x = x.to(rival.dtype)
    y = rival.run(x)[:, some]
    if rival.inputs is not None:
        levels, step = rival.inputs.rounded(x)
        x = levels.double() * step.double()
    scale = None if weight.scale is None else weight.scale[some].double()
    values, bitmask = weight.values[some].double(), weight.bitmask[some]
    expected = nm_linear_reference(x.double(), values, bitmask, scale, None)
    magnitude = nm_linear_reference(x.double().abs(), values.abs(), bitmask, scale, None)
    # Higham's gamma_k |x||W| for a float32 sum, one rounding of the weight and one of the result.
    kept = weight.values.shape[1]
    unit = torch.finfo(torch.float32).eps / 2
    eps = torch.finfo(rival.dtype).eps
    weight_eps = torch.finfo(rival.weight_dtype).eps
    bound = (kept * unit + weight_eps) * magnitude + eps * expected.abs()
    error = (y.double() - expected).abs()
    assert bool((error <= bound).all()), f"{rival.name} is wrong: error {error.max():.3g}"


def _copies(nbytes: int, set_bytes: int) -> int:
    return max(set_bytes // nbytes + 1, 2)


def _ours(
    name: str, load: Callable[[], InterleavedWeight], act_dtype: torch.dtype, set_bytes: int,
    inputs: EightBitInputs | None = None,
) -> Rival:  # fmt: skip
    weight = load()
    copies = [weight, *(load() for _ in range(_copies(weight.nbytes, set_bytes) - 1))]
    following: Iterator[InterleavedWeight] = itertools.cycle(copies)
    weight_dtype = torch.float32 if name == OURS else weight.dtype  # ours is exactly the weight

    def run(x: Tensor) -> Tensor:
        return nm_linear(x, next(following))

    return Rival(name, act_dtype, weight_dtype, weight.nbytes, len(copies), run, inputs)


def _dense(weight: Tensor, set_bytes: int) -> Rival:
    copies = [weight.clone() for _ in range(_copies(weight.nbytes, set_bytes))]
    following: Iterator[Tensor] = itertools.cycle(copies)
    name = f"torch {str(weight.dtype).removeprefix('torch.')}"
    return Rival(name, weight.dtype, weight.dtype, weight.nbytes, len(copies), lambda x: F.linear(x, next(following)))


def _prepacked(name: str, weight: Tensor, set_bytes: int) -> Rival:
    """oneDNN with its own weight layout, one for every number of tokens, as in a server."""
    count = _copies(weight.nbytes, set_bytes)
    copies = [torch.ops.mkldnn._reorder_linear_weight(weight, None) for _ in range(count)]
    following: Iterator[Tensor] = itertools.cycle(copies)

    def run(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, next(following), None, "none", [], "")
        return y

    return Rival(name, weight.dtype, weight.dtype, weight.nbytes, len(copies), run)
