"""The settings of a learning run."""

from __future__ import annotations

from dataclasses import dataclass

from maskpro_kernels import NMPattern
from maskpro_kernels.policy_step import SUPPORTED_M
from maskpro_learner.errors import LearnerError
from maskpro_learner.estimator import ESTIMATORS


@dataclass(frozen=True)
class LearnConfig:
    """What :func:`maskpro_learner.learn_masks` does; the defaults are the paper's (MaskPro, section 6).

    Attributes:
        pattern: N of every M weights are kept; M is 4, 8 or 16.
        steps: updates of the logits.
        estimator: a name in :data:`maskpro_learner.estimator.ESTIMATORS`.
        learning_rate: eta.
        initial_logit: logits of the initial mask's weights; the others' are 0.
        smoothing: alpha of the moving-average tracker.
        masks_per_batch: masks tried on one minibatch (leave-one-out only; the others try one).
        minibatch: blocks of calibration text in a step.
        batch: of those, how many run through the model at once; memory only.
        seed: of the draws and of the order of the text. A run is a function of it.
    """

    pattern: NMPattern
    steps: int
    estimator: str = "smoothed"
    learning_rate: float = 50.0
    initial_logit: float = 10.0
    smoothing: float = 0.99
    masks_per_batch: int = 2
    minibatch: int = 32
    batch: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pattern.m not in SUPPORTED_M:
            raise LearnerError(f"learning: expected groups of {SUPPORTED_M}, found pattern {self.pattern}")
        if self.estimator not in ESTIMATORS:
            raise LearnerError(f"learning: estimator: expected one of {', '.join(ESTIMATORS)}, found {self.estimator}")
        for name in ("steps", "masks_per_batch", "minibatch", "batch"):
            if getattr(self, name) < 1:
                raise LearnerError(f"learning: {name}: expected at least 1, found {getattr(self, name)}")
        if self.estimator == "leave-one-out" and self.masks_per_batch < 2:
            raise LearnerError(
                "learning: leave-one-out compares masks: expected masks_per_batch of at least 2, found 1"
            )
        if not 0 <= self.smoothing < 1 or not self.learning_rate > 0:
            raise LearnerError(
                f"learning: expected 0 <= smoothing < 1 and learning_rate > 0, found {self.smoothing} and "
                f"{self.learning_rate}"
            )
