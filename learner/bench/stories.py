"""Masks of stories15M: every one-shot method and every estimator, at equal forward passes.

    python learner/bench/stories.py --data FOLDER --json docs/results/stories15m.json

FOLDER holds stories15M/ (a Hugging Face folder) and text/tinystories.txt (stories between <|endoftext|>). Masks are
made from the first half of the stories; perplexity is token perplexity on the second half, each story by itself from
its beginning-of-text token, never seen while learning. All estimators start from the same mask, the best one-shot
one, and get the same number of forward passes over minibatches of the same size; a backward pass counts as two.

Every row is written to the JSON file as soon as it is there, and a row that is there is not computed again: the same
command goes on where it was cut. Beside the JSON it writes a table (.md) and the curves of MaskPro's Figure 5 (.png).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from stories_report import write_figure, write_table
from torch import Tensor
from transformers import PreTrainedModel

from maskpro_kernels import NMPattern
from maskpro_kernels.files import write_atomically
from maskpro_learner import LearnConfig, Step, apply_masks, initial_masks, learn_masks
from maskpro_learner.calibration import Document, cut_blocks, encode, read_text
from maskpro_learner.checkpoints import load_model, load_tokenizer
from maskpro_learner.estimator import ESTIMATORS, make_estimator
from maskpro_learner.initial_masks import METHODS, Method
from maskpro_learner.progress import quiet_transformers

START: Method = "swap"
"""The best one-shot mask here, from which every estimator starts."""

SETTINGS: dict[str, tuple[float, float, int]] = {
    "vanilla": (0.003, 30.0, 1),
    "residual": (1.0, 30.0, 1),
    "smoothed": (1.0, 30.0, 1),
    "leave-one-out": (2.0, 30.0, 2),
    "first-order": (0.3, 3.0, 2),
}
"""Learning rate, initial logit (of --start margin) and draws: found on the last quarter of the calibration stories
with seed 100. Vanilla's rate makes its logits walk as far as residual's: its reward is some 300 times as large."""
PAPER = (50.0, 10.0, 1)
"""The paper's, with its own start: the same logit for every weight of the initial mask."""


@dataclass(frozen=True)
class Run:
    """What a row is made with; two equal ones are the same row.

    Attributes:
        method: ``dense``, a one-shot method, ``sparsegpt refit``, or an estimator.
        pattern: N:M.
        samples, length: calibration blocks, and tokens of one.
        seed: of the draws and of the order of the text.
        start: of the logits, empty where nothing is learned; so are the others.
    """

    method: str
    pattern: str
    samples: int
    length: int
    seed: int = 0
    passes: int = 0
    minibatch: int = 0
    start: str = ""
    learning_rate: float = 0.0
    initial_logit: float = 0.0
    draws: int = 0


