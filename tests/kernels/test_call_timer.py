"""One call in N is timed, the same in eager and compiled models, and none when nobody asks."""

from __future__ import annotations

import pytest
import torch

from maskpro_kernels import NMPattern, nm_linear, pack
from maskpro_kernels.call_timer import observe_calls
from maskpro_kernels.interleaved import interleave

PATTERN = NMPattern.parse("2:4")


@pytest.fixture
def seen():
    calls: list[tuple[str, NMPattern, int, int, float]] = []
    yield calls
    observe_calls(None, 1)


@pytest.mark.parametrize("compiled", [False, True])
def test_one_call_in_three(seen, compiled):
    weight = interleave(pack(torch.randn(32, 64), PATTERN))
    x = torch.randn(5, 64)
    # A full graph: the timer is beneath the operator and breaks nothing.
    step = torch.compile(nm_linear, fullgraph=True, backend="aot_eager") if compiled else nm_linear
    expected = step(x, weight)
    observe_calls(lambda *call: seen.append(call), 3)
    for _ in range(7):
        assert torch.equal(step(x, weight), expected)
    assert len(seen) == 2
    for backend, pattern, tokens, weight_bytes, seconds in seen:
        assert backend.startswith("cpu-")
        assert (pattern, tokens, weight_bytes) == (PATTERN, 5, weight.data.nbytes)
        assert 0 < seconds < 10
    observe_calls(None, 1)
    step(x, weight)
    assert len(seen) == 2


def test_a_period_is_at_least_one():
    with pytest.raises(ValueError, match="every >= 1, found 0"):
        observe_calls(print, 0)
