"""What a compilation config of vLLM is worth: two engines on one model, in one process, asked in turn, A B A B.

    VLLM_USE_LAYERNAME=0 python kernels/bench/compilation.py --model DIR --json FILE \\
        --config '{"inductor_compile_config": {"cpp_wrapper": true}}' [--sequences 1 16] [--rounds 12] [--tokens 48]

A is vLLM's own config, B the one that is given; both start with the environment and flags that ``maskpro-serve``
chooses. A round's time is the median of its decode steps, a ratio the median over rounds of A's time to B's; both
engines must give the same tokens. The time to be ready is that of one start and depends on what is in Inductor's cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from decode_step import become_configured, time_steps
from machine import this_machine

_FIRST_STEPS = 4
"""Of an answer, not timed: the prompt, and what follows another engine's work."""


class Timed:
    """An engine, the steps it takes, and what it answered first."""

    def __init__(
        self, options: argparse.Namespace, sequences: int, flags: dict[str, str], config: dict[str, Any]
    ) -> None:
        from vllm import LLM, SamplingParams

        begin = time.perf_counter()
        self._llm = LLM(
            options.model, max_model_len=1024, max_num_seqs=sequences, enable_prefix_caching=False,
            disable_log_stats=True, kv_cache_memory_bytes=1 << 29, compilation_config=config,
            dtype=flags.get("--dtype", "auto"),
            distributed_executor_backend=flags.get("--distributed-executor-backend"),
        )  # fmt: skip
        self.ready_s = time.perf_counter() - begin
        self._sampling = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)
        self._prompts = ["The history of the lighthouse begins"] * sequences
        self._steps = time_steps(self._llm.llm_engine)
        self.tokens = self._generate()
        self.rounds: list[float] = []

    def _generate(self) -> list[list[int]]:
        self._steps.clear()
        answers = self._llm.generate(self._prompts, self._sampling, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def round(self) -> None:
        """One more round of answers."""
        self._generate()
        self.rounds.append(statistics.median(self._steps[_FIRST_STEPS:]))


def compare(options: argparse.Namespace, sequences: int, flags: dict[str, str]) -> dict[str, Any]:
    """One row: so many sequences at a time."""
    a, b = (Timed(options, sequences, flags, config) for config in ({}, options.config))
    if a.tokens != b.tokens:
        raise SystemExit(f"{sequences} sequences: the two give other tokens")
    for _ in range(options.rounds):
        a.round()
        b.round()
    ratios = [mine / theirs for mine, theirs in zip(a.rounds, b.rounds, strict=True)]
    return {
        "sequences": sequences, "step_ms": [1e3 * statistics.median(engine.rounds) for engine in (a, b)],
        "ratio": statistics.median(ratios), "quartiles": statistics.quantiles(ratios)[::2],
        "ready_s": [a.ready_s, b.ready_s],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--config", type=json.loads, required=True, help="vLLM's compilation config B, as JSON")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=48, help="of an answer (default 48)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    flags = become_configured([])
    machine = this_machine()  # before this thread is bound to one core
    rows = [compare(options, sequences, flags) for sequences in options.sequences]
    print(machine)
    for row in rows:
        (a, b), (low, high) = row["step_ms"], row["quartiles"]
        steps = f"{a:6.2f} and {b:6.2f} ms a step"
        print(f"{row['sequences']:3} sequences: {steps}, {row['ratio']:.3f} ({low:.3f} to {high:.3f})")
    if options.json:
        document = {"command": " ".join(sys.argv), "machine": asdict(machine), "config": options.config, "rows": rows}
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
