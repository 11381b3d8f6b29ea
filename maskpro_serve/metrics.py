"""Our Prometheus metrics, beside vLLM's on /metrics.

Layers load and kernels run in vLLM's worker processes while /metrics is answered by the API server, so they travel
through prometheus-client's multiprocess mode; ``maskpro-serve`` sets its folder.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections import Counter as Count
from dataclasses import asdict, dataclass, field

import torch
from prometheus_client import Counter, Gauge, Histogram

from maskpro_kernels import NMPattern
from maskpro_kernels.call_timer import TimedCall, take_timed, time_calls
from maskpro_kernels.interleaved import DENSE

logger = logging.getLogger("vllm.maskpro")  # under vLLM's logger, so its handler and level apply

SAMPLING_VARIABLE = "MASKPRO_KERNEL_SAMPLING"
"""One kernel call in this many is timed; 0 times none."""
_SAMPLING = 127  # prime: walks over all layers; about one sample a step of a model of 30 layers

_RECORD_S = 1.0

LINEAR_LAYERS = Gauge(
    "maskpro_linear_layers",
    "Packed weight matrices by kernel backend; a fused layer counts each of its parts, a sharded one each shard.",
    ["backend", "pattern"],
    multiprocess_mode="sum",
)
WEIGHT_BYTES = Gauge(
    "maskpro_weight_bytes",
    "Bytes of the packed linears: in memory, and as dense weights of the same dtype (16 bits for int8) would take.",
    ["kind"],
    multiprocess_mode="sum",
)
KERNEL_THREADS = Gauge(
    "maskpro_kernel_threads", "Threads of the CPU kernels, summed over worker processes.", multiprocess_mode="sum"
)
KERNEL_SECONDS = Histogram(
    "maskpro_kernel_seconds",
    f"Time of sampled calls of a linear layer's CPU kernel, one call in {_SAMPLING} ({SAMPLING_VARIABLE}).",
    ["backend", "pattern", "tokens"],
    buckets=[1e-5 * 2**power for power in range(15)],  # 10 microseconds to 164 ms
)
KERNEL_BYTES = Counter(
    "maskpro_kernel_weight_bytes",
    "Bytes of weight read by the calls that maskpro_kernel_seconds timed: their quotient is the bandwidth reached.",
    ["backend", "pattern", "tokens"],
)
MODEL_INFO = Gauge(
    "maskpro_model_info",
    "1; what is served, in the labels.",
    ["model", "pattern", "values", "activations", "maskpro_version", "vllm_version", "torch_version"],
    multiprocess_mode="max",
)
REQUESTS = Counter(
    "maskpro_requests",
    "Finished requests: completed; rejected (4xx, or refused while stopping); failed (5xx, or an error within a "
    "stream); disconnected (the client left).",
    ["outcome"],
)

_TOKEN_RANGES = ((1, "1"), (8, "2-8"), (32, "9-32"), (128, "33-128"))


def token_range(tokens: int) -> str:
    """The label of a number of tokens."""
    return next((label for most, label in _TOKEN_RANGES if tokens <= most), "129+")


@dataclass(frozen=True)
class ModelInfo:
    """The labels of ``maskpro_model_info``: no paths. Unpruned models have pattern ``dense``."""

    model: str
    pattern: str
    values: str
    activations: str
    maskpro_version: str
    vllm_version: str
    torch_version: str

    def publish(self) -> None:
        MODEL_INFO.labels(**asdict(self)).set(1)


def sampling_period() -> int:
    """One call in this many is timed, 0 for none.

    Raises:
        ValueError: the environment variable is no whole number >= 0.
    """
    text = os.environ.get(SAMPLING_VARIABLE) or str(_SAMPLING)
    if not text.isdecimal():
        raise ValueError(
            f"{SAMPLING_VARIABLE}={text!r}: expected a whole number, one call in so many is timed; 0: none"
        )
    return int(text)


def record_kernel(call: TimedCall) -> None:
    """Records one timed kernel call; 10 microseconds, in multiprocess mode."""
    pattern = "dense" if call.pattern == DENSE else str(call.pattern)
    labels = (call.backend, pattern, token_range(call.tokens))
    KERNEL_SECONDS.labels(*labels).observe(call.seconds)
    KERNEL_BYTES.labels(*labels).inc(call.weight_bytes)


def record_kernels(period: int) -> None:
    """From now on, times one kernel call in ``period`` of this process (0: none) and records the times every second."""
    time_calls(period)
    if period:
        _start_recorder()


@functools.cache
def _start_recorder() -> None:
    def record() -> None:
        while True:
            time.sleep(_RECORD_S)
            for call in take_timed():
                record_kernel(call)

    threading.Thread(target=record, name="maskpro-metrics", daemon=True).start()


@dataclass
class LayerTally:
    """Counts one model's packed layers in one process, and reports when the last has loaded.

    Attributes:
        pattern: of the layers.
        unclaimed_head: the output head may be rounded, but vLLM has not asked who is to multiply it.
    """

    pattern: NMPattern
    unclaimed_head: bool = False
    _waiting: int = 0
    _backends: Count[str] = field(default_factory=Count)
    _dense: int = 0
    _experts: int = 0
    _packed_bytes: int = 0
    _dense_bytes: int = 0

    def created(self) -> None:
        """A layer's parameters exist and wait for the checkpoint."""
        self._waiting += 1

    def loaded(self, packed_bytes: int, dense_bytes: int, partitions: int, backend: str) -> None:
        """A layer of ``partitions`` fused matrices was loaded, takes these bytes and will run on ``backend``."""
        self._waiting -= 1
        self._backends[backend] += partitions
        self._packed_bytes += packed_bytes
        self._dense_bytes += dense_bytes
        LINEAR_LAYERS.labels(backend, str(self.pattern)).inc(partitions)
        WEIGHT_BYTES.labels("packed").inc(packed_bytes)
        WEIGHT_BYTES.labels("dense_equivalent").inc(dense_bytes)
        self._report_last()

    def stayed_dense(self, partitions: int) -> None:
        """A layer of ``partitions`` fused matrices was loaded, whose zeros do not satisfy the pattern."""
        self._waiting -= 1
        self._dense += partitions
        self._report_last()

    def experts(self) -> None:
        """A layer of a mixture of experts exists; there is no sparse kernel for those."""
        self._experts += 1

    @property
    def complete(self) -> bool:
        """Whether every layer that was created has been loaded."""
        return self._waiting == 0

    def _report_last(self) -> None:
        if self.complete:
            self._report()

    def _report(self) -> None:
        threads = torch.get_num_threads()
        KERNEL_THREADS.set(threads)
        record_kernels(sampling_period())
        layers = ", ".join(f"{count} on {backend}" for backend, count in sorted(self._backends.items())) or "none"
        logger.info(
            "maskpro: %s linear layers: %s; %.1f MB packed, %.4f of their dense bytes; %d thread%s",
            self.pattern,
            layers,
            self._packed_bytes / 1e6,
            self._packed_bytes / max(1, self._dense_bytes),
            threads,
            "" if threads == 1 else "s",
        )
        if self.unclaimed_head:
            logger.info(
                "maskpro: the output head, if this process has it, stays as it is: vLLM gives this model's to no "
                "quantization method"
            )
        if self._dense:
            logger.info("maskpro: %d linear layers stay dense, their zeros are not %s", self._dense, self.pattern)
        if self._experts:
            logger.info("maskpro: the experts of %d layers stay dense, no kernel is for them", self._experts)
