"""What a step adds to the logits: a coefficient for the score of each mask that was tried.

f is the loss of the minibatch under a sampled mask, f_0 under the initial one (MaskPro, arXiv:2506.12876,
section 5). All are unbiased but for the tracker; they differ in variance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Estimator(Protocol):
    """Turns losses into coefficients. ``tracker`` is all of its state."""

    masks_per_batch: int
    tracker: float

    def coefficients(self, losses: Sequence[float], initial_loss: float) -> list[float]:
        """What to multiply the score of each mask with.

        Args:
            losses: f of every mask tried on this minibatch, ``masks_per_batch`` of them.
            initial_loss: f_0, the initial mask's loss on the same minibatch.
        """


class Vanilla:
    """-eta f: the plain policy gradient. Its noise grows with the loss itself."""

    def __init__(self, learning_rate: float) -> None:
        self.masks_per_batch = 1
        self.tracker = 0.0
        self._learning_rate = learning_rate

    def coefficients(self, losses: Sequence[float], initial_loss: float) -> list[float]:
        return [-self._learning_rate * losses[0]]


class Residual:
    """-eta (f - f_0): what is hard about a minibatch for every mask cancels out."""

    def __init__(self, learning_rate: float) -> None:
        self.masks_per_batch = 1
        self.tracker = 0.0
        self._learning_rate = learning_rate

    def coefficients(self, losses: Sequence[float], initial_loss: float) -> list[float]:
        return [-self._learning_rate * (losses[0] - initial_loss)]


class SmoothedResidual:
    """-eta (f - f_0 - delta), delta = alpha delta + (1 - alpha)(f - f_0): also what learning has gained so far."""

    def __init__(self, learning_rate: float, smoothing: float) -> None:
        self.masks_per_batch = 1
        self.tracker = 0.0
        self._learning_rate = learning_rate
        self._smoothing = smoothing

    def coefficients(self, losses: Sequence[float], initial_loss: float) -> list[float]:
        residual = losses[0] - initial_loss
        self.tracker = self._smoothing * self.tracker + (1 - self._smoothing) * residual
        return [-self._learning_rate * (residual - self.tracker)]


class LeaveOneOut:
    """-eta / K (f_k - mean of the other K - 1): masks are compared with each other, on the very same text.

    The paper's baseline is the initial mask, from which the sampled ones drift away; here it is what masks of now
    are worth. It is independent of mask k, so nothing is biased.
    """

    def __init__(self, learning_rate: float, masks_per_batch: int) -> None:
        self.masks_per_batch = masks_per_batch
        self.tracker = 0.0
        self._learning_rate = learning_rate

    def coefficients(self, losses: Sequence[float], initial_loss: float) -> list[float]:
        count = len(losses)
        total = sum(losses)
        return [-self._learning_rate / count * (f - (total - f) / (count - 1)) for f in losses]


ESTIMATORS = ("vanilla", "residual", "smoothed", "leave-one-out")


def make_estimator(name: str, learning_rate: float, smoothing: float, masks_per_batch: int) -> Estimator:
    """The estimator of that name in :data:`ESTIMATORS`."""
    match name:
        case "vanilla":
            return Vanilla(learning_rate)
        case "residual":
            return Residual(learning_rate)
        case "smoothed":
            return SmoothedResidual(learning_rate, smoothing)
        case "leave-one-out":
            return LeaveOneOut(learning_rate, masks_per_batch)
    raise ValueError(f"unknown estimator {name!r}: expected one of {ESTIMATORS}")
