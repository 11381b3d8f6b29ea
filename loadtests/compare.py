"""Compares two OpenAI-compatible endpoints under load, A B A B, and writes a report.

    python loadtests/compare.py                                  # sparse-llama against dense-llama, both started here
    python loadtests/compare.py --quick                          # a few minutes
    python loadtests/compare.py --model-a DIR --model-b DIR      # any two models that maskpro-serve serves
    python loadtests/compare.py --endpoint old=http://host:8000 --endpoint new=http://other:8000

Every load (users of a closed loop, rates of an open one) is run on A, then on B, then the next; all of it in several
rounds. Each run begins with a warm-up that is not counted, and both endpoints are asked the same. Every run is kept in
OUTPUT as it ends: a comparison that was stopped goes on where it was, one that was finished is made anew. Exit code 1
if any request failed.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

from calibration import Pace, calibrate
from cell import LoadError, failures, kept_result, run_cell
from endpoints import Endpoint, Endpoints
from load_settings import LoadSettings
from machine import machine, versions
from plan import Load, Plan
from report import write_report
from results import Results
from server import ServerError
from workloads import WORKLOADS

SERVER_FLAGS = "--max-model-len 2048 --kv-cache-memory-bytes 1G"
QUICK = {
    "concurrency": [1, 8], "rates": [], "rounds": 2, "requests_per_user": 1, "least_requests": 2,
    "flags": f"{SERVER_FLAGS} --enforce-eager",
}  # fmt: skip
"""Compiling takes longer than all of a quick comparison."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sides = parser.add_argument_group("what is compared")
    sides.add_argument(
        "--endpoint", action="append", default=[], metavar="NAME=URL[,MODEL]", help="twice; starts nothing"
    )
    sides.add_argument("--model-a", default="sparse-llama", help="for maskpro-serve (default sparse-llama)")
    sides.add_argument("--model-b", default="dense-llama", help="for maskpro-serve (default dense-llama)")
    sides.add_argument("--name-a", default="sparse", help="in the report (default sparse)")
    sides.add_argument("--name-b", default="dense", help="in the report (default dense)")
    sides.add_argument("--flags", default=SERVER_FLAGS, help=f"for both servers (default {SERVER_FLAGS!r})")
    sides.add_argument("--flags-a", default="", help="for the first only")
    sides.add_argument("--flags-b", default="", help='for the second only, as "--dtype bfloat16"')
    sides.add_argument("--env-a", action="append", default=[], metavar="NAME=VALUE", help="variable for the first only")
    sides.add_argument(
        "--env-b", action="append", default=[], metavar="NAME=VALUE", help="variable for the second only"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--workload", choices=WORKLOADS, default="chat", help="of the closed loops (default chat)")
    load.add_argument("--concurrency", type=int, nargs="*", default=[1, 4, 16], help="users (default 1 4 16)")
    load.add_argument("--open-workload", choices=WORKLOADS, default="mixed", help="of the open loops (default mixed)")
    load.add_argument("--rates", type=float, nargs="*", default=[1.0], help="Poisson arrivals per second (default 1)")
    load.add_argument("--rounds", type=int, default=3, help="(default 3)")
    load.add_argument("--requests-per-user", type=int, default=3, help="of a closed loop (default 3)")
    load.add_argument("--least-requests", type=int, default=8, help="of a closed loop (default 8)")
    load.add_argument("--open-seconds", type=float, default=24.0, help="mean length of an open loop (default 24)")
    load.add_argument("--seed", type=int, default=1)
    load.add_argument(
        "--abort-share", type=float, default=0.0, help="share of requests that hang up halfway (default 0)"
    )
    load.add_argument("--request-timeout", type=float, default=300.0, help="seconds (default 300)")
    load.add_argument("--retries", type=int, default=2, help="where there was no answer yet (default 2)")
    load.add_argument("--natural-stop", action="store_true", help="for endpoints that do not know ignore_eos")
    run = parser.add_argument_group("run")
    run.add_argument("--quick", action="store_true", help="fewer and shorter runs, servers not compiled")
    run.add_argument("--output", type=Path, default=Path("build/loadtest"), help="folder (default build/loadtest)")
    run.add_argument("--fresh", action="store_true", help="do not go on with an unfinished comparison")
    run.add_argument("--stop-after", type=float, default=float("inf"), metavar="SECONDS",
        help="begin no run after that; the same command again goes on")  # fmt: skip
    run.add_argument("--idle", type=float, default=2.0, help="seconds between runs (default 2: vLLM's engine spins for "
        "one after its last message, and would take a core from the other)")  # fmt: skip
    run.add_argument("--no-calibration", action="store_true", help="leave out the runs against the stub")
    run.add_argument("--report-only", action="store_true", help="write the report again from what is measured")
    return parser


def endpoints_from(arguments: argparse.Namespace) -> list[Endpoint]:
    """The two sides.

    Raises:
        ValueError: there are not two, or they have one name.
    """
    if arguments.endpoint:
        sides = [Endpoint.parse(text) for text in arguments.endpoint]
    else:
        if wrong := [text for text in (*arguments.env_a, *arguments.env_b) if not text.partition("=")[1]]:
            raise ValueError(f"variable {wrong[0]!r}: expected NAME=VALUE")
        common = shlex.split(arguments.flags)
        flags_a, flags_b = (*common, *shlex.split(arguments.flags_a)), (*common, *shlex.split(arguments.flags_b))
        sides = [
            Endpoint(arguments.name_a, arguments.model_a, flags_a, tuple(arguments.env_a)),
            Endpoint(arguments.name_b, arguments.model_b, flags_b, tuple(arguments.env_b)),
        ]
    if len(sides) != 2 or sides[0].name == sides[1].name:
        raise ValueError(f"expected two endpoints of different names, found {', '.join(side.name for side in sides)}")
    for side in sides:
        if not side.name.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"name {side.name!r}: expected letters, digits, - and _, for it names files")
    return sides


