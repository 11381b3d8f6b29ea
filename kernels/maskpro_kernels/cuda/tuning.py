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
"""More than any GPU's last-level cache: written between timed calls, so that a weight comes from memory."""


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
        RuntimeError: not one of them gives a right result; each one's reason was logged.
        torch.OutOfMemoryError: there was no memory to measure any of them.

    A backend for one of whose ways memory was lacking is not added to the table: the next process may have more.
    """
    allowed = list(allowed)
    known = table.of(problem)
    new: list[Plan] = []
    passing: dict[str, Plan] = {}
    lacking: torch.OutOfMemoryError | None = None
    for name in allowed:
        if name not in known:
            plan, error = _best(name, ways(name), problem, right, measure)
            if error is None:
                new.append(plan)
            else:
                passing[name], lacking = plan, error
    if new:
        table.add(problem, new)
        known = table.of(problem)
        times = ", ".join(f"{plan.backend} {plan.microseconds:.1f}" for plan in known.values())
        logger.info("%s: microseconds: %s", problem, times)
    known = {**known, **passing}
    plan = min((known[name] for name in allowed), key=time_of)
    if time_of(plan) == FAILED:
        if lacking is not None:
            raise lacking
        raise RuntimeError(f"{problem}: no kernel gives a right result on {table.device.name}: {', '.join(allowed)}")
    return plan


def time_of(plan: Plan) -> float:
    return FAILED if plan.microseconds is None else plan.microseconds


def _best(
    name: str, ways: Mapping[Plan, Run], problem: Problem, right: Callable[[Plan, Tensor], bool],
    measure: Callable[[Run], float],
) -> tuple[Plan, torch.OutOfMemoryError | None]:  # fmt: skip
    """The fastest way of one backend, a plan of infinite time where every way fails; and whether one lacked memory."""
    best = Plan(name, microseconds=FAILED)
    lacking: torch.OutOfMemoryError | None = None
    for plan, run in ways.items():
        try:
            if not right(plan, run()):
                logger.error("%s: %s gives a wrong result and is left out", problem, plan)
                continue
            time = measure(run)
        except torch.OutOfMemoryError as error:
            logger.warning("%s: no memory to measure %s, which is left out for now: %s", problem, plan, error)
            lacking = error.with_traceback(None)  # whose frames hold what there is no memory for
            continue
        except Exception as error:
            # Too many registers or too much shared memory for a tile, no such kernel in the library: a library's own
            # exceptions, of any type. That a way cannot run leaves the others.
            logger.warning("%s: %s cannot run: %s", problem, plan, error)
            continue
        if time < time_of(best):
            best = Plan(name, plan.tile, time)
    return best, lacking


def measure_on_gpu(run: Run, rounds: int = 15) -> float:
    """Median microseconds of one call in a CUDA graph, its operands coming from memory and not from a cache.

    A call that no graph can capture raises, and so is never chosen: a server captures what was chosen here. The current
    device must be the operands'.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):  # torch's own is of the device that first captured
        y = run()
    cache = torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=y.device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in events:
        cache.zero_()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return 1000 * statistics.median(start.elapsed_time(end) for start, end in events)
