"""What a step adds to the logits: a coefficient for the score of each mask that was tried.

f is the loss of the minibatch under a sampled mask, f_0 under the initial one (MaskPro, arXiv:2506.12876,
section 5). They differ in variance, and the last one in what it knows: one number for all groups says very little of
any of them, where one backward pass says of each weight what it is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Estimator(Protocol):
    """Turns losses into coefficients.

    Attributes:
        masks_per_batch: whole masks tried on one minibatch.
        group_draws: further draws of each group that are scored instead, by the loss's gradient; 0 scores the masks
            tried, by their losses.
        tracker: a moving average, and all of the state.
    """

    masks_per_batch: int
    group_draws: int
    tracker: float

    def coefficients(self, losses: Sequence[float], initial_loss: float) -> list[float]:
        """What to multiply the score of each scored draw with.

        Args:
            losses: f of every mask tried on this minibatch, ``masks_per_batch`` of them.
            initial_loss: f_0, the initial mask's loss on the same minibatch.
        """


class Vanilla:
    """-eta f: the plain policy gradient. Its noise grows with the loss itself."""

    def __init__(self, learning_rate: float) -> None:
        self.masks_per_batch = 1
        self.group_draws = 0
        self.tracker = 0.0
        self._learning_rate = learning_rate

    def coefficients(self, losses: Sequence[float], initial_loss: float) -> list[float]:
        return [-self._learning_rate * losses[0]]


class Residual:
    """-eta (f - f_0): what is hard about a minibatch for every mask cancels out."""

    def __init__(self, learning_rate: float) -> None:
        self.masks_per_batch = 1
        self.group_draws = 0
        self.tracker = 0.0
        self._learning_rate = learning_rate

    def coefficients(self, losses: Sequence[float], initial_loss: float) -> list[float]:
        return [-self._learning_rate * (losses[0] - initial_loss)]


class SmoothedResidual:
    """-eta (f - f_0 - delta), delta = alpha delta + (1 - alpha)(f - f_0): also what learning has gained so far."""

    def __init__(self, learning_rate: float, smoothing: float) -> None:
        self.masks_per_batch = 1
        self.group_draws = 0
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

    def __init__(self, learning_rate: float, draws: int) -> None:
        self.masks_per_batch = draws
        self.group_draws = 0
        self.tracker = 0.0
        self._learning_rate = learning_rate

    def coefficients(self, losses: Sequence[float], initial_loss: float) -> list[float]:
        count = len(losses)
        total = sum(losses)
        return [-self._learning_rate / count * (f - (total - f) / (count - 1)) for f in losses]


class FirstOrder:
    """eta / K (r_k - mean of the other K - 1), for each group by itself.

    With g the gradient of the minibatch's loss with respect to the weights under one sampled mask, the loss changes
    by  sum_j g_j w_j (m'_j - m_j)  to first order where a group has the mask m' instead. That is the reward of a mask
    of the group alone: r = -sum_j g_j w_j m'_j, of which K draws are compared. Its bias is the loss's curvature within
    one group, everything else being at its sampled value; its variance has lost what all other groups did to the loss.

    Costs a backward pass and its gradient, 4 bytes per weight more in float32. g w is divided by its root mean square
    over the layer, so that eta is a change of logits whatever the scale of the loss.
    """

    def __init__(self, learning_rate: float, draws: int) -> None:
        self.masks_per_batch = 1
        self.group_draws = draws
        self.tracker = 0.0
        self._learning_rate = learning_rate

    def coefficients(self, losses: Sequence[float], initial_loss: float) -> list[float]:
        return [self._learning_rate / self.group_draws] * self.group_draws


@dataclass(frozen=True)
class Settings:
    """What an estimator runs with where nothing else is said.

    Attributes:
        learning_rate: eta.
        initial_logit: pi_0 of the weights that the initial mask keeps.
        draws: masks that are compared with each other.
    """

    learning_rate: float
    initial_logit: float
    draws: int


DEFAULTS = {
    "vanilla": Settings(50.0, 10.0, 1),  # these are the paper's
    "residual": Settings(50.0, 10.0, 1),
    "smoothed": Settings(50.0, 10.0, 1),
    "leave-one-out": Settings(50.0, 10.0, 2),
    "first-order": Settings(0.5, 3.0, 8),
}
ESTIMATORS = tuple(DEFAULTS)


def make_estimator(name: str, learning_rate: float, smoothing: float, draws: int) -> Estimator:
    """The estimator of that name in :data:`ESTIMATORS`."""
    match name:
        case "vanilla":
            return Vanilla(learning_rate)
        case "residual":
            return Residual(learning_rate)
        case "smoothed":
            return SmoothedResidual(learning_rate, smoothing)
        case "leave-one-out":
            return LeaveOneOut(learning_rate, draws)
        case "first-order":
            return FirstOrder(learning_rate, draws)
    raise ValueError(f"unknown estimator {name!r}: expected one of {ESTIMATORS}")
