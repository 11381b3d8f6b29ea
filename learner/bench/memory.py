"""Peak memory of learning masks on a CPU, in bytes per prunable weight.

    python learner/bench/memory.py --json result.json

Learns for a few steps on random Llamas of several depths, each in a fresh process, and fits a line to the peaks: its
slope is what one more weight costs, and what does not grow with the model (interpreter, libraries, one layer's
temporaries) stays out of it. From every peak are subtracted, and stated: the memory in use before the model is built,
the peak of a plain forward pass of the same minibatch above the model (activations), and the weights that are not
prunable.

The peak is the kernel's VmHWM, reset through /proc/self/clear_refs once the model is built.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from memory_plan import lean_learning
from transformers import LlamaConfig, LlamaForCausalLM

from maskpro_kernels import NMPattern
from maskpro_kernels.packing import top_n_mask
from maskpro_learner import LearnConfig, learn_masks, select_layers
from maskpro_learner.estimator import ESTIMATORS
from maskpro_learner.evaluate import summed_loss
from maskpro_learner.packed_masks import PackedMasks

PATTERN = NMPattern(2, 4)
LLAMA_7B_PRUNABLE = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
LLAMA_7B_OTHER = 2 * 32000 * 4096 + 65 * 4096
AUTHORS_BYTES = 2 + 1 + 4
"""What the released code of MaskPro keeps per prunable weight: fp16 weight, bool mask, fp32 logit."""


@dataclass(frozen=True)
class Peak:
    """One model, in bytes.

    Attributes:
        layers: decoder blocks.
        weights: prunable weights.
        before: resident memory before the model.
        other: weights that are not prunable.
        activations: peak of a forward pass of the minibatch above the model's weights.
        peak: peak while learning.
    """

    layers: int
    weights: int
    before: int
    other: int
    activations: int
    peak: int

    @property
    def learning(self) -> int:
        """What the prunable weights and all that is kept for them take."""
        return self.peak - self.before - self.other - self.activations


def status(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status: no field {field}")


def peak_of(action: Callable[[], object]) -> int:
    """The most resident memory while it ran."""
    Path("/proc/self/clear_refs").write_text("5")
    action()
    return status("VmHWM")


def llama(layers: int, hidden: int, dtype: torch.dtype) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=hidden * 11 // 4 // 16 * 16, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.set_default_dtype(dtype)
    try:
        model: LlamaForCausalLM = LlamaForCausalLM(config).train(False).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    return model


def learn(
    model: LlamaForCausalLM, tokens: torch.Tensor, arguments: argparse.Namespace, checkpoint: Path | None
) -> None:
    """What is measured: initial masks are made where they are handed over, and nobody else keeps them."""
    config = LearnConfig(PATTERN, arguments.steps, arguments.estimator, minibatch=len(tokens), batch=len(tokens))
    with lean_learning(model) if arguments.plan else nullcontext():
        learn_masks(
            model, tokens,
            PackedMasks(
                (f"{name}.weight", top_n_mask(linear.weight, PATTERN))
                for name, linear in select_layers(model, PATTERN).linears.items()
            ),
            config, checkpoint=checkpoint, checkpoint_seconds=0,
        )  # fmt: skip


def measure_here(layers: int, arguments: argparse.Namespace) -> Peak:
    """The peak of one model in this very process, which should be a fresh one."""
    torch.set_num_threads(1)
    dtype = getattr(torch, arguments.dtype)
    tokens = torch.randint(256, (arguments.blocks, arguments.length), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "run.checkpoint" if arguments.checkpoint else None
        learn(llama(1, 128, dtype), tokens, arguments, checkpoint)  # loads every library first
        if checkpoint is not None:
            checkpoint.unlink()
        before = status("VmRSS")
        model = llama(layers, arguments.hidden, dtype)
        prunable = sum(linear.weight.nbytes for linear in select_layers(model, PATTERN).linears.values())
        other = sum(parameter.nbytes for parameter in model.parameters()) - prunable
        activations = peak_of(lambda: summed_loss(model, tokens[:, :-1], tokens[:, 1:])) - before - prunable - other
        peak = peak_of(lambda: learn(model, tokens, arguments, checkpoint))
    return Peak(layers, prunable // dtype.itemsize, before, other, activations, peak)


def measure(layers: int, arguments: argparse.Namespace) -> Peak:
    """:func:`measure_here` in a fresh process."""
    command = [sys.executable, __file__, "--child", str(layers), *sys.argv[1:]]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return Peak(**json.loads(run.stdout.splitlines()[-1]))


def slope(peaks: list[Peak]) -> tuple[float, float]:
    """Bytes per weight, and the constant, by least squares."""
    design = torch.tensor([[peak.weights, 1.0] for peak in peaks], dtype=torch.float64)
    target = torch.tensor([[peak.learning] for peak in peaks], dtype=torch.float64)
    per_weight, constant = torch.linalg.lstsq(design, target, driver="gelsd").solution.flatten().tolist()
    return per_weight, constant


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16], help="depths (default 4 8 16)")
    parser.add_argument("--hidden", type=int, default=1024, help="width, a multiple of 64 (default 1024)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of the model")
    parser.add_argument("--estimator", choices=ESTIMATORS, default="smoothed")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--blocks", type=int, default=2, help="blocks of the minibatch (default 2)")
    parser.add_argument("--length", type=int, default=16, help="tokens of a block (default 16)")
    parser.add_argument("--no-checkpoint", dest="checkpoint", action="store_false", help="write none after each step")
    parser.add_argument("--plan", action="store_true", help="by the plan for 4.2 bytes, see memory_plan.py")
    parser.add_argument("--json", type=Path, help="also write everything here")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.child is not None:
        print(json.dumps(asdict(measure_here(arguments.child, arguments))))
        return
    peaks = [measure(layers, arguments) for layers in arguments.layers]
    per_weight, constant = slope(peaks)
    width = getattr(torch, arguments.dtype).itemsize
    saving = "a checkpoint after every step" if arguments.checkpoint else "no checkpoint"
    print(f"{arguments.estimator}, {PATTERN}, {arguments.dtype}, {arguments.steps} steps, {saving}; MB:")
    print(f"{'blocks':>7}{'weights':>13}{'before':>9}{'other':>8}{'activations':>13}{'peak':>9}{'learning':>10}")
    for peak in peaks:
        megabytes = [x / 1e6 for x in (peak.before, peak.other, peak.activations, peak.peak, peak.learning)]
        print(
            f"{peak.layers:>7}{peak.weights:>13,}{megabytes[0]:>9.1f}{megabytes[1]:>8.1f}{megabytes[2]:>13.1f}"
            f"{megabytes[3]:>9.1f}{megabytes[4]:>10.1f}"
        )
    kept = width + 2 if arguments.plan else 2 * width + 4
    parts = f"{width} dense + 2 logit" if arguments.plan else f"{width} dense + {width} masked + 4 logit"
    print(
        f"{per_weight:.2f} bytes per weight ({parts} = {kept} are kept), and {constant / 1e6:.0f} MB whatever the depth"
    )
    ours, least, authors = (
        (each * LLAMA_7B_PRUNABLE + 2 * LLAMA_7B_OTHER) / 2**30 for each in (per_weight, kept, AUTHORS_BYTES)
    )
    print(
        f"LLaMA-2-7B ({LLAMA_7B_PRUNABLE / 1e9:.2f}e9 prunable weights, the rest in 2 bytes): {ours:.1f} GiB by this "
        f"slope, {least:.1f} GiB by what is kept; the authors' code {authors:.1f} GiB before temporaries"
    )
    if arguments.json:
        report = {
            "command": sys.argv,
            "estimator": arguments.estimator,
            "dtype": arguments.dtype,
            "checkpoint": arguments.checkpoint,
            "plan": arguments.plan,
            "peaks": [asdict(peak) | {"learning": peak.learning} for peak in peaks],
            "bytes_per_weight": per_weight,
            "constant_bytes": constant,
            "llama_2_7b_gib": {"measured_slope": ours, "kept": least, "authors_before_temporaries": authors},
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
