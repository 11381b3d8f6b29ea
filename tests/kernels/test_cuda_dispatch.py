"""The choice of kernels on a GPU, with a GPU that is only described and times that are made up; and its metadata."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from fake_gpu import AMPERE, BF16, EIGHT_BIT, FP8, HOPPER, INT8, TIMES, TURING, TWO_OF_FOUR, FakeGPU, operands, w8a8
from filelock import FileLock, Timeout
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)
from triton.runtime.errors import OutOfResources

from maskpro_kernels import NMPattern, UnsupportedKernelError, pack, unpack
from maskpro_kernels.activations import LARGEST
from maskpro_kernels.cuda import dispatch, plans, semi_structured, tuning
from maskpro_kernels.cuda.dispatch import Dispatcher, Operands
from maskpro_kernels.cuda.plans import Plan, PlanTable, Problem, bucket, buckets
from maskpro_kernels.reference import nm_linear_reference
from maskpro_kernels.support import candidates
from maskpro_kernels.triton.tile import Tile

pytestmark = pytest.mark.usefixtures("every_library")


def test_the_fastest_is_chosen_and_measured_once(monkeypatch, tmp_path):
    gpu = FakeGPU(monkeypatch, TIMES)
    choices = Dispatcher(AMPERE, PlanTable(AMPERE, tmp_path), gpu.measure)
    assert choices.plan(operands(5)).backend == "cusparselt"
    assert set(gpu.ran) == {"triton", "expand", "cutlass", "cusparselt"}
    before = gpu.ran.total()
    assert choices.plan(operands(16)).backend == "cusparselt"  # the same bucket
    assert gpu.ran.total() == before
    again = Dispatcher(AMPERE, PlanTable(AMPERE, tmp_path), gpu.measure)  # another process
    assert again.plan(operands(1)).backend == "cusparselt"
    assert gpu.ran.total() == before
    choices.plan(operands(17))
    assert gpu.ran.total() > before  # the next bucket


def test_thresholds_follow_the_times(monkeypatch, tmp_path):
    gpu = FakeGPU(monkeypatch, dict(TIMES))
    choices = Dispatcher(HOPPER, PlanTable(HOPPER, tmp_path), gpu.measure)
    found = {}
    for tokens, triton in ((16, 5.0), (64, 7.0), (256, 9.0), (1024, 40.0)):
        gpu.times["triton"] = triton
        found[tokens] = choices.plan(operands(tokens)).backend
    assert found == {16: "triton", 64: "triton", 256: "cusparselt", 1024: "cusparselt"}
    tile = choices.plan(operands(16)).tile
    assert isinstance(tile, Tile)


def test_what_cannot_take_a_problem_does_not_compete(monkeypatch, tmp_path):
    def backends(o: Operands) -> set[str]:
        gpu = FakeGPU(monkeypatch, TIMES)
        Dispatcher(AMPERE, PlanTable(AMPERE, tmp_path), gpu.measure).plan(o)
        return set(gpu.ran)

    dense = {"triton", "expand"}
    assert backends(operands(3, NMPattern(4, 8))) == dense
    assert backends(operands(3, dtype=torch.int8)) == dense
    assert backends(operands(3, rows=48)) == {*dense, "cusparselt"}  # CUTLASS takes 32 rows
    assert backends(operands(3, rows=50)) == dense
    bare = operands(100)
    assert backends(Operands(bare.x, bare.values, bare.bitmask, None, None, TWO_OF_FOUR)) == dense  # never prepared


def test_a_wrong_or_failing_kernel_is_left_out_and_said(monkeypatch, tmp_path, caplog):
    too_large = OutOfResources(300_000, 232_448, "shared memory")
    faults = {"cusparselt": "wrong", "cutlass": RuntimeError("no kernel image"), "expand": too_large}
    gpu = FakeGPU(monkeypatch, TIMES, faults)
    table = PlanTable(AMPERE, tmp_path)
    with caplog.at_level(logging.WARNING):
        assert Dispatcher(AMPERE, table, gpu.measure).plan(operands(3)).backend == "triton"
    assert "cusparselt" in caplog.text
    assert "gives a wrong result and is left out" in caplog.text
    assert "cannot run: no kernel image" in caplog.text
    again = FakeGPU(monkeypatch, TIMES)
    fresh = Dispatcher(AMPERE, PlanTable(AMPERE, tmp_path), again.measure)
    assert fresh.plan(operands(3)).backend == "triton"
    assert set(again.ran) == {"cutlass"}  # the others are remembered as failed; what it lacked may be there now
    broken = FakeGPU(monkeypatch, TIMES, dict.fromkeys(TIMES, "wrong"))
    with pytest.raises(RuntimeError, match=r"2:4 bfloat16 bfloat16 64x128 32: no kernel gives a right result on N"):
        Dispatcher(AMPERE, PlanTable(AMPERE, tmp_path / "other"), broken.measure).plan(operands(20))


def test_a_lost_gpu_ends_the_measuring_and_nothing_is_kept(monkeypatch, tmp_path):
    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    gpu = FakeGPU(monkeypatch, TIMES, {"expand": RuntimeError("an illegal memory access")})
    monkeypatch.setattr(tuning.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuning.torch.cuda, "synchronize", lost)
    monkeypatch.setattr(dispatch, "_capturing", lambda: False)
    with pytest.raises(RuntimeError, match="CUDA error: an illegal"):
        Dispatcher(AMPERE, PlanTable(AMPERE, tmp_path), gpu.measure).plan(operands(3))
    assert not list(tmp_path.glob("*.json"))


def test_one_tile_that_cannot_run_costs_the_others_nothing(monkeypatch, tmp_path):
    """Whatever its error's type. A backend all of whose ways fail is tried again in the next process, not in this."""
    gpu = FakeGPU(monkeypatch, TIMES | {"triton": 1.0}, {"cusparselt": RuntimeError("no such algorithm")})
    run, failed = gpu.run, []

    def first_tile_fails(plan: Plan, o: Operands) -> torch.Tensor:
        if plan.backend == "triton" and not failed:
            failed.append(plan)
        if plan in failed:
            raise RuntimeError("PassManager::run failed")
        return run(plan, o)

    monkeypatch.setattr(dispatch, "run", first_tile_fails)
    table = PlanTable(HOPPER, tmp_path)
    chosen = Dispatcher(HOPPER, table, gpu.measure).plan(operands(3))
    assert chosen.backend == "triton"
    assert chosen.tile != failed[0].tile
    before = gpu.ran.total()
    assert Dispatcher(HOPPER, table, gpu.measure).plan(operands(3)) == chosen
    assert gpu.ran.total() == before
    Dispatcher(HOPPER, PlanTable(HOPPER, tmp_path), gpu.measure).plan(operands(3))
    assert gpu.ran.total() == before + 1  # cuSPARSELt


