"""Times one learning step's sample and update against the same in torch ops, on the same weights.

    python kernels/bench/policy_step.py --json result.json
    python kernels/bench/policy_step.py --model FOLDER     # also: the step's share of a whole learning step

The rival is MaskPro's own way, written from its formulas: softmax, torch.multinomial without replacement over the
groups of a layer, a masked copy of the weight, and the closed-form gradient for N = 2 as a dozen torch ops. It keeps
the probabilities and the drawn columns from sample to update, which costs memory and saves time, and it runs whole
layers or chunks that stay in the cache, whichever is faster here. Both ways are first checked: strict masks, every
mask of a group as often as it should be, updates equal to the exact score. Then they are timed A B A B.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from machine import this_machine
from torch import Tensor

from maskpro_kernels import NMPattern
from maskpro_kernels.packing import check_mask, magnitude_mask
from maskpro_kernels.policy_step import policy_step
from maskpro_learner.policy import log_prob, score

PATTERN = NMPattern(2, 4)
Shape = tuple[int, int]
SMOLLM2_BLOCK: list[Shape] = [
    (576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536),
]  # fmt: skip
LLAMA_7B_BLOCK: list[Shape] = [*[(4096, 4096)] * 4, (11008, 4096), (11008, 4096), (4096, 11008)]
WORKLOADS = {"SmolLM2-135M, 30 blocks": SMOLLM2_BLOCK * 30, "LLaMA-2-7B, 1 block": LLAMA_7B_BLOCK}
INITIAL_LOGIT = 10.0  # the paper's
COEFFICIENT = -0.1
CHUNK = 1 << 15
"""Groups of a chunk: its logits, probabilities and temporaries, some 3 MB, stay in a core's share of the cache."""


class Way(Protocol):
    """A way to do the step for all layers; ``masked`` and ``logits`` hold its results, layer by layer."""

    name: str
    logits: list[Tensor]
    masked: list[Tensor]

    def step(self) -> None:
        """Updates the logits by the masks of now, then draws the next ones and masks the weights."""


class Fused:
    """``policy_step``: one pass, no mask stored."""

    name = "maskpro"

    def __init__(self, logits: list[Tensor], weights: list[Tensor]) -> None:
        self.logits = [x.clone() for x in logits]
        self.masked = [torch.empty_like(w) for w in weights]
        self._weights = weights
        self._draw = 0
        self._run([])

    def step(self) -> None:
        self._draw += 1
        self._run([(COEFFICIENT, self._draw - 1)])

    def _run(self, updates: list[tuple[float, int]]) -> None:
        for stream, (logits, weight, masked) in enumerate(zip(self.logits, self._weights, self.masked, strict=True)):
            policy_step(
                logits, PATTERN, seed=1, stream=stream, updates=updates, weight=weight, masked=masked,
                next_draw=self._draw,
            )  # fmt: skip


