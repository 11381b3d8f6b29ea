"""``maskpro-learn``: makes the (N:M) mask of a model and writes a mask file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from maskpro_kernels import NMPattern, write_masks
from maskpro_kernels.base_model import other_base, weights_sha256
from maskpro_kernels.files import file_sha256, remove_unfinished
from maskpro_kernels.mask_sources import SOURCES, MaskSource, open_masks
from maskpro_kernels.masks import ENCODINGS
from maskpro_learner.calibration import calibration_blocks, source_name
from maskpro_learner.checkpoints import check_model, check_names, load_model, load_tokenizer
from maskpro_learner.command_line import check_ids, check_output
from maskpro_learner.config import STARTS, LearnConfig, check_seed
from maskpro_learner.distributed import ALONE, World, join, leave
from maskpro_learner.errors import CalibrationError, LearnerError
from maskpro_learner.estimator import ESTIMATORS
from maskpro_learner.initial_masks import CALIBRATED_METHODS, METHODS, InitialMasks, Method, initial_masks
from maskpro_learner.layers import select_layers
from maskpro_learner.learning_log import check_drawing, check_log
from maskpro_learner.mask_sources import masks_from_source
from maskpro_learner.progress import progress_bar, quiet_transformers
from maskpro_learner.run import Interrupted, RunFiles, run_learning
from maskpro_learner.trainer import Step

_LEARNING = ("estimator", "learning_rate", "start", "initial_logit", "smoothing", "draws", "minibatch")


def argument_parser() -> argparse.ArgumentParser:
    """The command line; it exits with code 2 on a bad one."""
    parser = argparse.ArgumentParser(prog="maskpro-learn", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--model", required=True, help="dense model: a Hugging Face folder or hub id")
    parser.add_argument("--pattern", default="2:4", help="N:M, N of every M inputs are kept (default 2:4)")
    parser.add_argument(
        "--init", required=True, metavar="|".join([*METHODS, "PATH"]), help=f"how to make the mask, or {SOURCES}"
    )
    parser.add_argument("--output", required=True, type=Path, help="mask file to write, .safetensors")
    data = parser.add_argument_group("calibration (wanda, sparsegpt, swap and learning)")
    data.add_argument(
        "--calibration", nargs="+", default=[], metavar="FILE|hub:NAME",
        help=".txt, or .jsonl with text, prefix and gold_completion, or messages; or such rows of a dataset on the "
        "Hugging Face hub (hub:allenai/c4:en); several share the samples",
    )  # fmt: skip
    data.add_argument("--samples", type=int, default=128, help="blocks of text (default 128)")
    data.add_argument("--length", type=int, default=512, help="tokens of a block (default 512)")
    data.add_argument("--batch", type=int, default=4, help="blocks run at once (default 4)")
    learning = parser.add_argument_group("learning (MaskPro; without --steps the initial mask is the result)")
    learning.add_argument("--steps", type=int, default=0, help="updates of the mask distribution (default 0)")
    learning.add_argument("--estimator", choices=ESTIMATORS, default="smoothed", help="(default smoothed)")
    learning.add_argument("--learning-rate", type=float, help="eta (default 50; 0.5 for first-order)")
    learning.add_argument(
        "--start", choices=STARTS, default="constant",
        help="initial logits: constant is the paper's, margin grades them by what weights are worth (default constant)",
    )  # fmt: skip
    learning.add_argument("--initial-logit", type=float, help="of the initial mask (default 10; 3 for first-order)")
    learning.add_argument("--smoothing", type=float, default=0.99, help="alpha of the tracker (default 0.99)")
    learning.add_argument("--draws", type=int, help="masks compared: leave-one-out 2, first-order 8")
    learning.add_argument("--minibatch", type=int, default=32, help="blocks of text in a step (default 32)")
    learning.add_argument("--checkpoint-minutes", type=float, default=10.0, help="between checkpoints (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration blocks, the random mask and the draws")
    parser.add_argument("--include", nargs="+", default=["*"], metavar="GLOB", help="module names to prune (default *)")
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="module names to leave dense; what vLLM fuses with one stays dense with it",
    )
    parser.add_argument("--encoding", choices=ENCODINGS, default="bitmask", help="states is smaller, for M = 4 only")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="compute dtype")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def provenance(options: argparse.Namespace, config: LearnConfig | None, made: MaskSource | None) -> dict[str, str]:
    """What a mask file says about where it comes from, text to text; of the inputs as they are now.

    What the masks that it starts from say of themselves is there under ``init_``, where it differs.
    """
    method = options.init if made is None else made.path.resolve().name
    entries = {
        "base_model": Path(options.model).name if Path(options.model).is_dir() else options.model,
        "base_model_sha256": weights_sha256(options.model),
        "method": method,
        "init_sha256": file_sha256(made.path) if made is not None and made.path.is_file() else None,
        "steps": str(options.steps),
        "seed": str(options.seed),
        "dtype": options.dtype,
    }
    if config is not None:
        used = {**asdict(config), **asdict(config.settings())}
        names = ["estimator", "learning_rate", "start", "initial_logit", "draws", "minibatch"]
        names += ["smoothing"] if config.estimator == "smoothed" else []
        entries |= {"method": f"maskpro from {method}"} | {name: str(used[name]) for name in names}
    if method in CALIBRATED_METHODS or config is not None:
        sources = ", ".join(map(source_name, options.calibration))
        entries |= {"calibration": sources, "samples": str(options.samples), "length": str(options.length)}
    if made is not None:
        entries |= {f"init_{key}": value for key, value in made.provenance.items() if entries.get(key) != value}
    return {key: value for key, value in entries.items() if value is not None}


def summary(result: InitialMasks, rows: Sequence[tuple[str, str]]) -> Table:
    """The table printed at the end."""
    table = Table(show_header=False)
    weights = sum(mask.numel() for mask in result.masks.values())
    kept = sum(int(mask.sum()) for mask in result.masks.values())
    table.add_row("pruned", f"{len(result.masks)} layers, {kept:,} of {weights:,} weights kept")
    reasons: dict[str, int] = {}
    for reason in result.dense.values():
        reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in reasons.items():
        table.add_row("left dense", f"{count} layers: {reason}")
    for row in rows:
        table.add_row(*row)
    return table


def learn(options: argparse.Namespace, console: Console, world: World = ALONE) -> None:
    """Runs the command; of several processes, the first one writes.

    Raises:
        ValueError, OSError: an input that cannot be used; the message is one sentence.
    """
    pattern = NMPattern.parse(options.pattern)
    if options.batch < 1:
        raise LearnerError(f"--batch: expected at least 1, found {options.batch}")
    check_seed(options.seed)
    source = None if options.init in METHODS else Path(options.init)
    if source is not None and not source.exists():
        raise LearnerError(f"--init {options.init}: expected one of {', '.join(METHODS)}, {SOURCES}: no such path")
    files = RunFiles.beside(options.output)
    check_output(
        options.output, (files.checkpoint, files.log, files.curve) if options.steps else (),
        [options.model, *options.calibration, *([source] if source else [])],
    )  # fmt: skip
    if options.steps:
        check_log(files.log, Step)
    if world.is_first:  # before any other process has begun to learn, and so to write
        for path in (options.output, files.checkpoint):
            remove_unfinished(path)
    check_model(options.model)
    if options.encoding == "states" and pattern.m != 4:
        raise LearnerError(f"--encoding states is for groups of 4, found pattern {pattern}: use bitmask")
    tokens: Tensor | None = None
    config = _learn_config(options, pattern, world)
    if options.init in CALIBRATED_METHODS or config is not None:
        if not options.calibration:
            what = "--steps" if config is not None else f"--init {options.init}"
            raise CalibrationError(f"{what} needs calibration text: give --calibration FILE")
        tokenizer = load_tokenizer(options.model)
        tokens = calibration_blocks(
            options.calibration, tokenizer, samples=options.samples, length=options.length, seed=options.seed
        )
    model = load_model(options.model, getattr(torch, options.dtype), options.device)
    if tokens is not None:
        check_ids(model, options.model, tokens)
    chosen = select_layers(model, pattern, include=options.include, exclude=options.exclude).linears
    check_names(options.model, (f"{name}.weight" for name in chosen))
    made = None if source is None else open_masks(source, pattern)
    origin = provenance(options, config, made)
    if made is not None:
        if (warning := other_base(made.path, made.provenance, origin.get("base_model_sha256"))) is not None:
            print(f"maskpro-learn: warning: {warning}", file=sys.stderr)
        result = masks_from_source(made, model, pattern, include=options.include, exclude=options.exclude)
    else:
        with progress_bar(f"{options.init} {pattern}", len(chosen)) as advance:
            result = initial_masks(
                model, pattern, cast(Method, options.init), tokens=tokens, seed=options.seed,
                include=options.include, exclude=options.exclude, batch=options.batch, advance=advance,
            )  # fmt: skip
    rows: list[tuple[str, str]] = []
    if config is not None:
        assert tokens is not None
        if source is None:
            model = load_model(options.model, getattr(torch, options.dtype), options.device)  # initial_masks pruned it
        learned, steps = run_learning(
            model, tokens, result.masks, config, files,
            checkpoint_seconds=60 * options.checkpoint_minutes, world=world,
        )  # fmt: skip
        if not world.is_first:
            return
        rows = learning_rows(result.masks, learned, steps)
        result = InitialMasks(learned, result.dense)
    write_masks(options.output, result.masks, pattern, provenance=origin, encoding=options.encoding)
    if config is not None:
        files.checkpoint.unlink(missing_ok=True)  # not before the mask is safe
    console.print(summary(result, [
        ("pattern", str(pattern)),
        ("method", options.init),
        *rows,
        ("mask file", f"{options.output} ({options.output.stat().st_size / 1e6:.2f} MB, {options.encoding})"),
    ]))  # fmt: skip


def _learn_config(options: argparse.Namespace, pattern: NMPattern, world: World) -> LearnConfig | None:
    """The settings of learning, checked before anything slow; None without --steps. Settles the device."""
    options.device = world.local_device(options.device)
    if options.steps == 0:
        if world.size > 1:
            raise LearnerError("torchrun: several processes are for learning: give --steps")
        for name in _LEARNING:
            if getattr(options, name) != argument_parser().get_default(name):
                raise LearnerError(f"--{name.replace('_', '-')} is for learning: give --steps")
        return None
    check_drawing()
    return LearnConfig(
        pattern, options.steps, options.estimator, options.learning_rate, options.start, options.initial_logit,
        options.smoothing, options.draws, options.minibatch, options.batch, options.seed,
    )  # fmt: skip


def learning_rows(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], steps: Sequence[Step]
) -> list[tuple[str, str]]:
    """What the summary says of learning."""
    if not steps:
        return [("steps", "none is in the log")]
    moved = sum(int((after[name] != mask.cpu()).sum()) // 2 for name, mask in before.items())
    kept = sum(int(mask.sum()) for mask in before.values())
    last = steps[-max(1, len(steps) // 10) :]
    residual = sum(step.residual for step in last) / len(last)
    return [
        ("steps", f"{len(steps)}, {sum(step.seconds for step in steps) / len(steps):.3f} s each"),
        ("residual", f"{residual:+.4f} nats per token under sampled masks, mean of the last {len(last)} steps"),
        ("flips", f"{sum(step.flips for step in last) / len(last):,.1f} groups a mask, mean of the same steps"),
        ("moved", f"{moved:,} of {kept:,} kept weights ({moved / kept:.4%})"),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for an input that cannot be used, 128 + n after signal n."""
    options = argument_parser().parse_args(argv)
    quiet_transformers()
    world = ALONE
    try:
        world = join()
        with world.first_speaks():
            learn(options, Console(), world)
        leave(world)
    except Interrupted as interrupted:
        if world.is_first:
            print(f"maskpro-learn: {interrupted}", file=sys.stderr)
        leave(world)
        return 128 + interrupted.signal
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        where = ""
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            where = f"{options.output}: "  # a full disk, met while writing, does not say where
        print(f"maskpro-learn: error: {where}{error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