def test_others_wait_while_one_measures(monkeypatch, tmp_path):
    table = PlanTable(HOPPER, tmp_path)
    gpu = FakeGPU(monkeypatch, TIMES)
    held = []

    def measure(run) -> float:
        with ThreadPoolExecutor(1) as pool:
            held.append(pool.submit(is_locked).result())
        return gpu.measure(run)

    def is_locked() -> bool:
        try:
            with FileLock(table.path.with_suffix(".lock"), timeout=0):
                return False
        except Timeout:
            return True

    Dispatcher(HOPPER, table, measure).plan(operands(3))
    assert held
    assert all(held)
    assert not is_locked()
    monkeypatch.setattr(plans, "_LONGEST_WAIT_S", 0.1)
    with FileLock(table.path.with_suffix(".lock")):  # by one that may wait for us
        assert Dispatcher(HOPPER, table, gpu.measure).plan(operands(40)).backend == "cusparselt"
    assert len(PlanTable(HOPPER, tmp_path).of(operands(16).problem)) == 3  # what was there before is there still
    assert len(PlanTable(HOPPER, tmp_path).of(operands(64).problem)) == 3


def test_processes_that_start_together_choose_alike(monkeypatch, tmp_path):
    """The one that comes second finds what the first has measured since it last looked."""
    tables = PlanTable(HOPPER, tmp_path), PlanTable(HOPPER, tmp_path)
    assert [table.of(operands(16).problem) for table in tables] == [{}, {}]
    gpu = FakeGPU(monkeypatch, dict(TIMES))
    first = Dispatcher(HOPPER, tables[0], gpu.measure).plan(operands(3))
    measured = gpu.ran.total()
    gpu.times["triton"] = 1.0
    assert Dispatcher(HOPPER, tables[1], gpu.measure).plan(operands(3)) == first
    assert gpu.ran.total() == measured


