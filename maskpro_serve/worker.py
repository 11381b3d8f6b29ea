"""vLLM's CPU worker, which a request's seed does not end, and which keeps no memory that only compiling needed."""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.core.sched.output import GrammarOutput
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.cpu_worker import CPUWorker

from maskpro_serve.freed_memory import return_freed_memory


class _Spare(torch.Generator):
    """For draws that are thrown away: it may be moved, which does nothing."""

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        return self


class SeededCPUWorker(CPUWorker):
    """Lets a request with a seed be read in several steps.

    A step that ends within a prompt samples all the same, and vLLM takes the request's draw back by moving the offset
    of its generator. The CPU's generators have none: the engine dies of one such request (0.27 to 0.32). Here the
    sampler finds a spare one in its place, so that there is nothing to take back: a seed gives the same tokens however
    the prompt was cut. (No row is left without: 0.27 ignores all seeds of a batch in which one is missing.)
    """

    def determine_available_memory(self) -> int:
        """Before the KV cache is allocated, so that what compiling has freed does not count beside it."""
        available = super().determine_available_memory()
        return_freed_memory()
        return available

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        if self.use_v2_model_runner:  # draws without generators
            return super().sample_tokens(grammar_output)
        batch = self.model_runner.input_batch
        reading = np.flatnonzero(self.model_runner.discard_request_mask.np[: batch.num_reqs]).tolist()
        kept = {index: batch.generators[index] for index in reading if index in batch.generators}
        batch.generators.update({index: _Spare() for index in kept})
        try:
            return super().sample_tokens(grammar_output)
        finally:
            batch.generators.update(kept)
