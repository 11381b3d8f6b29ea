"""One call in N is timed, the same in eager and compiled models, and none when nobody asks."""

from __future__ import annotations

import pytest
import torch

from maskpro_kernels import NMPattern, nm_linear, pack
from maskpro_kernels.call_timer import MOST_WAITING, take_timed, time_calls
from maskpro_kernels.interleaved import interleave

PATTERN = NMPattern.parse("2:4")


@pytest.fixture(autouse=True)
def nothing_left():
    take_timed()
    yield
    time_calls(0)
    take_timed()


@pytest.mark.parametrize("compiled", [False, True])
def test_one_call_in_three(compiled):
    weight = interleave(pack(torch.randn(32, 64), PATTERN))
    x = torch.randn(5, 64)
    # A full graph: the timer is beneath the operator and breaks nothing.
    step = torch.compile(nm_linear, fullgraph=True, backend="aot_eager") if compiled else nm_linear
    expected = step(x, weight)
    assert take_timed() == []
    time_calls(3)
    for _ in range(7):
        assert torch.equal(step(x, weight), expected)
    calls = take_timed()
    assert len(calls) == 2
    for call in calls:
        assert call.backend.startswith("cpu-")
        assert (call.pattern, call.tokens, call.weight_bytes) == (PATTERN, 5, weight.data.nbytes)
        assert 0 < call.seconds < 10
    time_calls(0)
    step(x, weight)
    assert take_timed() == []


def test_calls_that_nobody_takes_are_dropped():
    weight, x = interleave(pack(torch.randn(16, 8), PATTERN)), torch.randn(1, 8)
    time_calls(1)
    for _ in range(MOST_WAITING + 5):
        nm_linear(x, weight)
    assert len(take_timed()) == MOST_WAITING
    nm_linear(x, weight)
    assert len(take_timed()) == 1


def test_a_period_is_not_negative():
    with pytest.raises(ValueError, match="every >= 0, found -1"):
        time_calls(-1)
    time_calls(1 << 70)  # as good as never
