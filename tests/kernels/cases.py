"""The instruction sets and patterns that the kernels' tests go through."""

from __future__ import annotations

import threading
from collections.abc import Callable

from hypothesis import strategies as st

from maskpro_kernels import NMPattern

ISAS = ("amx-bf16", "avx512-bf16", "avx512", "avx2", "portable")

PATTERNS = st.sampled_from([4, 8, 16, 32]).flatmap(lambda m: st.builds(NMPattern, st.integers(1, m), st.just(m)))

EXPANDED = (
    "1:4", "2:4", "3:4", "4:4", "2:8", "3:8", "4:8", "5:8", "6:8", "7:8", "5:16", "8:16", "13:16", "7:32", "16:32",
    "25:32",
)  # fmt: skip
"""One for each way in which instruction sets that multiply pairs or tiles expand a weight."""


def at_once(work: Callable[[int], None], count: int) -> None:
    """Calls ``work`` with 0, 1, ... in as many threads, and waits for them."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
