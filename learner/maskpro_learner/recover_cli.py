"""``maskpro-recover``: trains the low-rank recovery of a masked model and writes a recovery file."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskpro_kernels import LowRank, MaskFile, RecoveryFile, read_masks, read_recovery, write_recovery
from maskpro_kernels.base_model import other_base, weights_sha256
from maskpro_kernels.files import file_sha256, remove_unfinished
from maskpro_learner.calibration import calibration_blocks, source_name
from maskpro_learner.checkpoints import cast_weights, check_model, load_model, load_tokenizer
from maskpro_learner.command_line import check_device, check_ids, check_output
from maskpro_learner.errors import LearnerError
from maskpro_learner.layers import select_layers
from maskpro_learner.learning_log import LearningLog, check_log, read_log
from maskpro_learner.progress import progress_bar, quiet_transformers
from maskpro_learner.recovery import BlockFit, DistillStep, RecoverConfig, distill, reconstruct
from maskpro_learner.run import Interrupted, StopRequest


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse exits with code 2 on a bad one."""
    default = RecoverConfig()
    parser = argparse.ArgumentParser(prog="maskpro-recover", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--model", required=True, help="dense model: a Hugging Face folder or hub id")
    parser.add_argument("--mask", required=True, type=Path, help="mask file of this model")
    parser.add_argument("--output", required=True, type=Path, help="recovery file to write, .safetensors")
    parser.add_argument(
        "--start",
        type=Path,
        metavar="FILE",
        help="go on from this recovery file of the same mask, instead of the block by block fit",
    )
    parser.add_argument("--rank", type=int, help=f"of the updates (default {default.rank}, or --start's)")
    data = parser.add_argument_group("calibration")
    data.add_argument(
        "--calibration", nargs="+", required=True, metavar="FILE|hub:NAME",
        help=".txt, or .jsonl with text, prefix and gold_completion, or messages; or such rows of a dataset on the "
        "Hugging Face hub (hub:allenai/c4:en); several share the samples",
    )  # fmt: skip
    data.add_argument("--samples", type=int, default=64, help="blocks of text for the block by block fit (default 64)")
    data.add_argument("--length", type=int, default=256, help="tokens of a block (default 256)")
    data.add_argument(
        "--batch", type=int, default=default.batch,
        help=f"blocks run at once; in the block by block fit, a step (default {default.batch})",
    )  # fmt: skip
    blocks = parser.add_argument_group("block by block fit")
    blocks.add_argument("--block-steps", type=int, default=default.block_steps, help="of Adam on each block")
    blocks.add_argument("--block-learning-rate", type=float, default=default.block_learning_rate)
    training = parser.add_argument_group("distillation from the dense model")
    training.add_argument("--steps", type=int, default=default.steps, help=f"(default {default.steps}; 0: none)")
    training.add_argument("--minibatch", type=int, default=default.minibatch, help="blocks of text in a step")
    training.add_argument(
        "--distill-samples", type=int, nargs="+", metavar="N",
        help="blocks of each calibration source, in their order; one named twice is met twice as often "
        "(default: all alike, steps * minibatch in all)",
    )  # fmt: skip
    training.add_argument("--learning-rate", type=float, default=default.learning_rate, help="relative to the factors")
    training.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the computation; bfloat16 is faster where the processor multiplies it (AMX, GPUs)",
    )  # fmt: skip
    training.add_argument("--checkpoint-minutes", type=float, default=10.0, help="between checkpoints (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the blocks and their order")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def recover(options: argparse.Namespace, console: Console) -> None:
    """Runs the command.

    Raises:
        ValueError, OSError: an input that cannot be used; the message is one sentence.
        Interrupted: a signal came; the checkpoint is written.
    """
    checkpoint, log = (options.output.with_suffix(suffix) for suffix in (".checkpoint", ".jsonl"))
    start = [options.start] if options.start is not None else []
    check_output(
        options.output, (checkpoint, log) if options.steps else (),
        [options.model, options.mask, *options.calibration, *start],
    )  # fmt: skip
    if options.steps:
        check_log(log, DistillStep)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LearnerError("torchrun: the recovery is trained by one process")
    for path in (options.output, checkpoint):
        remove_unfinished(path)
    check_device(options.device)
    check_model(options.model)
    file = read_masks(options.mask)
    started = read_recovery(options.start, options.mask) if start else None
    config = _config(options, started)
    tokenizer = load_tokenizer(options.model)
    text: Tensor | None = None
    if config.steps:  # read before anything slow, so that too little text is known at once
        text = _text(options, config, tokenizer)
    origin = _provenance(options, config, started)
    if (warning := other_base(options.mask, file.provenance, origin.get("base_model_sha256"))) is not None:
        print(f"maskpro-recover: warning: {warning}", file=sys.stderr)
    model = load_model(options.model, torch.float32, options.device)
    if text is not None:
        check_ids(model, options.model, text)
    updates = started.updates if started is not None else None
    fits: list[BlockFit] = []
    if started is None and (text is None or not checkpoint.exists()):
        updates, fits = _reconstruct(options, config, model, tokenizer, file)
    steps: list[DistillStep] = []
    if text is not None:
        teacher = load_model(options.model, getattr(torch, options.dtype), options.device)
        cast_weights(model, teacher.dtype)
        updates, steps = _distill(options, config, model, teacher, text, file, updates, json.dumps(origin), checkpoint)
    assert updates is not None
    write_recovery(options.output, updates, provenance=origin)
    if text is not None:
        checkpoint.unlink(missing_ok=True)  # not before the recovery is safe
    console.print(_summary(options.output, updates, fits, steps))


