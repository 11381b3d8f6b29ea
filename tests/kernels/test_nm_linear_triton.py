"""The Triton kernels against the float64 oracle: every pattern under the interpreter, and on a GPU where there is one.

The interpreter must be chosen before Triton is imported, so this file starts itself as a program of its own for that,
once for all cases. That the kernels compile for GPUs is tested by compiling them, without one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from maskpro_kernels import NMPattern, NMWeight, nm_linear, pack, to_int8, unpack
from maskpro_kernels.packing import EIGHT_BITS
from maskpro_kernels.reference import nm_linear_reference
from maskpro_kernels.triton.tile import Tile, tiles

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
INT8, FP8 = torch.int8, torch.float8_e4m3fn
EVERY_PATTERN = [NMPattern(n, m) for m in (4, 8, 16, 32) for n in range(1, m + 1)]
DTYPES = [(BF16, BF16), (F16, F16), (F32, F32), (BF16, INT8), (F16, BF16), (F32, BF16), (F16, INT8)]
"""Of activations and kept values."""


@dataclass(frozen=True)
class Case:
    """One product; ``offset`` elements lie before the weight's parts in their memory."""

    pattern: NMPattern
    dtypes: tuple[torch.dtype, torch.dtype] = (BF16, BF16)
    tokens: int = 3
    out_features: int = 11
    in_features: int = 96
    tile: Tile = Tile(16, 32, 16)  # noqa: RUF009 (frozen)
    bias: torch.dtype | None = None
    offset: int = 0

    def __str__(self) -> str:
        dtypes = " ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        shape = f"{self.tokens}x{self.in_features}x{self.out_features}"
        return f"{self.pattern} {dtypes} {shape} {self.tile} bias {self.bias} offset {self.offset}"

    def operands(self, device: str = "cpu") -> tuple[torch.Tensor, NMWeight, torch.Tensor | None]:
        generator = torch.Generator().manual_seed(self.pattern.n * 100 + self.pattern.m)
        dense = torch.randn((self.out_features, self.in_features), generator=generator)
        activation, kept = self.dtypes
        weight = pack(dense if kept in EIGHT_BITS else dense.to(kept), self.pattern)
        if kept == INT8:
            weight = to_int8(weight)
        elif kept == FP8:
            weight = replace(weight, values=every_e4m3(weight.values.shape), scale=0.001 + weight.values[:, 0].abs())
        x = torch.randn((self.tokens, self.in_features), generator=generator).to(activation)
        bias = None if self.bias is None else torch.randn(self.out_features, generator=generator).to(self.bias)
        moved = NMWeight(
            self._moved(weight.values).to(device), self._moved(weight.bitmask).to(device), weight.shape, weight.pattern,
            None if weight.scale is None else weight.scale.to(device),
        )  # fmt: skip
        return x.to(device), moved, None if bias is None else bias.to(device)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor.new_zeros(self.offset), tensor.flatten()])[self.offset :].view(tensor.shape)


def every_e4m3(shape: torch.Size) -> torch.Tensor:
    """Every finite e4m3 number in turn, subnormal ones and both zeros too."""
    finite = [code for code in range(256) if code & 0x7F != 0x7F]
    codes = torch.tensor(finite, dtype=torch.uint8)
    places = 101 * torch.arange(shape.numel()) % len(codes)
    return codes[places].view(FP8).reshape(shape)


