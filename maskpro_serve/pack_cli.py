"""``maskpro-pack``: a dense checkpoint and a mask in, a packed checkpoint out."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from maskpro_kernels import NMPattern
from maskpro_kernels.mask_sources import SOURCES
from maskpro_serve import inspect_cli


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="maskpro-pack", description="Pack a dense Hugging Face checkpoint and its N:M mask for maskpro-serve.",
        epilog="maskpro-pack inspect DIR [--json] says what a folder holds, without loading it.",
    )  # fmt: skip
    parser.add_argument("--model", required=True, metavar="DIR|HUB_ID", help="dense model with safetensors weights")
    parser.add_argument("--mask", type=Path, metavar="PATH", help=f"{SOURCES}; without it the model's own zeros count")
    parser.add_argument("--recovery", type=Path, metavar="FILE", help="recovery file made with this mask")
    parser.add_argument(
        "--pattern",
        metavar="N:M|auto",
        help="kept:group, such as 2:4; auto: what the model's zeros satisfy",
    )
    parser.add_argument(
        "--values", choices=["int8"], help="round the kept values to 8 bits, with a scale for each output"
    )
    parser.add_argument(
        "--activations", choices=["int8"],
        help="with --values int8: let servers round activations to 8 bits too, each token by its own scale (W8A8)",
    )  # fmt: skip
    parser.add_argument(
        "--head", choices=["int8"],
        help="let servers round the output head to 8 bits, with a scale for each row; it is stored as it is",
    )  # fmt: skip
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder to write; must not exist")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; bad input is one sentence on stderr and exit code 2."""
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ["inspect"]:
        return inspect_cli.main(given[1:])
    arguments = _parser().parse_args(given)
    from maskpro_serve.convert import convert

    try:
        text = arguments.pattern
        pattern = NMPattern.parse(text) if text and text != "auto" else text
        report = convert(
            arguments.model, arguments.output, mask=arguments.mask, pattern=pattern, recovery=arguments.recovery,
            values=arguments.values, activations=arguments.activations, head=arguments.head,
            progress=sys.stderr.isatty(),
        )  # fmt: skip
    except (ValueError, OSError, ImportError) as error:
        print(f"maskpro-pack: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("maskpro-pack: interrupted; run it again to go on", file=sys.stderr)
        return 130
    for warning in report.warnings:
        print(f"maskpro-pack: warning: {warning}", file=sys.stderr)
    if report.resumed:
        print(f"{report.resumed} files were there from an earlier run")
    share = report.packed_bytes / report.dense_bytes
    notes = [f"values of {arguments.values}"] if arguments.values else []
    notes += [f"{name} may be {kind}" for name in ("activations", "head") if (kind := getattr(arguments, name))]
    print(", ".join([f"{arguments.output}: {len(report.packed)} linears packed {report.pattern}", *notes]))
    print(f"{report.packed_bytes / 1e6:.1f} MB for {report.dense_bytes / 1e6:.1f} MB of dense weights ({share:.4f})")
    for pattern_found, count in Counter(report.found.values()).most_common():
        print(f"zeros satisfy {pattern_found}: {count} linears")
    for name, reason in report.dense.items():
        print(f"left dense: {name}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
