"""The learning step of LLaMA-2-7B's linears: time and memory."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from rows import Rows

from maskpro_kernels import NMPattern
from maskpro_kernels.policy_step import policy_step

LAYER = (*[(4096, 4096)] * 4, *[(11008, 4096)] * 2, (4096, 11008))
LAYERS = 32
_BYTES = 8
"""A weight: a float32 logit, and bfloat16 weight and masked weight."""


def learner_rows(rows: Rows) -> None:
    for pattern in (NMPattern(2, 4), NMPattern(4, 8)):
        rows.row(f"LLaMA-2-7B step {pattern}", lambda p=pattern: step(p), needs=40)


def step(pattern: NMPattern) -> dict[str, Any]:
    """One update, draw and masking of every linear; of fewer layers where memory is short."""
    per_layer = sum(rows * columns for rows, columns in LAYER)
    free, _ = torch.cuda.mem_get_info()
    layers = min(LAYERS, int(0.9 * free / (_BYTES * per_layer)))
    torch.cuda.reset_peak_memory_stats()
    tensors = []
    for _ in range(layers):
        for shape in LAYER:
            weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            tensors.append((torch.zeros(shape, device="cuda"), weight, torch.empty_like(weight)))

    def run(draw: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for stream, (logits, weight, masked) in enumerate(tensors):
            policy_step(
                logits, pattern, seed=1, stream=stream, updates=[(0.1, draw)], weight=weight, masked=masked,
                next_draw=draw + 1,
            )  # fmt: skip
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    run(0)
    _, weight, masked = tensors[0]
    groups = (masked.reshape(-1, pattern.m) == weight.reshape(-1, pattern.m)).sum(1)
    assert int(groups.min()) >= pattern.n, "a group keeps too few weights"
    assert int((masked.reshape(-1, pattern.m) != 0).sum(1).max()) <= pattern.n, "a group keeps too many weights"
    time = statistics.median(run(draw) for draw in range(1, 6))
    weights = layers * per_layer
    return {
        "layers": layers, "weights": weights, "seconds": time, "steps/s of 32 layers": layers / LAYERS / time,
        "GB/s": weights * 12 / time / 1e9, "peak GiB": torch.cuda.max_memory_allocated() / 2**30,
    }  # fmt: skip