class TorchOps:
    """Softmax, multinomial and the closed form as torch ops, ``chunk`` groups of a layer at a time."""

    def __init__(self, logits: list[Tensor], weights: list[Tensor], chunk: int | None) -> None:
        self.name = "torch ops, whole layers" if chunk is None else f"torch ops, {chunk} groups at once"
        self.logits = [x.clone() for x in logits]
        self.masked = [torch.empty_like(w) for w in weights]
        self._parts = [
            (part, weight_part, masked_part)
            for x, w, m in zip(self.logits, weights, self.masked, strict=True)
            for part, weight_part, masked_part in zip(
                *(t.view(-1, PATTERN.m).split(chunk or t.numel()) for t in (x, w, m)), strict=True
            )
        ]
        self._drawn = [self._sample(*part) for part in self._parts]

    def step(self) -> None:
        for place, (logits, weight, masked) in enumerate(self._parts):
            self._update(logits, *self._drawn[place])
            self._drawn[place] = self._sample(logits, weight, masked)

    @staticmethod
    def _sample(logits: Tensor, weight: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = logits.softmax(1)
        columns = probabilities.multinomial(PATTERN.n)
        masked.zero_().scatter_(1, columns, weight.gather(1, columns))
        return probabilities, columns

    @staticmethod
    def _update(logits: Tensor, probabilities: Tensor, columns: Tensor) -> None:
        """log p = log p_a + log p_b + log(1/(1-p_a) + 1/(1-p_b)), through the softmax."""
        kept = probabilities.gather(1, columns)
        inverse = (1 - kept).reciprocal_()
        slope = inverse.square().div_(inverse.sum(1, keepdim=True)).mul_(kept).add_(1)  # p d log p / d p
        total = slope.sum(1, keepdim=True)
        logits.addcmul_(probabilities, total, value=-COEFFICIENT)
        logits.scatter_add_(1, columns, slope.mul_(COEFFICIENT))


def ways(logits: list[Tensor], weights: list[Tensor]) -> list[Callable[[], Way]]:
    """Makers of the rivals, ours first."""
    return [lambda: Fused(logits, weights)] + [
        (lambda chunk=chunk: TorchOps(logits, weights, chunk)) for chunk in (None, CHUNK)
    ]


def check(make: Callable[[list[Tensor], list[Tensor]], Way], generator: torch.Generator) -> None:
    """Strict masks, frequencies within five standard deviations, updates equal to the exact score.

    Raises:
        AssertionError: one of them is not so.
    """
    group = torch.randn(PATTERN.m, generator=generator) * 1.5
    shape = (256, 512)
    logits, weight = group.repeat(shape[0], shape[1] // PATTERN.m), torch.ones(shape)
    way = make([logits], [weight])
    for _ in range(2):
        before, mask = way.logits[0].clone(), way.masked[0] != 0
        check_mask(mask, PATTERN)
        groups = mask.view(-1, PATTERN.m)
        if torch.equal(before, logits):
            _check_frequencies(group, groups)
        way.step()
        exact = score(before.view(-1, PATTERN.m).double(), groups).view(shape) * COEFFICIENT
        error = (way.logits[0].double() - before - exact).abs().max()
        # float32: a subtraction of numbers up to about 5 for the difference, and a handful of roundings of the score
        assert error <= 32 * torch.finfo(torch.float32).eps, f"{way.name}: update is off by {error:.3g}"


def _check_frequencies(group: Tensor, drawn: Tensor) -> None:
    for kept in itertools.combinations(range(PATTERN.m), PATTERN.n):
        mask = torch.zeros(PATTERN.m, dtype=torch.bool)
        mask[list(kept)] = True
        expected = float(log_prob(group.double().unsqueeze(0), mask.unsqueeze(0)).exp())
        found = float((drawn == mask).all(1).double().mean())
        bound = 5 * (expected * (1 - expected) / len(drawn)) ** 0.5
        assert abs(found - expected) <= bound, f"mask {kept}: drawn with frequency {found:.4f}, expected {expected:.4f}"


@dataclass(frozen=True)
class Bandwidth:
    """``gb_per_s`` (10^9 bytes) reached by ``method`` over ``buffer_bytes``."""

    gb_per_s: float
    method: str
    buffer_bytes: int


def read_write_bandwidth(buffer_bytes: int, rounds: int = 7) -> Bandwidth:
    """Bytes read plus bytes written per second, the better median of a copy and of an update in place."""
    count = max(buffer_bytes // 8, 1024)
    source, target = torch.ones(count), torch.ones(count)
    methods: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "multiply in place": lambda: target.mul_(1.0),
    }
    medians = {name: statistics.median(_seconds(method) for _ in range(rounds)) for name, method in methods.items()}
    best = min(medians, key=lambda name: medians[name])
    return Bandwidth(2 * source.nbytes / medians[best] / 1e9, best, 2 * source.nbytes)


@dataclass(frozen=True)
class Timing:
    """Nanoseconds per weight of one way: the median of ``rounds`` steps, and its quartiles."""

    median: float
    lower: float
    upper: float
    rounds: int


@dataclass(frozen=True)
class Row:
    """One workload. ``limit_ns`` is what moving ``bytes_per_weight`` takes at the measured bandwidth."""

    workload: str
    weights: int
    dtype: str
    bytes_per_weight: int
    limit_ns: float
    share_of_bandwidth: float
    ratio: float
    rival: str
    timings: dict[str, Timing]


@dataclass(frozen=True)
class WholeStep:
    """One learning step of a model: the forward pass of a minibatch, then sample and update."""

    model: str
    weights: int
    minibatch: tuple[int, int]
    forward_seconds: float
    seconds: dict[str, float]
    share: dict[str, float]


def measure(shapes: list[Shape], dtype: torch.dtype, seconds: float, generator: torch.Generator) -> dict[str, Timing]:
    """Times all ways in turn, for about ``seconds`` in all and at least three rounds."""
    weights = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    logits = [magnitude_mask(weight, PATTERN).float() * INITIAL_LOGIT for weight in weights]
    found = [make() for make in ways(logits, weights)]
    for way in found:
        way.step()
        for masked in way.masked:
            check_mask(masked != 0, PATTERN)
    first = sum(_seconds(way.step) for way in found)
    rounds = max(3, min(51, int(seconds / first)))
    samples: dict[str, list[float]] = {way.name: [] for way in found}
    for _ in range(rounds):
        for way in found:
            samples[way.name].append(_seconds(way.step))
    count = sum(weight.numel() for weight in weights)
    return {name: _timing([1e9 * s / count for s in times]) for name, times in samples.items()}


def _seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _timing(samples: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(samples, n=4)
    return Timing(median, lower, upper, len(samples))


def row(workload: str, shapes: list[Shape], dtype: torch.dtype, timings: dict[str, Timing], limit: Bandwidth) -> Row:
    ours = timings[Fused.name].median
    rival = min((name for name in timings if name != Fused.name), key=lambda name: timings[name].median)
    moved = 2 * 4 + 2 * dtype.itemsize  # logits and weights, read and written
    return Row(
        workload=workload,
        weights=sum(rows * columns for rows, columns in shapes),
        dtype=str(dtype).removeprefix("torch."),
        bytes_per_weight=moved,
        limit_ns=moved / limit.gb_per_s,
        share_of_bandwidth=moved / limit.gb_per_s / ours,
        ratio=timings[rival].median / ours,
        rival=rival,
        timings=timings,
    )


def whole_step(folder: str, measured: Row, minibatch: tuple[int, int], batch: int) -> WholeStep:
    """A forward pass of the model in the dtype that was timed, and the step at its measured time per weight."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, measured.dtype)).eval()
    head = model.get_output_embeddings()
    linears = [x for x in model.modules() if isinstance(x, torch.nn.Linear) and x is not head]
    weights = sum(x.weight.numel() for x in linears)
    tokens = torch.randint(model.config.vocab_size, minibatch, generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def forward() -> None:
        for part in tokens.split(batch):
            logits = model(input_ids=part[:, :-1], use_cache=False).logits
            torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten(), reduction="sum")

    forward()
    spent = statistics.median(_seconds(forward) for _ in range(3))
    seconds = {name: 1e-9 * weights * timing.median for name, timing in measured.timings.items()}
    share = {name: s / (spent + s) for name, s in seconds.items()}
    return WholeStep(Path(folder).name, weights, minibatch, spent, seconds, share)


def shape(text: str) -> Shape:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shape, nargs="+", help="one workload of these instead of the two models'")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=120.0, help="per workload (default 120)")
    parser.add_argument("--model", help="folder of a model whose forward pass is timed too")
    parser.add_argument("--minibatch", type=shape, default=(32, 128), help="blocks x tokens of it (default 32x128)")
    parser.add_argument("--batch", type=int, default=8, help="blocks run through the model at once (default 8)")
    parser.add_argument("--json", type=Path, help="also write everything here")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)  # of multinomial
    check(Fused, generator)
    for chunk in (None, 1000):
        check(lambda logits, weights, chunk=chunk: TorchOps(logits, weights, chunk), generator)
    machine = this_machine()
    limit = read_write_bandwidth(min(4 * machine.last_level_cache, machine.memory_available // 4))
    print(machine, f"{limit.gb_per_s:.1f} GB/s read and written by {limit.method}", sep="\n")
    workloads = {"given shapes": arguments.shapes} if arguments.shapes else WORKLOADS
    dtype = getattr(torch, arguments.dtype)
    results = []
    for name, shapes in workloads.items():
        result = row(name, shapes, dtype, measure(shapes, dtype, arguments.seconds, generator), limit)
        results.append(result)
        print(f"\n{name}: {result.weights / 1e6:.1f} million {result.dtype} weights, {PATTERN}, sample + update")
        for way, timing in result.timings.items():
            quartiles = f"{timing.lower:.2f} .. {timing.upper:.2f}"
            print(f"  {way:<32}{timing.median:>9.2f} ns per weight  ({quartiles}, {timing.rounds} rounds)")
        print(
            f"  {result.ratio:.1f} times as fast as {result.rival}; the {result.bytes_per_weight} bytes a weight moved "
            f"would take {result.limit_ns:.2f} ns: {result.share_of_bandwidth:.0%} of the bandwidth",
            flush=True,
        )
    step = None
    if arguments.model:
        step = whole_step(arguments.model, results[0], arguments.minibatch, arguments.batch)
        print(
            f"\n{step.model}: forward of {step.minibatch[0]} x {step.minibatch[1]} tokens {step.forward_seconds:.2f} s"
        )
        for way, seconds in step.seconds.items():
            print(f"  {way:<32}{seconds:>9.3f} s, {step.share[way]:.1%} of the learning step")
    if arguments.json:
        report = {
            "command": sys.argv,
            "machine": asdict(machine),
            "bandwidth": asdict(limit),
            "pattern": str(PATTERN),
            "results": [asdict(result) for result in results],
            "whole_step": asdict(step) if step else None,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
