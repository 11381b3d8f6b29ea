"""The settings of a learning run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from maskpro_kernels import NMPattern
from maskpro_kernels.policy_step import MAX_GAIN_DRAWS, SUPPORTED_M
from maskpro_learner.errors import LearnerError
from maskpro_learner.estimator import DEFAULTS, ESTIMATORS, Settings

STARTS = ("constant", "margin")
_SEEDS = 1 << 43
"""Every step has a seed of its own, a million for each of a run's: a number of 63 bits."""


def check_seed(seed: int) -> None:
    """Checks the seed of a run.

    Raises:
        LearnerError: it is negative, or too large.
    """
    if not 0 <= seed < _SEEDS:
        raise LearnerError(f"seed: expected a number from 0 to {_SEEDS - 1}, found {seed}")


@dataclass(frozen=True)
class LearnConfig:
    """What :func:`maskpro_learner.learn_masks` does; the defaults are the paper's (MaskPro, section 6), and
    what None stands for is the estimator's (:data:`maskpro_learner.estimator.DEFAULTS`).

    Attributes:
        pattern: N of every M weights are kept; M is 4, 8 or 16.
        steps: updates of the logits.
        estimator: a name in :data:`maskpro_learner.estimator.ESTIMATORS`.
        learning_rate: eta.
        start: ``constant``, the paper's: all weights of the initial mask have the same logit, the others 0; or
            ``margin``: logits in proportion to what a weight is worth (:mod:`maskpro_learner.margins`).
        initial_logit: that logit; with ``margin``, the logit of a layer's median worth.
        smoothing: alpha of the moving-average tracker.
        draws: masks that are compared: whole ones on a minibatch (leave-one-out), or of each group (first-order).
        minibatch: blocks of calibration text in a step, all there are where they are fewer.
        batch: of those, how many run through the model at once; memory only.
        seed: of the draws and of the order of the text. A run is a function of it.
    """

    pattern: NMPattern
    steps: int
    estimator: str = "smoothed"
    learning_rate: float | None = None
    start: str = "constant"
    initial_logit: float | None = None
    smoothing: float = 0.99
    draws: int | None = None
    minibatch: int = 32
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pattern.m not in SUPPORTED_M:
            raise LearnerError(f"learning: expected groups of {SUPPORTED_M}, found pattern {self.pattern}")
        if self.estimator not in ESTIMATORS:
            raise LearnerError(f"learning: estimator: expected one of {', '.join(ESTIMATORS)}, found {self.estimator}")
        if self.start not in STARTS:
            raise LearnerError(f"learning: start: expected one of {', '.join(STARTS)}, found {self.start}")
        for name in ("steps", "minibatch", "batch"):
            if getattr(self, name) < 1:
                raise LearnerError(f"learning: {name}: expected at least 1, found {getattr(self, name)}")
        check_seed(self.seed)
        used = self.settings()
        least, most = (1, 1) if DEFAULTS[self.estimator].draws == 1 else (2, MAX_GAIN_DRAWS)
        if not least <= used.draws <= most:
            raise LearnerError(f"learning: draws: {self.estimator} compares {least} to {most}, found {used.draws}")
        if not 0 < used.initial_logit < math.inf:  # below 0 the least likely mask would be the initial one
            raise LearnerError(f"learning: initial_logit: expected above 0 and finite, found {used.initial_logit}")
        if not 0 <= self.smoothing < 1 or not used.learning_rate > 0:
            raise LearnerError(
                f"learning: expected 0 <= smoothing < 1 and learning_rate > 0, found {self.smoothing} and "
                f"{used.learning_rate}"
            )

    def settings(self) -> Settings:
        """Learning rate, initial logit and draws, those left open filled in."""
        default = DEFAULTS[self.estimator]
        return Settings(
            learning_rate=default.learning_rate if self.learning_rate is None else self.learning_rate,
            initial_logit=default.initial_logit if self.initial_logit is None else self.initial_logit,
            draws=default.draws if self.draws is None else self.draws,
        )