def _config(options: argparse.Namespace, started: RecoveryFile | None) -> RecoverConfig:
    """The settings; the rank is that of the updates to start from, if there are any."""
    rank = RecoverConfig.rank if options.rank is None else options.rank
    if started is not None:
        # The largest: that of a narrow layer is no more than its width.
        found = max((update.b.shape[1] for update in started.updates.values()), default=0)
        if not found:
            raise LearnerError(f"--start {options.start}: expected low-rank updates, found none")
        if options.rank not in (None, found):
            raise LearnerError(f"--rank: expected {found}, as {options.start} has, found {rank}")
        rank = found
    return RecoverConfig(
        rank, options.block_steps, options.block_learning_rate, options.steps, options.learning_rate,
        options.minibatch, options.batch, options.seed,
    )  # fmt: skip


def _text(options: argparse.Namespace, config: RecoverConfig, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Blocks to distill on."""
    seed, counts = options.seed + 1, options.distill_samples
    if counts is None:
        samples = config.steps * config.minibatch
        return calibration_blocks(options.calibration, tokenizer, samples=samples, length=options.length, seed=seed)
    if len(counts) != len(options.calibration):
        raise LearnerError(
            f"--distill-samples: expected {len(options.calibration)} numbers, one for each calibration source, found "
            f"{len(counts)}"
        )
    return torch.cat(
        [
            calibration_blocks([source], tokenizer, samples=count, length=options.length, seed=seed)
            for source, count in zip(options.calibration, counts, strict=True)
        ]
    )


def _reconstruct(
    options: argparse.Namespace, config: RecoverConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    file: MaskFile,
) -> tuple[dict[str, LowRank], list[BlockFit]]:  # fmt: skip
    tokens = calibration_blocks(
        options.calibration, tokenizer, samples=options.samples, length=options.length, seed=options.seed
    )
    check_ids(model, options.model, tokens)
    fits: list[BlockFit] = []
    with progress_bar("block by block", len(select_layers(model, file.pattern).blocks)) as advance:

        def on_block(fit: BlockFit) -> None:
            fits.append(fit)
            advance(1)

        return reconstruct(model, tokens, file.masks, file.pattern, config, on_block=on_block), fits


def _distill(
    options: argparse.Namespace, config: RecoverConfig, model: PreTrainedModel, teacher: PreTrainedModel,
    tokens: Tensor, file: MaskFile, updates: dict[str, LowRank] | None, origin: str, checkpoint: Path,
) -> tuple[dict[str, LowRank], list[DistillStep]]:  # fmt: skip
    """Distillation at a terminal: progress, a line a step in the log, checkpoints, a stop that loses nothing."""
    stop = StopRequest()
    path = options.output.with_suffix(".jsonl")
    if not checkpoint.exists():
        path.unlink(missing_ok=True)
    columns = (
        TextColumn("distilling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("divergence {task.fields[divergence]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with (
        stop.listening(),
        LearningLog(path) as log,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        task = progress.add_task("", total=config.steps, divergence="-")

        def on_step(step: DistillStep) -> None:
            log.write(step)
            progress.update(task, completed=step.step, divergence=f"{step.divergence:.4f}")

        found = distill(
            model, teacher, tokens, file.masks, file.pattern, updates, config, origin=origin, on_step=on_step,
            checkpoint=checkpoint, checkpoint_seconds=60 * options.checkpoint_minutes, stop=stop,
        )  # fmt: skip
    if stop.number is not None:
        raise Interrupted(stop.number, checkpoint)
    return found, read_log(path, DistillStep)


def _provenance(options: argparse.Namespace, config: RecoverConfig, started: RecoveryFile | None) -> dict[str, str]:
    """What a recovery file says about where it comes from, text to text; what it started from under ``start_``."""
    entries: dict[str, Any] = {
        "base_model": Path(options.model).name if Path(options.model).is_dir() else options.model,
        "base_model_sha256": weights_sha256(options.model),
        "mask_sha256": file_sha256(options.mask),
        "calibration": ", ".join(map(source_name, options.calibration)),
        "length": options.length,
        "rank": config.rank,
        "seed": config.seed,
    }
    if started is None:
        fit = ("block_steps", "block_learning_rate", "batch")
        entries |= {"samples": options.samples} | {name: getattr(config, name) for name in fit}
    else:
        entries["start_sha256"] = file_sha256(options.start)
        own = {key: str(value) for key, value in entries.items()}
        entries |= {f"start_{key}": value for key, value in started.provenance.items() if own.get(key) != value}
    if config.steps:
        training = ("steps", "learning_rate", "minibatch", "batch")
        entries |= {name: getattr(config, name) for name in training} | {"dtype": options.dtype}
        entries["distill_samples"] = options.distill_samples and " ".join(map(str, options.distill_samples))
    return {key: str(value) for key, value in entries.items() if value is not None}


def _summary(output: Path, updates: dict[str, LowRank], fits: list[BlockFit], steps: list[DistillStep]) -> Table:
    table = Table(show_header=False)
    numbers = sum(update.b.numel() + update.a.numel() for update in updates.values())
    table.add_row("recovered", f"{len(updates)} layers, {numbers:,} numbers of 8 bits")
    if fits:
        before, after = (sum(values) / len(fits) for values in ([f.before for f in fits], [f.after for f in fits]))
        table.add_row("blocks", f"relative error {before:.4f} to {after:.4f}, mean of {len(fits)}")
    if steps:
        part = max(1, len(steps) // 10)
        first, last = (sum(s.divergence for s in some) / part for some in (steps[:part], steps[-part:]))
        table.add_row("steps", f"{len(steps)}, {sum(step.seconds for step in steps) / len(steps):.2f} s each")
        table.add_row("divergence", f"{first:.4f} to {last:.4f} nats per token (first and last {part} steps)")
    table.add_row("recovery file", f"{output} ({output.stat().st_size / 1e6:.2f} MB)")
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0, 2 for an input that cannot be used, 128 + n after signal n."""
    options = parse_arguments(argv)
    quiet_transformers()
    try:
        recover(options, Console())
    except Interrupted as interrupted:
        print(f"maskpro-recover: {interrupted}", file=sys.stderr)
        return 128 + interrupted.signal
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(f"maskpro-recover: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