def test_what_memory_was_lacking_for_is_measured_the_next_time(monkeypatch, tmp_path, caplog):
    lacking = torch.OutOfMemoryError("no memory")
    gpu = FakeGPU(monkeypatch, TIMES, {"cusparselt": lacking})
    with caplog.at_level(logging.WARNING):
        choices = Dispatcher(HOPPER, PlanTable(HOPPER, tmp_path), gpu.measure)
        assert choices.plan(operands(3)).backend == "triton"
    assert ": no memory to measure " in caplog.text
    again = FakeGPU(monkeypatch, TIMES)
    assert Dispatcher(HOPPER, PlanTable(HOPPER, tmp_path), again.measure).plan(operands(3)).backend == "cusparselt"
    assert set(again.ran) == {"cusparselt"}
    none = FakeGPU(monkeypatch, TIMES, dict.fromkeys(TIMES, lacking))
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        Dispatcher(HOPPER, PlanTable(HOPPER, tmp_path / "other"), none.measure).plan(operands(20))


def test_what_is_right_does_not_hang_on_tf32():
    assert dispatch.expected_output(operands(3)).dtype == torch.float64


@pytest.mark.parametrize("dtype", [BF16, INT8, FP8], ids=str)
def test_some_rows_of_a_large_weight_are_checked(dtype):
    """In float64 all of it takes more memory than the kernels; the first and the last row are among them."""
    o = operands(3, dtype=dtype, rows=4096)
    o.x.normal_()
    expected = dispatch.expected_output(o)
    assert expected.shape == (6, 256)
    y = nm_linear_reference(o.x, o.values, o.bitmask, o.scale, None)
    assert dispatch.right(o, expected, y)
    for row in (0, 4095):
        wrong = y.clone()
        wrong[:, row] = 100
        assert not dispatch.right(o, expected, wrong)


def test_maskpro_kernel_forces(monkeypatch, tmp_path):
    gpu = FakeGPU(monkeypatch, TIMES)
    choices = Dispatcher(AMPERE, PlanTable(AMPERE, tmp_path), gpu.measure)
    for name in ("triton", "expand", "cutlass"):
        monkeypatch.setenv("MASKPRO_KERNEL", name)
        assert choices.plan(operands(3)).backend == name
    monkeypatch.setenv("MASKPRO_KERNEL", "reference")
    assert choices.plan(operands(3)) == Plan("reference")
    monkeypatch.setenv("MASKPRO_KERNEL", "cutlass")
    with pytest.raises(UnsupportedKernelError, match="cutlass: covers 2:4 only"):
        choices.plan(operands(3, NMPattern(4, 8)))
    bare = operands(3)
    with pytest.raises(ValueError, match=r"64x128.*do not cover this shape, or need a weight that .*prepare\(\)"):
        choices.plan(Operands(bare.x, bare.values, bare.bitmask, None, None, TWO_OF_FOUR))
    with pytest.raises(UnsupportedKernelError, match=r"cutlass: runs below compute capability 9\.0, found 9\.0"):
        Dispatcher(HOPPER, PlanTable(HOPPER, tmp_path), gpu.measure).plan(operands(3))
    monkeypatch.setenv("MASKPRO_KERNEL", "auto")
    old = Dispatcher(TURING, PlanTable(TURING, tmp_path), gpu.measure)
    with pytest.raises(UnsupportedKernelError, match=r"triton: needs compute capability 8\.0, found 7\.5"):
        old.plan(operands(3))


