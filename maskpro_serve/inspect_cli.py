"""``maskpro-pack inspect``: what a model folder holds, without loading it."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="maskpro-pack inspect", description="Patterns, bytes and kernels of a packed or dense model folder."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="model folder")
    parser.add_argument("--json", action="store_true", help="every layer, as JSON on stdout")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; bad input is one sentence on stderr and exit code 2."""
    arguments = _parser().parse_args(argv)
    from maskpro_serve.inspection import Inspection, inspect

    try:
        found: Inspection = inspect(arguments.folder)
    except (ValueError, OSError) as error:
        print(f"maskpro-pack inspect: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        json.dump(asdict(found), sys.stdout, indent=2)
        print()
        return 0
    nbytes = sum(layer.nbytes for layer in found.layers)
    dense = sum(layer.dense_nbytes for layer in found.layers)
    kind = f"{found.kind} {found.pattern}" if found.pattern else found.kind
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    console.print(f"{found.folder}: {kind}, {len(found.layers)} linears", highlight=False, markup=False)
    console.print(
        f"{nbytes / 1e6:.1f} MB of linears, {dense / 1e6:.1f} MB dense ({nbytes / max(1, dense):.4f}); "
        f"{found.other_nbytes / 1e6:.1f} MB of other tensors",
        highlight=False,
    )
    if found.may_round:
        console.print(f"a server may round to 8 bits: {', '.join(found.may_round)}", highlight=False)
    console.print(_table(found.layers))
    if found.kind == "dense" and any(layer.sampled for layer in found.layers):
        console.print("by a sample of rows: `maskpro-pack --pattern auto` reads all and packs what holds", markup=False)
    return 0


def _table(layers: Sequence[object]) -> Table:
    """One row for all layers that are alike but for their number."""
    from maskpro_serve.inspection import Layer

    table = Table()
    for column in ("linears", "layers", "pattern", "shape", "values", "MB", "MB dense", "kernel"):
        table.add_column(column, overflow="fold")
    alike: dict[tuple[str, ...], list[Layer]] = {}
    for layer in layers:
        assert isinstance(layer, Layer)
        pattern = layer.pattern or ("dense" if layer.sampled is None else f"dense, zeros {layer.sampled}")
        kernel = ", ".join(f"{device}: {name}" for device, name in layer.backends.items()) or "torch"
        name = re.sub(r"\.\d+\.", ".*.", layer.name)
        alike.setdefault((name, pattern, f"{layer.shape[0]} x {layer.shape[1]}", layer.dtype, kernel), []).append(layer)
    for (name, pattern, shape, dtype, kernel), group in alike.items():
        nbytes, dense = sum(layer.nbytes for layer in group), sum(layer.dense_nbytes for layer in group)
        sizes = f"{nbytes / 1e6:.2f}", f"{dense / 1e6:.2f}"
        table.add_row(escape(name), str(len(group)), pattern, shape, dtype, *sizes, escape(kernel))
    return table


if __name__ == "__main__":
    sys.exit(main())