def cases() -> list[Case]:
    found = []
    for i, pattern in enumerate(EVERY_PATTERN):  # a number of groups that ends inside a tile, in turn by every dtype
        columns = pattern.m * (40 // pattern.m + 1 + i % 2)
        bias = (None, F32, BF16)[i % 3]
        found.append(Case(pattern, DTYPES[i % len(DTYPES)], 1 + i % 5, in_features=columns, bias=bias))
    for pattern in (NMPattern(2, 4), NMPattern(4, 8), NMPattern(3, 4)):
        found += [Case(pattern, dtypes, bias=F32) for dtypes in DTYPES]
    two_of_four = NMPattern(2, 4)
    found += [Case(two_of_four, in_features=columns) for columns in (4, 36, 48, 104, 160, 256)]
    found += [Case(two_of_four, in_features=128, offset=offset) for offset in (1, 2)]
    found += [Case(NMPattern(8, 16), in_features=64, offset=1), Case(NMPattern(16, 32), in_features=64, offset=1)]
    found += [Case(two_of_four, tokens=tokens) for tokens in (1, 16, 17, 40)]
    found += [Case(two_of_four, out_features=rows) for rows in (1, 16, 33)]
    for splits in (2, 4, 8):  # of 5 blocks of columns: 4 and 8 splits leave some without any
        found.append(Case(two_of_four, in_features=160, tile=Tile(16, 32, 16, splits), bias=BF16))
    for kept in (INT8, FP8):
        found.append(Case(NMPattern(4, 8), (F16, kept), in_features=160, tile=Tile(16, 32, 16, 4), bias=F16))
    for pattern in ("1:4", "2:4", "3:4", "4:8", "6:8", "8:16", "8:32", "20:32"):  # whole groups, and gathered values
        found.append(Case(NMPattern.parse(pattern), (BF16, FP8), bias=F32))
    found += [Case(two_of_four, (BF16, FP8), in_features=columns, bias=BF16) for columns in (4, 36, 128, 160)]
    found += [Case(two_of_four, (F16, FP8), tokens=tokens, out_features=33) for tokens in (1, 17)]
    found += [Case(two_of_four, (F32, FP8)), Case(two_of_four, (BF16, FP8), in_features=128, offset=1)]
    for pattern in (two_of_four, NMPattern(4, 8)):
        found.append(Case(pattern, in_features=192, out_features=70, tokens=20, tile=Tile(64, 128, 32)))
    return found


CASES = cases()


def run(case: Case, device: str = "cpu") -> dict[str, torch.Tensor]:
    """The kernel's product, twice where it is split in four, and the dense weight."""
    from maskpro_kernels.cuda import dispatch
    from maskpro_kernels.cuda.plans import Plan
    from maskpro_kernels.triton.nm_linear import expand
    from maskpro_kernels.triton.nm_linear import nm_linear as multiply

    x, weight, bias = case.operands(device)
    arguments = (x, weight.values, weight.bitmask, weight.scale, bias, case.pattern, case.tile)
    again = multiply(*arguments) if case.tile.splits == 4 else None
    dtype = weight.values.dtype if weight.values.dtype != FP8 else BF16
    dense = expand(weight.values, weight.bitmask, case.in_features, case.pattern, dtype)
    if case.in_features <= 96 and case.pattern.m < 16:
        operands = dispatch.Operands(*arguments[:-1])
        expanded = dispatch.run(Plan("expand"), operands)
        assert dispatch.right(operands, dispatch.expected_output(operands), expanded), str(case)
    return {"y": multiply(*arguments).cpu(), "again": None if again is None else again.cpu(), "dense": dense.cpu()}


def check(case: Case, found: dict[str, torch.Tensor]) -> None:
    """The dense weight bit for bit; the product within Higham's gamma_k |x||W| and one rounding of the result."""
    x, weight, bias = case.operands()
    levels = NMWeight(weight.values.float(), weight.bitmask, weight.shape, weight.pattern)
    assert torch.equal(found["dense"].float(), unpack(levels))
    values = weight.values.double()
    exact = nm_linear_reference(x.double(), values, weight.bitmask, weight.scale, bias)
    terms = nm_linear_reference(x.double().abs(), values.abs(), weight.bitmask, weight.scale, None)
    if bias is not None:
        terms += bias.double().abs()
    count = weight.values.shape[1] + case.tile.splits + 3  # of roundings on the way to a sum: scale and bias, too
    unit = torch.finfo(torch.float32).eps / 2
    bound = count * unit / (1 - count * unit) * terms + torch.finfo(x.dtype).eps * exact.abs()
    bound += torch.finfo(x.dtype).smallest_normal
    assert found["y"].dtype == x.dtype
    error = (found["y"].double() - exact).abs()
    assert (error <= bound).all(), f"error {error.max():.3g}, {(error / bound).max():.2f} of the bound"
    if found["again"] is not None:
        assert torch.equal(found["again"], found["y"])


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: str(CASES[index]))
def test_interpreted(interpreted: list[dict[str, torch.Tensor]], index: int) -> None:
    check(CASES[index], interpreted[index])


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


class TestOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_the_kernels(self, case: Case) -> None:
        check(case, run(case, "cuda"))

    @pytest.mark.parametrize("tokens", [1, 16, 64, 300])
    @pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16"])
    def test_every_tile_that_tuning_tries(self, pattern: str, tokens: int) -> None:
        from triton.runtime.errors import OutOfResources

        for tile in tiles(tokens, 1024, 2048, 132, 2):
            case = Case(NMPattern.parse(pattern), (BF16, BF16), tokens, 1024, 2048, tile)
            try:
                y = run(case, "cuda")
            except OutOfResources:
                continue  # tuning leaves such a tile out as well: consumer GPUs have less shared memory
            check(case, y)

    @pytest.mark.parametrize("tokens", [1, 70])
    def test_under_a_cuda_graph(self, tokens: int) -> None:
        x, weight, _ = Case(NMPattern(2, 4), tokens=tokens, out_features=256, in_features=512).operands("cuda")
        expected = nm_linear(x, weight)  # measured and compiled here
        other = torch.randn_like(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = nm_linear(x, weight)
        graph.replay()
        assert torch.equal(y, expected)
        x.copy_(other)
        graph.replay()
        assert torch.equal(y, nm_linear(other, weight))


COMPILE = """
import sys, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from maskpro_kernels.triton.nm_linear import _nm_linear
n, m, expand, capability, rows, columns, tokens, warps, stages = map(int, sys.argv[3:])
names = list(_nm_linear.arg_names)
types = {name: "constexpr" for name in names} | {"x": "*bf16", "y": "*fp32", "bitmask": "*u32", "values": sys.argv[1]}
types |= {name: "i32" for name in ("tokens", "in_features", "out_features", "kept", "stride")}
constants = {"scale": None, "bias": None, "N": n, "M": m, "DTYPE": getattr(tl, sys.argv[2]), "EXPAND": expand}
constants |= {"MASK": 32, "BLOCK_O": rows, "BLOCK_K": columns, "BLOCK_T": tokens, "SPLIT": True, "EVEN": True}
aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types[name] != "constexpr" and i != 6}
source = ASTSource(_nm_linear, types, constexprs=constants, attrs=aligned)
options = {"num_warps": warps, "num_stages": stages}
kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
print("shared", kernel.metadata.shared)
print(kernel.asm["ptx"])
"""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made: PTX, and bytes of shared memory."""

    ptx: str
    shared: int

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{re.escape(instruction)}\b", self.ptx))


def compiled(folder: Path, values: str, *numbers: int, kept: str = "bfloat16") -> Compiled:
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILE, values, kept, *map(str, numbers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, _, ptx = done.stdout.partition("\n")
    return Compiled(ptx, int(first.split()[1]))


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("capability", "product"), [(80, "mma.sync"), (90, "wgmma.mma_async")])
def test_2_to_4_compiles_to_what_its_speed_rests_on(capability: int, product: str, tmp_path: Path) -> None:
    """Tensor cores, 16-byte asynchronous copies of the values, byte permutations, nothing spilled, two blocks an SM."""
    code = compiled(tmp_path, "*i32", 2, 4, 2, capability, 64, 128, 16, 4, 4)
    assert product in code.ptx
    assert f"sm_{capability}" in code.ptx
    assert "ld.local" not in code.ptx
    assert "st.local" not in code.ptx
    assert "ld.global" not in code.ptx  # everything is prefetched
    assert code.count("prmt.b32") >= 80  # 1.25 for each of a thread's 64 weights of a tile
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", code.ptx)
    assert code.shared <= 100 << 10


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("values", "n", "m", "expand"),
    [("*i32", 2, 8, 3), ("*i64", 4, 8, 3), ("*i64", 8, 16, 3), ("*bf16", 6, 8, 1), ("*bf16", 16, 32, 1)],
)
def test_other_patterns_compile(values: str, n: int, m: int, expand: int, tmp_path: Path) -> None:
    code = compiled(tmp_path, values, n, m, expand, 90, 64, 128, 16, 4, 3)
    assert "wgmma.mma_async" in code.ptx
    assert "ld.local" not in code.ptx
    assert "popc" not in code.ptx


@pytest.mark.timeout(600)
def test_fp8_values_compile_where_no_fp8_instruction_is(tmp_path: Path) -> None:
    code = compiled(tmp_path, "*u16", 2, 4, 0, 80, 64, 128, 16, 4, 3, kept="float8e4nv")
    assert "mma.sync" in code.ptx
    assert "e4m3" not in code.ptx
    assert ".ftz" not in code.ptx  # subnormal e4m3 numbers are subnormal float32 ones on their way
    assert "ld.local" not in code.ptx


def test_tiles_fill_the_gpu() -> None:
    for tokens, rows, columns in [(1, 4096, 4096), (16, 1024, 8192), (64, 28672, 8192), (4096, 4096, 14336), (1, 4, 4)]:
        found = tiles(tokens, rows, columns, 132, 2)
        assert found
        assert len(found) == len(set(found))
        for tile in found:
            assert all(size & (size - 1) == 0 for size in (tile.rows, tile.columns, tile.tokens, tile.splits))
            assert tile.splits == 1 or tile.splits * tile.columns * 2 <= columns
    best = tiles(1, 4096, 4096, 132, 2)[0]
    assert 4096 // best.rows * best.splits >= 132


if __name__ == "__main__":
    import triton_interpreter

    triton_interpreter.save(run, CASES, sys.argv[1])