def test_nothing_is_measured_during_a_capture(monkeypatch, tmp_path, caplog):
    gpu = FakeGPU(monkeypatch, TIMES)
    choices = Dispatcher(HOPPER, PlanTable(HOPPER, tmp_path), gpu.measure)
    monkeypatch.setattr(dispatch, "_capturing", lambda: True)
    with caplog.at_level(logging.WARNING):
        plans = [choices.plan(operands(3)) for _ in range(2)]
    assert plans[0].backend == "triton"
    assert plans[0].tile is not None
    assert not gpu.ran
    assert caplog.text.count("nothing was measured before this CUDA graph was captured") == 1
    monkeypatch.setattr(dispatch, "_capturing", lambda: False)
    assert choices.plan(operands(3)).backend == "cusparselt"
    monkeypatch.setattr(dispatch, "_capturing", lambda: True)
    assert choices.plan(operands(4)).backend == "cusparselt"


@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
def test_8_bits_have_thresholds_of_their_own(dtype, monkeypatch, tmp_path):
    gpu = FakeGPU(monkeypatch, dict(TIMES))
    choices = Dispatcher(HOPPER, PlanTable(HOPPER, tmp_path), gpu.measure)
    found = {}
    for tokens, triton in ((16, 3.0), (64, 3.5), (256, 9.0)):
        gpu.times["triton"] = triton
        found[tokens] = choices.plan(w8a8(tokens, dtype)).backend
    assert found == {16: "triton", 64: "triton", 256: EIGHT_BIT[dtype]}
    assert set(gpu.ran) == {"triton", "expand", EIGHT_BIT[dtype]}
    assert choices.plan(operands(256, dtype=dtype)).backend == "triton"  # the checkpoint did not allow it
    assert json.loads(choices.table.path.read_text())["plans"].keys() == {
        f"2:4 bfloat16 {str(dtype).removeprefix('torch.')} 64x128 {tokens}" for tokens in (16, 64, 256)
    }


@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
def test_8_bit_results_are_compared_with_rounded_activations(dtype, monkeypatch, tmp_path):
    gpu = FakeGPU(monkeypatch, TIMES)
    choices = Dispatcher(HOPPER, PlanTable(HOPPER, tmp_path), gpu.measure)
    assert choices.plan(w8a8(100, dtype, scale=1e-6)).backend == EIGHT_BIT[dtype]
    assert gpu.inputs.scale.item() * LARGEST[dtype] == pytest.approx(5)  # not the stored one, which would clip them all
    wrong = FakeGPU(monkeypatch, TIMES, {EIGHT_BIT[dtype]: "wrong"})
    other = Dispatcher(HOPPER, PlanTable(HOPPER, tmp_path / "other"), wrong.measure)
    assert other.plan(w8a8(100, dtype)).backend == "triton"


def test_what_may_run_is_asked_once(monkeypatch, tmp_path):
    gpu = FakeGPU(monkeypatch, TIMES)
    choices = Dispatcher(HOPPER, PlanTable(HOPPER, tmp_path), gpu.measure)
    asked = []
    monkeypatch.setattr(dispatch, "candidates", lambda *types: asked.append(types) or candidates(*types))
    first = [choices.plan(o) for o in (operands(3), operands(3), w8a8(3, INT8), w8a8(3, INT8))]
    assert len(asked) == 2
    assert [plan.backend for plan in first] == ["cusparselt"] * 2 + ["cusparselt-int8"] * 2
    monkeypatch.setenv("MASKPRO_KERNEL", "triton")
    assert choices.plan(w8a8(3, INT8)).backend == "triton"
    assert len(asked) == 3


def test_buckets():
    assert [bucket(tokens) for tokens in (1, 16, 17, 64, 65, 5000, 100_000)] == [16, 16, 32, 64, 128, 8192, 8192]
    assert buckets(100) == [16, 32, 64, 128]
    assert buckets(1) == [16]


