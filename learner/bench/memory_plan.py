"""The plan for learning in 4.2 bytes a weight, tried on the real training loop.

    python learner/bench/memory_plan.py --data FOLDER --json docs/results/learner_bf16_logits.json

What :func:`maskpro_learner.learn_masks` keeps for a weight of a bfloat16 model is 2 bytes of it, 2 of its masked copy
and 4 of its logit. Inside :func:`lean_learning` the same loop keeps 4 in all:

- The masked copy is of one decoder block only: before a block's forward pass its masks are drawn into buffers that all
  blocks share. A draw is a function of its number, so nothing more is needed; but it is drawn again for every batch
  of a minibatch, and an estimator with backward passes needs another way.
- Logits are bfloat16, rounded up or down at random, by how near each neighbour is, so that updates much smaller than
  the spacing of bfloat16 numbers still count on average.

learner/bench/memory.py --plan measures the memory. This script measures what the rounding costs: masks of stories15M
learned by the smoothed residual as in learner/bench/stories.py, as shipped and with the plan, from the same start.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from maskpro_kernels import NMPattern
from maskpro_kernels.files import write_atomically
from maskpro_kernels.packing import top_n_mask
from maskpro_kernels.policy_step import policy_step
from maskpro_learner import apply_masks, learn_masks, trainer
from maskpro_learner.packed_masks import PackedMasks

Updates = Sequence[tuple[float, int]]


class LeanModel:
    """What :class:`maskpro_learner.masked_model.MaskedModel` is to the trainer, in half the memory.

    Args:
        model: the model of the linears; hooks draw the masks of a child of its stack of blocks when it runs.
        linears: prunable linears by module name.
        pattern: the pattern.
        logits: initial logits by parameter name, bfloat16.
        seed: of every draw and of the rounding.
    """

    def __init__(
        self, model: nn.Module, linears: Mapping[str, nn.Linear], pattern: NMPattern, logits: Mapping[str, Tensor],
        seed: int,
    ) -> None:  # fmt: skip
        self.pattern, self.linears, self._seed = pattern, dict(linears), seed
        self.dense = {name: linear.weight.data for name, linear in linears.items()}
        self.logits = {name: logits[f"{name}.weight"] for name in linears}
        self._stream = {name: stream for stream, name in enumerate(linears)}
        self._draw: int | None = None  # the initial mask, the most likely one, until there is a draw
        self._buffers: dict[tuple[str, torch.Size], Tensor] = {}
        self._hooks = []
        for block in trainer.select_layers(model, pattern).blocks:
            own = [name for name in block.linears if name in self.dense]
            self._hooks += [
                block.module.register_forward_pre_hook(functools.partial(self._mask, own)),
                block.module.register_forward_hook(functools.partial(self._unmask, own)),
            ]

    def _mask(self, names: list[str], *_: object) -> None:
        for name in names:
            dense, place = self.dense[name], name.split(".", 3)[-1]
            buffer = self._buffers.setdefault((place, dense.shape), torch.empty_like(dense))
            if self._draw is None:
                torch.mul(dense, top_n_mask(self.logits[name].float(), self.pattern), out=buffer)
            else:
                policy_step(
                    self.logits[name].float(), self.pattern, seed=self._seed, stream=self._stream[name], weight=dense,
                    masked=buffer, next_draw=self._draw,
                )  # fmt: skip
            self.linears[name].weight.data = buffer

    def _unmask(self, names: list[str], *_: object) -> None:
        for name in names:
            self.linears[name].weight.data = self.dense[name]

    def step(self, updates: Updates, next_draw: int, gains: Mapping[str, Tensor] | None = None) -> None:
        """Updates the logits by draws of now, and notes the number of the next."""
        assert gains is None, "first-order needs the masked weights in its backward pass"
        for name, stored in self.logits.items() if updates else ():
            logits, stream = stored.float(), self._stream[name]
            policy_step(logits, self.pattern, seed=self._seed, stream=stream, updates=updates)
            generator = torch.Generator().manual_seed(hash((self._seed, next_draw, stream)))
            stored.copy_(rounded_at_random(logits, generator))
        self._draw = next_draw

    def flips(self) -> int:
        """Not counted here."""
        return 0

    def masks(self) -> PackedMasks:
        """The most likely masks."""
        return PackedMasks(
            (f"{name}.weight", top_n_mask(logits.float(), self.pattern)) for name, logits in self.logits.items()
        )

    def close(self) -> None:
        """Leaves the model as it was."""
        for hook in self._hooks:
            hook.remove()


def rounded_at_random(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, to one of the two neighbours, so that the expectation is the value."""
    bits = values.view(torch.int32)
    noise = torch.randint(1 << 16, values.shape, generator=generator, dtype=torch.int32)
    return ((bits + noise) & -65536).view(torch.float32).bfloat16()


@contextmanager
def lean_learning(model: nn.Module) -> Iterator[None]:
    """Inside, :func:`maskpro_learner.learn_masks` learns ``model`` by the plan."""

    @contextmanager
    def lean(
        linears: Mapping[str, nn.Linear], masks: Mapping[str, Tensor], pattern: NMPattern,
        *, logits: Mapping[str, Tensor], seed: int,
    ) -> Iterator[LeanModel]:  # fmt: skip
        made = LeanModel(model, linears, pattern, {name: value.bfloat16() for name, value in logits.items()}, seed)
        try:
            yield made
        finally:
            made.close()

    def constant(masks: Mapping[str, Tensor], logit: float) -> dict[str, Tensor]:
        return {name: mask.bfloat16().mul_(logit) for name, mask in masks.items()}

    with mock.patch.object(trainer, "masked", lean), mock.patch.object(trainer, "constant_logits", constant):
        yield


def main() -> None:
    from stories import SETTINGS, Bench, Run, learn_config

    from maskpro_learner.progress import quiet_transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with stories15M/ and text/tinystories.txt")
    parser.add_argument("--json", type=Path, required=True, help="results")
    parser.add_argument("--passes", type=int, default=240, help="forward passes (default 240)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    quiet_transformers()
    bench, pattern, text = Bench(arguments.data), "2:4", (170, 128)
    start = bench.start(pattern, *text)
    rate, logit, draws = SETTINGS["smoothed"]
    rows: list[dict[str, Any]] = []

    def row(kept: str, seed: int, masks: Mapping[str, Tensor], seconds: float) -> None:
        model = bench.model()
        apply_masks(model, masks)
        perplexity = bench.test(model)["perplexity"]
        rows.append({"kept": kept, "seed": seed, "perplexity": perplexity, "cpu_seconds": seconds})
        print(f"{kept:<12} seed {seed}  perplexity {perplexity:.3f}  {seconds:.0f} s", flush=True)

    row("initial", 0, start, 0.0)
    for seed in arguments.seeds:
        run = Run("smoothed", pattern, *text, seed, arguments.passes, 4, "margin", rate, logit, draws)
        for kept in ("as shipped", "plan"):
            model = bench.model()
            begin = time.process_time()
            if kept == "plan":
                with lean_learning(model):
                    masks = learn_masks(model, bench.text(*text), start, learn_config(run))
            else:
                masks = learn_masks(model, bench.text(*text), start, learn_config(run))
            row(kept, seed, masks, time.process_time() - begin)
    for kept in ("as shipped", "plan"):
        found = [row["perplexity"] for row in rows if row["kept"] == kept]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        print(f"{kept:<12} {statistics.mean(found):.3f} +- {spread:.3f}")
    report = {"command": sys.argv, "rows": rows}
    write_atomically(arguments.json, (json.dumps(report, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