def plan(arguments: argparse.Namespace) -> list[Run]:
    """All rows, in the order they are computed and shown."""
    text = (arguments.samples, arguments.length)

    def learned(method: str, pattern: str, seed: int, text: tuple[int, int], start: str = "margin") -> Run:
        rate, logit, draws = SETTINGS[method] if start == "margin" else PAPER
        minibatch = min(text[0], arguments.minibatch * arguments.length // text[1])
        return Run(method, pattern, *text, seed, arguments.passes, minibatch, start, rate, logit, draws)

    one_shot = ("magnitude", "wanda", "sparsegpt", "sparsegpt refit", START)
    rows = [Run("dense", "2:4", *text), *(Run(method, "2:4", *text) for method in one_shot)]
    rows.append(learned("smoothed", "2:4", arguments.seeds[0], text, "constant"))
    rows += [learned(method, "2:4", seed, text) for method in ESTIMATORS for seed in arguments.seeds]
    for pattern in ("4:8", "1:4"):
        rows += [Run(method, pattern, *text) for method in ("magnitude", "wanda", "sparsegpt", START)]
        rows += [
            learned(method, pattern, arguments.seeds[0], text)
            for method in ("smoothed", "leave-one-out", "first-order")
        ]
    for samples in arguments.few:
        short = (samples, arguments.few_length)
        rows += [learned(method, "2:4", arguments.seeds[0], short) for method in ("smoothed", "first-order")]
    return rows


class Bench:
    """The model, the text, and the masks that several rows start from."""

    def __init__(self, data: Path) -> None:
        self._folder = str(data / "stories15M")
        tokenizer = load_tokenizer(self._folder)
        parts = read_text(data / "text" / "tinystories.txt").split("<|endoftext|>")
        stories = [encode(Document(part.strip()), tokenizer) for part in parts if part.strip()]
        total, first = sum(map(len, stories)), 0
        while sum(map(len, stories[: first + 1])) <= total / 2:
            first += 1
        self._calibration = stories[:first]
        context = 256  # positions the model was trained with
        self._test = [story[:context] for story in stories[first:]]
        self.start = functools.lru_cache(maxsize=1)(self._start)

    def model(self) -> PreTrainedModel:
        return load_model(self._folder, torch.float32)

    def text(self, samples: int, length: int) -> Tensor:
        return cut_blocks(self._calibration, samples, length, seed=0)

    def _start(self, pattern: str, samples: int, length: int) -> dict[str, Tensor]:
        tokens = self.text(samples, length)
        return initial_masks(self.model(), NMPattern.parse(pattern), START, tokens=tokens).masks

    @torch.inference_mode()
    def test(self, model: PreTrainedModel, batch: int = 16) -> dict[str, Any]:
        """Summed loss of every test story in nats, and its predicted tokens."""
        ignored = -100
        losses, tokens = [0.0] * len(self._test), [len(story) - 1 for story in self._test]
        order = sorted(range(len(self._test)), key=tokens.__getitem__)
        for begin in range(0, len(order), batch):
            chosen = order[begin : begin + batch]
            padded = torch.full((len(chosen), max(tokens[i] for i in chosen) + 1), ignored)
            for row, i in enumerate(chosen):
                padded[row, : tokens[i] + 1] = torch.tensor(self._test[i])
            logits = model(input_ids=padded[:, :-1].clamp_min(0), use_cache=False).logits
            each = torch.nn.functional.cross_entropy(
                logits.transpose(1, 2), padded[:, 1:], ignore_index=ignored, reduction="none"
            )
            for i, loss in zip(chosen, each.sum(1).tolist(), strict=True):
                losses[i] = round(loss, 4)
        return {"perplexity": math.exp(sum(losses) / sum(tokens)), "losses": losses, "tokens": tokens}


def compute(bench: Bench, run: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: what it is, its loss on the test half, how long its mask took, and its learning curve."""
    model = bench.model()
    curve: list[float] = []
    changed = 0.0
    begin = time.process_time()
    if run.method in ESTIMATORS:
        # The start is the same for few samples: what is compared there is learning.
        start = bench.start(run.pattern, arguments.samples, arguments.length)
        begin = time.process_time()
        learned = learn_masks(
            model, bench.text(run.samples, run.length), start, learn_config(run), on_step=append_residual(curve)
        )
        different = sum(int((learned[name] != mask).sum()) // 2 for name, mask in start.items())
        changed = different / sum(int(mask.sum()) for mask in start.values())
        apply_masks(model, learned)
    elif run.method != "dense":
        method, _, refit = run.method.partition(" ")
        assert method in METHODS
        initial_masks(
            model, NMPattern.parse(run.pattern), method, tokens=bench.text(run.samples, run.length),
            refit=bool(refit),
        )  # fmt: skip
    seconds = time.process_time() - begin
    return {"run": asdict(run), "cpu_seconds": seconds, "changed": changed, "curve": curve, **bench.test(model)}


def learn_config(run: Run) -> LearnConfig:
    estimator = make_estimator(run.method, run.learning_rate, 0.99, run.draws)
    backward = 2 if estimator.group_draws else 0
    steps = run.passes // (estimator.masks_per_batch + backward)
    return LearnConfig(
        NMPattern.parse(run.pattern), steps, run.method, learning_rate=run.learning_rate, start=run.start,
        initial_logit=run.initial_logit, draws=run.draws, minibatch=run.minibatch, batch=8, seed=run.seed,
    )  # fmt: skip


def append_residual(curve: list[float]) -> Callable[[Step], None]:
    return lambda step: curve.append(round(step.residual, 5))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with stories15M/ and text/tinystories.txt")
    parser.add_argument("--json", type=Path, required=True, help="results, which it goes on from; .md and .png beside")
    parser.add_argument("--passes", type=int, default=240, help="forward passes of each estimator (default 240)")
    parser.add_argument("--minibatch", type=int, default=4, help="blocks of a pass (default 4)")
    parser.add_argument("--samples", type=int, default=170, help="calibration blocks (default 170)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a block (default 128)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--few", type=int, nargs="+", default=[1, 32, 512], help="sample counts that are compared")
    parser.add_argument("--few-length", type=int, default=40, help="tokens of those blocks (default 40)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    quiet_transformers()
    bench = Bench(arguments.data)
    report: dict[str, Any] = {"rows": []}
    if arguments.json.exists():
        report = json.loads(arguments.json.read_text())
    report["command"] = sys.argv
    found = {json.dumps(row["run"], sort_keys=True): row for row in report["rows"]}
    rows = []
    for run in plan(arguments):
        key = json.dumps(asdict(run), sort_keys=True)
        if key not in found:
            found[key] = compute(bench, run, arguments)
            report["rows"] = list(found.values())
            write_atomically(arguments.json, (json.dumps(report) + "\n").encode())
        rows.append(found[key])
        row = found[key]
        print(
            f"{run.pattern} {run.method:<16} {run.samples:>3} x {run.length:<3} seed {run.seed} {run.start:<8} "
            f"perplexity {row['perplexity']:8.3f}  {row['cpu_seconds']:6.1f} s",
            flush=True,
        )
    report["rows"] = rows
    write_atomically(arguments.json, (json.dumps(report) + "\n").encode())
    write_table(rows, arguments.json.with_suffix(".md"), START)
    write_figure(rows, arguments.json.with_suffix(".png"), arguments.few_length)


if __name__ == "__main__":
    main()