def test_the_file_is_of_one_device_and_version_and_outlives_bad_bytes(tmp_path, caplog):
    problem = Problem(TWO_OF_FOUR, BF16, BF16, 64, 128, 16)
    plans = [Plan("triton", Tile(64, 128, 16, 4), 3.5), Plan("cutlass", None, float("inf"))]
    table = PlanTable(HOPPER, tmp_path)
    table.add(problem, plans)
    assert PlanTable(HOPPER, tmp_path).of(problem) == {plan.backend: plan for plan in plans}
    stored = json.loads(table.path.read_text())
    assert stored["device"] == HOPPER.name
    assert stored["torch"] == torch.__version__
    assert PlanTable(TURING, tmp_path).of(problem) == {}
    for bad in (b"{", b"[]", b'{"plans": {"x": {"triton": {"tile": 3, "microseconds": 1.0}}}}', b"\xff"):
        table.path.write_bytes(bad)
        with caplog.at_level(logging.WARNING):
            assert PlanTable(HOPPER, tmp_path).of(problem) == {}
        assert "kernel times are not readable" in caplog.text
        caplog.clear()
    fresh = PlanTable(HOPPER, tmp_path)
    fresh.add(problem, plans)
    assert PlanTable(HOPPER, tmp_path).of(problem)["triton"].microseconds == 3.5


def test_processes_that_tune_together_lose_nothing(tmp_path):
    problems = [Problem(TWO_OF_FOUR, BF16, BF16, 64, 128, 16 << i) for i in range(8)]

    def tune(problem: Problem) -> None:
        PlanTable(HOPPER, tmp_path).add(problem, [Plan("triton", Tile(64, 128, 16), 1.0)])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(tune, problems))
    table = PlanTable(HOPPER, tmp_path)
    assert all(table.of(problem) for problem in problems)


def test_an_unwritable_folder_costs_the_file_only(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    table = PlanTable(HOPPER, tmp_path / "file" / "folder")
    problem = Problem(TWO_OF_FOUR, BF16, BF16, 64, 128, 16)
    with caplog.at_level(logging.WARNING):
        table.add(problem, [Plan("triton", Tile(64, 128, 16), 1.0)])
    assert table.of(problem)["triton"].microseconds == 1.0
    assert "kernel times are not kept" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(32, 64), (64, 192), (160, 1024)], ids=str)
def test_cutlass_metadata_is_that_of_torch(shape, dtype):
    """Values as they are stored and our metadata are what torch makes of the dense weight, and give it back."""
    weight = pack(torch.randn(shape).to(dtype), TWO_OF_FOUR)
    values, metadata = sparse_semi_structured_from_dense_cutlass(unpack(weight))
    assert torch.equal(weight.values, values)
    found = semi_structured.cutlass_metadata(weight.bitmask)
    assert torch.equal(found, metadata)
    assert found.nbytes == weight.bitmask.nbytes
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(weight.values, found), unpack(weight))


def test_cutlass_metadata_of_a_weight_that_keeps_zeros():
    """Made from the bitmask, not from the values: torch's would move a kept zero."""
    dense = torch.randn(32, 64).bfloat16() * (torch.rand(32, 64) < 0.2)
    weight = pack(dense, TWO_OF_FOUR)
    metadata = semi_structured.cutlass_metadata(weight.bitmask)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(weight.values, metadata), unpack(weight))


needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


class TestOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("backend", ["triton", "expand", "cutlass", "cusparselt"])
    @pytest.mark.parametrize("tokens", [1, 7, 64, 513])
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_every_backend_is_right(self, backend, tokens, with_bias, monkeypatch, tmp_path):
        from maskpro_kernels import nm_linear
        from maskpro_kernels.cuda import prepare

        monkeypatch.undo()
        monkeypatch.setenv("MASKPRO_CACHE", str(tmp_path))
        monkeypatch.setenv("MASKPRO_KERNEL", backend)
        try:
            candidates(TWO_OF_FOUR, BF16, BF16, "cuda", torch.cuda.get_device_capability())
        except UnsupportedKernelError as error:
            pytest.skip(str(error))
        dispatch.dispatcher.cache_clear()
        dense = torch.randn((256, 512), device="cuda").bfloat16()
        dense[:, ::3] = 0  # groups that keep zeros
        prepared = prepare(pack(dense, TWO_OF_FOUR), BF16, tokens)
        assert prepared.backends == (backend,)
        x = torch.randn((tokens, 512), device="cuda").bfloat16()
        bias = torch.randn(256, device="cuda").bfloat16() if with_bias else None
        y = nm_linear(x, prepared.weight, bias)
        expected = torch.nn.functional.linear(
            x.float(), unpack(prepared.weight).float(), bias if bias is None else bias.float()
        )
        assert (y.float() - expected).norm() <= 2**-8 * expected.norm()
