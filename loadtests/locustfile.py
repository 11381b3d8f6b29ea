"""Locust users of an OpenAI-compatible endpoint: streamed chat and completion requests, timed token by token.

    locust -f loadtests/locustfile.py --host http://localhost:8000                       # web UI
    locust -f loadtests/locustfile.py --host http://localhost:8000 --headless -u 8 -t 1m --workload mixed --seed 1

Beside the requests (their time is end to end, their size counts completion tokens), Locust's tables show TTFT (time
to first token), TPOT (time per token after it), and, where there are any, RETRY and ABORT: neither is a failure.
A request that failed after its retries, or ran into the timeout, is one, and makes Locust exit with 1.
"""

from __future__ import annotations

import logging
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

import gevent
from load_run import LoadRun
from load_settings import LoadSettings
from locust import User, events, task
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner
from records import Record
from streaming import StreamingClient, first_model
from workloads import PATHS, WORKLOADS, Request

logger = logging.getLogger(__name__)
_WORKER_SEEDS = 1_000_003


def _at_least_zero(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value >= 0:
            raise ArgumentTypeError(f"expected 0 or more, found {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its message
    return parse


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    add = parser.add_argument  # of the parser itself: Locust shows those in its web UI
    count, number = _at_least_zero(int), _at_least_zero(float)
    add("--workload", choices=WORKLOADS, default="chat", help="what is asked (default chat)")
    add("--seed", type=int, default=0, help="of the requests and arrivals (default 0)")
    add("--model", default="", help="served model name (default: the first that the endpoint lists)")
    add("--rate", type=number, default=0.0, help="open loop: Poisson arrivals per second, of one process (default 0: "
        "closed loop, every user sends its next request when it has the last answer)")  # fmt: skip
    add("--requests", type=count, default=0, help="stop after so many measured requests (default 0: go on)")
    add("--warmup", type=count, default=0, help="requests of each user that are not measured (default 0)")
    add("--request-timeout", type=number, default=300.0, help="seconds, to the end of the stream (default 300)")
    add("--retries", type=count, default=2, help="further attempts where there was no answer yet (default 2)")
    add("--abort-share", type=number, default=0.0, help="share of requests that hang up halfway (default 0)")
    add("--natural-stop", action="store_true", help="let the model end its answers; without it they have a seeded "
        "length, through ignore_eos, which vLLM and SGLang know")  # fmt: skip
    add(
        "--records", default="", include_in_web_ui=False, help="file for all measured requests (JSON); needs --requests"
    )


def settings_from(environment: Environment) -> LoadSettings:
    options = environment.parsed_options
    worker = getattr(environment.runner, "worker_index", 0) if isinstance(environment.runner, WorkerRunner) else 0
    return LoadSettings(
        workload=options.workload,
        seed=options.seed + worker * _WORKER_SEEDS,
        users=environment.runner.target_user_count or options.num_users or 1,
        rate=options.rate,
        requests=options.requests,
        warmup=options.warmup,
        abort_share=options.abort_share,
        timeout=options.request_timeout,
        retries=options.retries,
        fixed_length=not options.natural_stop,
    )


@events.test_start.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """Makes the run that all users share."""
    environment.load_run = None
    options = environment.parsed_options
    try:
        if isinstance(environment.runner, (MasterRunner, WorkerRunner)) and (options.rate or options.warmup):
            raise ValueError("--rate and --warmup are for one process: a worker does not know its number of users")
        if isinstance(environment.runner, MasterRunner):
            return
        if not environment.host:
            raise ValueError("--host is required: the endpoint's URL without /v1")
        if options.records and not options.requests:
            raise ValueError("--records needs --requests")
        settings = settings_from(environment)
        client = StreamingClient(
            environment.host,
            options.model or first_model(environment.host),
            timeout=settings.timeout,
            retries=settings.retries,
            fixed_length=settings.fixed_length,
        )
    except ValueError as error:
        logger.error("%s", error)
        environment.process_exit_code = 2
        gevent.spawn(environment.runner.quit)
        return
    run = LoadRun(client, settings, lambda request, record: report(environment, request, record))
    environment.load_run = run

    def end() -> None:
        run.done.wait()
        if options.records:
            run.result().write(Path(options.records))
        environment.runner.quit() if options.headless else environment.runner.stop()

    gevent.spawn(end)


def report(environment: Environment, request: Request, record: Record) -> None:
    """Adds one measured request to Locust's own statistics."""
    name = f"{PATHS[request.api]} {request.shape}"

    def fire(kind: str, seconds: float, tokens: int = 0, exception: Exception | None = None) -> None:
        environment.events.request.fire(
            request_type=kind, name=name, response_time=seconds * 1000, response_length=tokens, exception=exception,
            context={}, response=None, start_time=None, url=None,
        )  # fmt: skip

    for _ in range(record.retries):
        fire("RETRY", record.lost / record.retries)
    if record.status == "aborted":
        fire("ABORT", record.total)
        return
    error = RuntimeError(record.error) if record.failed else None
    fire("POST", record.total, record.completion_tokens, error)
    if error is None and record.first_token is not None:
        fire("TTFT", record.first_token)
        if record.per_token is not None:
            fire("TPOT", record.per_token)


class OpenAIUser(User):
    """A client that sends its next request when it has the last answer; or, with --rate, a Poisson source of them."""

    def on_start(self) -> None:
        if self.environment.load_run is None:
            raise gevent.GreenletExit  # there is nothing to run, and the runner is about to quit
        self._number = self.environment.load_run.join()

    @task
    def ask(self) -> None:
        if not self.environment.load_run.step(self._number):
            gevent.sleep(1)  # the run is over, or about to be: Locust stops the users