def plan_from(arguments: argparse.Namespace) -> Plan:
    """The loads.

    Raises:
        ValueError: nothing to measure.
    """
    closed = [Load(arguments.workload, users=users) for users in arguments.concurrency]
    opened = [Load(arguments.open_workload, rate=rate) for rate in arguments.rates]
    if arguments.rounds < 1 or not [*closed, *opened] or min([*arguments.concurrency, *arguments.rates]) <= 0:
        raise ValueError("expected one round or more, and concurrencies and rates above 0")
    base = LoadSettings(
        seed=arguments.seed * 1000,
        warmup=1,
        abort_share=arguments.abort_share,
        timeout=arguments.request_timeout,
        retries=arguments.retries,
        fixed_length=not arguments.natural_stop,
    )
    return Plan(
        loads=(*closed, *opened),
        rounds=arguments.rounds,
        requests_per_user=arguments.requests_per_user,
        least_requests=arguments.least_requests,
        open_seconds=arguments.open_seconds,
        base=base,
    )


def measure(results: Results, deadline: float, idle: float) -> bool:
    """Runs the cells that are not there yet; returns whether all are."""
    missing = [cell for cell in results.cells() if kept_result(results.path(cell), results.settings(cell)) is None]
    if not missing:
        return True
    if len(missing) < len(results.cells()):
        kept = len(results.cells()) - len(missing)
        print(f"{results.folder}: going on; {kept} runs of {len(results.cells())} are there", file=sys.stderr)
    with Endpoints(results.endpoints, results.folder / "logs") as running:
        sides = {side.endpoint.name: side for side in running}
        for number, cell in enumerate(missing, 1):
            if time.monotonic() > deadline:
                return False
            time.sleep(idle)
            side = sides[cell.endpoint]
            run = run_cell(side.url, side.model, results.settings(cell), results.path(cell))
            tokens = sum(record.completion_tokens for record in run.records)
            print(
                f"[{number}/{len(missing)}] round {cell.round_number + 1}, {cell.load.workload}, {cell.load.label}, "
                f"{cell.endpoint}: {tokens / run.wall:.1f} tokens/s, {len(run.records)} requests, "
                f"{failures(run)} failed",
                file=sys.stderr,
            )
        for side in running:
            results.note_facts(side.endpoint.name, side.facts)
    return True


def calibrations(results: Results, *, all_loads: bool) -> list[dict[str, object]]:
    """The closed loops of one round, or the greatest of them, against the stub."""
    loads = sorted((load for load in results.plan.loads if load.users), key=lambda load: load.users)
    settings = [results.plan.settings(load, 0) for load in (loads if all_loads else loads[-1:])]
    chats = [replace(each, workload="chat", abort_share=0.0, fixed_length=True) for each in settings]
    return [calibrate(each, Pace(), results.folder / "calibration") for each in chats]


def main() -> int:
    arguments = parser().parse_args()
    if arguments.quick:  # as defaults: what is given explicitly wins
        parsed = parser()
        parsed.set_defaults(**QUICK)
        arguments = parsed.parse_args()
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the servers are stopped
    try:
        results = Results(arguments.output, endpoints_from(arguments), plan_from(arguments))
        if not arguments.report_only:
            results.open(fresh=arguments.fresh, command=shlex.join(["python", "loadtests/compare.py", *sys.argv[1:]]))
            results.note_machine(machine(), versions())
            if not measure(results, begin + arguments.stop_after, arguments.idle):
                print(f"stopped after {time.monotonic() - begin:.0f} s; the same command goes on", file=sys.stderr)
                return 3
            if not arguments.no_calibration:
                results.note("calibration", calibrations(results, all_loads=not arguments.quick))
        failed = write_report(results)
        results.note("finished", True)
    except (ValueError, OSError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    except (LoadError, ServerError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 1
    print((results.folder / "report.md").read_text())
    print(f"{results.folder / 'report.html'}: written in {time.monotonic() - begin:.0f} s", file=sys.stderr)
    if failed:
        print(f"compare.py: {failed} requests failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
