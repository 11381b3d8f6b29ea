"""Where one decode step goes in vLLM: kernels, attention, output head, sampler, scheduler, and what is between.

    python kernels/bench/decode_step.py --model DIR [--dtype float32] [--sequences 1] [--tokens 96] [--json FILE]

The engine runs in this process, with the environment and flags that ``maskpro-serve`` chooses, so a step is a server's
without its hops between processes. The parts are timed at their Python entry (two clock readings a call), each without
what it calls, and the kernels by themselves. A step's time is the median over decode steps, a part's its mean share
of them. ``--eager`` turns vLLM's compilation off; without it, a dense model's linears are part of what is compiled, and
are counted with what is between.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from machine import Machine, this_machine

from maskpro_kernels.call_timer import take_timed, time_calls
from maskpro_serve.cpu_defaults import choose_here

DENSE = "dense linears"
HEAD = "output head"
KERNELS = "sparse kernels"
PARTS = {
    DENSE: ("vllm.model_executor.layers.linear.UnquantizedLinearMethod.apply",),
    "attention": ("vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl.forward",),
    "norms, rotary, activations, Python between": ("vllm.v1.worker.gpu_model_runner.GPUModelRunner._model_forward",),
    HEAD: ("vllm.model_executor.layers.logits_processor.LogitsProcessor.forward",),
    "sampler": ("vllm.v1.worker.gpu_model_runner.GPUModelRunner._sample",),
    "inputs and bookkeeping": (
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner.execute_model",
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner.sample_tokens",
    ),
    "scheduler": (
        "vllm.v1.core.sched.scheduler.Scheduler.schedule",
        "vllm.v1.core.sched.scheduler.Scheduler.update_from_output",
    ),
    "engine, detokenizer": ("vllm.v1.engine.llm_engine.LLMEngine.step",),
}


class Clock:
    """Exclusive seconds of each part; a kernel called for the output head is the head's."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._open: list[list[Any]] = []

    def wrap(self, part: str, dotted: str) -> None:
        owner, name = _resolve(dotted)
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._take_kernels()
            inside_head = any(entry[0] == HEAD for entry in self._open)
            frame: list[Any] = [HEAD if inside_head else part, 0.0]
            self._open.append(frame)
            begin = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                took = time.perf_counter() - begin
                self._take_kernels()
                self._open.pop()
                self.seconds[frame[0]] += took - frame[1]
                self.calls[frame[0]] += 1
                if self._open:
                    self._open[-1][1] += took

        setattr(owner, name, timed)

    def _take_kernels(self) -> None:
        """Takes the calls that the kernels timed since a part last began or ended: those of the innermost open part."""
        if not self._open:
            return
        frame = self._open[-1]
        for call in take_timed():
            if frame[0] != HEAD:
                frame[1] += call.seconds
                self.seconds[KERNELS] += call.seconds
                self.calls[KERNELS] += 1


def _resolve(dotted: str) -> tuple[Any, str]:
    """The module or class that holds a dotted name, and the name's last part."""
    import importlib

    path, name = dotted.rsplit(".", 1)
    try:
        return importlib.import_module(path), name
    except ModuleNotFoundError:
        module, cls = path.rsplit(".", 1)
        return getattr(importlib.import_module(module), cls), name


def become_configured(arguments: list[str]) -> dict[str, str]:
    """maskpro-serve's flags for this machine, by name; starts this script again with its environment."""
    defaults = choose_here(arguments)
    if "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ:
        environment = {**os.environ, **defaults.environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        environment["MASKPRO_BENCH_FLAGS"] = json.dumps(defaults.flags)
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    flags = json.loads(os.environ["MASKPRO_BENCH_FLAGS"])
    return dict(zip(flags[::2], flags[1::2], strict=True))


def time_steps(engine: Any) -> list[float]:
    """Seconds of every step that one of vLLM's engines takes from here on: a list that grows."""
    steps: list[float] = []
    step = engine.step

    def timed() -> Any:
        begin = time.perf_counter()
        try:
            return step()
        finally:
            steps.append(time.perf_counter() - begin)

    engine.step = timed
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype")
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--compilation-config", type=json.loads, default={}, help="vLLM's, as JSON")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    flags = become_configured(["--dtype", options.dtype] if options.dtype else [])
    dtype = options.dtype or flags.get("--dtype", "auto")

    machine = this_machine()  # before this thread is bound to one core
    clock = Clock()
    from vllm import LLM, SamplingParams

    for part, names in PARTS.items():
        if part == DENSE and not options.eager:
            continue  # Dynamo does not trace a clock
        for dotted in names:
            clock.wrap(part, dotted)
    engine = LLM(
        options.model, dtype=dtype, max_model_len=1024, max_num_seqs=options.sequences, enforce_eager=options.eager,
        compilation_config=options.compilation_config, enable_prefix_caching=False, disable_log_stats=True,
        distributed_executor_backend=flags.get("--distributed-executor-backend"),
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=options.tokens, ignore_eos=True)
    prompts = ["The history of the lighthouse begins"] * options.sequences

    dtype = str(engine.llm_engine.vllm_config.model_config.dtype).removeprefix("torch.")  # "auto" no longer
    engine.generate(prompts, sampling, use_tqdm=False)  # warm-up
    steps = time_steps(engine.llm_engine)
    time_calls(1)
    clock.seconds.clear()
    clock.calls.clear()
    engine.generate(prompts, sampling, use_tqdm=False)
    report(options, machine, dtype, clock, steps)


def report(options: argparse.Namespace, machine: Machine, dtype: str, clock: Clock, steps: list[float]) -> None:
    total = sum(steps)
    count = len(steps)
    print(f"{machine}\n{options.model}, {dtype}, {options.sequences} sequences, {count} steps")
    rows = []
    for part in (KERNELS, *PARTS):
        if part not in clock.seconds:
            continue
        seconds = clock.seconds[part]
        rows.append({"part": part, "ms": seconds / count * 1e3, "share": seconds / total,
                     "calls": clock.calls[part] / count})  # fmt: skip
    print(f"{'part':44} {'ms a step':>10} {'share':>7} {'calls':>7}")
    for row in rows:
        print(f"{row['part']:44} {row['ms']:10.2f} {row['share']:7.1%} {row['calls']:7.1f}")
    print(f"{'step, median':44} {statistics.median(steps) * 1e3:10.2f}")
    if options.json:
        document = {"command": " ".join(sys.argv), "machine": asdict(machine), "dtype": dtype,
                    "sequences": options.sequences, "steps": count, "step_ms": statistics.median(steps) * 1e3,
                    "parts": rows}  # fmt: skip
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
