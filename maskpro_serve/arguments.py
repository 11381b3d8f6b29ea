"""Looks at vLLM's arguments without vLLM's parser, which takes seconds to import."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def names_flag(arguments: Sequence[str], flag: str) -> bool:
    """Whether ``--some-flag`` is given, in either spelling vLLM's parser takes: with dashes or underscores."""
    spellings = (flag, flag.replace("-", "_").replace("__", "--", 1))
    return any(a in spellings or a.startswith(tuple(f"{s}=" for s in spellings)) for a in arguments)


def flag_value(arguments: Sequence[str], flag: str, short: str) -> str | None:
    """What is given to ``--some-flag`` in either spelling, or to its short form; None if it is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(flag, flag.replace("-", "_").replace("__", "--", 1), short, dest="value", nargs="?")
    value: str | None = parser.parse_known_args(arguments)[0].value
    return value
