"""Measures the backends that compete for a problem, and chooses among them. A wrong one is never chosen."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from maskpro_kernels.cuda.plans import Plan, PlanTable, Problem

logger = logging.getLogger(__name__)

Run = Callable[[], Tensor]
"""One call of a backend with everything given."""

FAILED = float("inf")

_CACHE_BYTES = 256 << 20
"""Twice any GPU's last-level cache and more: written, and half of it read, between timed calls, so that a weight comes
from memory."""


def choose(
    table: PlanTable,
    problem: Problem,
    allowed: Iterable[str],
    ways: Callable[[str], Mapping[Plan, Run]],
    right: Callable[[Plan, Tensor], bool],
    measure: Callable[[Run], float],
) -> Plan:
    """The fastest of the allowed backends; what the table does not know of them is measured and added.

    Args:
        table: of the device.
        problem: what is multiplied.
        allowed: names of the backends, the preferred one first.
        ways: by a backend's name, the plans it could follow, and how to run each.
        right: whether an output of a plan is that of the problem.
        measure: microseconds of a call.

    Raises:
        RuntimeError: not one of them gives a right result; each one's reason was logged. Or the GPU is lost: an error
            came that every later call will meet as well.
        torch.OutOfMemoryError: there was no memory to measure any of them.

    Kept for other processes are times, and failures that will come again: wrong results, what Triton cannot compile. A
    backend that failed otherwise, or for one of whose ways memory was lacking, is left to the next process, which may
    have more memory or another library; this one does not try it again. Processes measure one after the other, so that
    those that serve one model choose alike.
    """
    allowed = list(allowed)
    known = table.of(problem)
    if not all(name in known for name in allowed):
        with table.locked():
            known = _measure_the_rest(table, problem, allowed, ways, right, measure)
    plan = min((known[name] for name in allowed), key=time_of)
    if time_of(plan) == FAILED:
        raise RuntimeError(f"{problem}: no kernel gives a right result on {table.device.name}: {', '.join(allowed)}")
    return plan


def _measure_the_rest(
    table: PlanTable, problem: Problem, allowed: list[str], ways: Callable[[str], Mapping[Plan, Run]],
    right: Callable[[Plan, Tensor], bool], measure: Callable[[Run], float],
) -> dict[str, Plan]:  # fmt: skip
    """What is known of a problem once everything allowed was tried."""
    known = table.of(problem)
    new: list[Plan] = []
    for_now: list[Plan] = []
    lacking: torch.OutOfMemoryError | None = None
    for name in allowed:
        if name not in known:
            plan, error = _best(name, ways(name), problem, right, measure)
            (new if error is None else for_now).append(plan)
            if isinstance(error, torch.OutOfMemoryError):
                lacking = error
    table.add_for_now(problem, for_now)
    if new:
        table.add(problem, new)
    known = table.of(problem)
    if new:
        times = ", ".join(f"{plan.backend} {plan.microseconds:.1f}" for plan in known.values())
        logger.info("%s: microseconds: %s", problem, times)
    if lacking is not None and all(time_of(known[name]) == FAILED for name in allowed):
        raise lacking
    return known


def time_of(plan: Plan) -> float:
    return FAILED if plan.microseconds is None else plan.microseconds


def _best(
    name: str, ways: Mapping[Plan, Run], problem: Problem, right: Callable[[Plan, Tensor], bool],
    measure: Callable[[Run], float],
) -> tuple[Plan, Exception | None]:  # fmt: skip
    """The fastest way of one backend, a plan of infinite time where every way fails; and an error, if one that may pass
    decides: of memory, or of a backend that has no way left."""
    best = Plan(name, microseconds=FAILED)
    passing: Exception | None = None
    for plan, run in ways.items():
        try:
            if not right(plan, run()):
                logger.error("%s: %s gives a wrong result and is left out", problem, plan)
                continue
            time = measure(run)
        except torch.OutOfMemoryError as error:
            logger.warning("%s: no memory to measure %s, which is left out for now: %s", problem, plan, error)
            passing = error.with_traceback(None)  # whose frames hold what there is no memory for
            continue
        except Exception as error:  # a library's own exceptions, of any type; that one way cannot run leaves the others
            _check_gpu()
            logger.warning("%s: %s cannot run: %s", problem, plan, error)
            if passing is None and not _never_compiles(error):
                passing = error.with_traceback(None)
            continue
        if time < time_of(best):
            best = Plan(name, plan.tile, time)
    if time_of(best) < FAILED and not isinstance(passing, torch.OutOfMemoryError):
        passing = None  # one tile of several: Triton's compiler has errors of many types
    return best, passing


def _check_gpu() -> None:
    """Raises what an earlier call left behind, if it was more than that call's: an illegal access ends all others."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _never_compiles(error: Exception) -> bool:
    """Too many registers, too much shared memory for a tile: so it will be in every process."""
    try:
        from triton.errors import TritonError  # type: ignore[import-untyped]
    except ImportError:
        return False
    return isinstance(error, TritonError)


def measure_on_gpu(run: Run, rounds: int = 15) -> float:
    """Median microseconds of one call in a CUDA graph, its operands coming from memory and not from a cache.

    A call that no graph can capture raises, and so is never chosen: a server captures what was chosen here. The current
    device must be the operands'.
    """
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.current_stream()
    try:
        # The stream: torch's own is of the device that first captured. The mode: other threads may use the GPU.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            y = run()
    finally:
        torch.cuda.set_stream(before)  # which a capture that fails does not
    cache = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=y.device)
    clean = cache[: _CACHE_BYTES // 2].view(torch.int64)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in events:
        cache.zero_()
        clean.amax()  # or the call would wait for what it displaces to be written back
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return 1000 * statistics.median(start.elapsed_time(end) for start, end in events)
