"""Looks at vLLM's arguments without vLLM's parser, which takes seconds to import."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def names_flag(arguments: Sequence[str], flag: str) -> bool:
    """Whether ``--some-flag`` is given, in either spelling vLLM's parser takes: with dashes or underscores."""
    spellings = (flag, flag.replace("-", "_").replace("__", "--", 1))
    return any(a in spellings or a.startswith(tuple(f"{s}=" for s in spellings)) for a in arguments)


def flag_value(arguments: Sequence[str], flag: str, *short: str) -> str | None:
    """What is given to ``--some-flag`` in either spelling, or to its short form; None if it is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, flag.replace("-", "_").replace("__", "--", 1), *short, dest="value", nargs="?")
    value: str | None = parser.parse_known_args(arguments)[0].value
    return value


def with_config(arguments: Sequence[str]) -> list[str]:
    """The arguments after what vLLM's ``--config`` file sets, as flags: of two that say the same, the last holds.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no YAML mapping.
    """
    path = flag_value(arguments, "--config") if "--config" in arguments else None  # vLLM reads no `--config=FILE`
    if path is None:
        return list(arguments)
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected a mapping of vLLM's flags, found {type(settings).__name__}")
    flags = {str(flag).replace("_", "-"): value for flag, value in settings.items() if value is not False}
    given = [f"--{flag}={value}" for flag, value in flags.items() if not names_flag(arguments, f"--no-{flag}")]
    return [*given, *arguments]
