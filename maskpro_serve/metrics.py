"""Our Prometheus metrics, beside vLLM's on /metrics.

Layers load in vLLM's worker processes while /metrics is answered by the API server, so the gauges travel
through prometheus-client's multiprocess mode; ``maskpro-serve`` sets its folder.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

from prometheus_client import Gauge

from maskpro_kernels import NMPattern

logger = logging.getLogger("vllm.maskpro")  # under vLLM's logger, so its handler and level apply

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


@dataclass
class LayerTally:
    """Counts one model's packed layers in one process, and reports when the last has loaded."""

    pattern: NMPattern
    _waiting: int = 0
    _backends: Counter[str] = field(default_factory=Counter)
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

    def _report_last(self) -> None:
        if self._waiting == 0:
            self._report()

    def _report(self) -> None:
        layers = ", ".join(f"{count} on {backend}" for backend, count in sorted(self._backends.items())) or "none"
        logger.info(
            "maskpro: %s linear layers: %s; %.1f MB packed, %.4f of their dense bytes",
            self.pattern,
            layers,
            self._packed_bytes / 1e6,
            self._packed_bytes / max(1, self._dense_bytes),
        )
        if self._dense:
            logger.info("maskpro: %d linear layers stay dense, their zeros are not %s", self._dense, self.pattern)
        if self._experts:
            logger.info("maskpro: the experts of %d layers stay dense, no kernel is for them", self._experts)
