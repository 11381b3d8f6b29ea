"""Looks at vLLM's arguments without vLLM's parser, which takes seconds to import."""

from __future__ import annotations

from collections.abc import Sequence


def names_flag(arguments: Sequence[str], flag: str) -> bool:
    """Whether ``--some-flag`` is given, in either spelling vLLM's parser takes: with dashes or underscores."""
    spellings = (flag, flag.replace("-", "_").replace("__", "--", 1))
    return any(a in spellings or a.startswith(tuple(f"{s}=" for s in spellings)) for a in arguments)
