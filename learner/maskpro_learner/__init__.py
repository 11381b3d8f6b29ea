"""Learns (N:M) masks for language models: calibration, one-shot masks, MaskPro, evaluation.

>>> tokens = calibration_blocks([Path("c4.txt")], tokenizer, samples=128, length=512, seed=0)
>>> result = initial_masks(model, NMPattern.parse("2:4"), "wanda", tokens=tokens)
"""

from maskpro_learner.calibration import calibration_blocks
from maskpro_learner.config import LearnConfig
from maskpro_learner.errors import CalibrationError, LearnerError, ModelError
from maskpro_learner.evaluate import Perplexity, chat_perplexity, text_perplexity
from maskpro_learner.initial_masks import METHODS, InitialMasks, initial_masks
from maskpro_learner.layers import apply_masks, select_layers
from maskpro_learner.trainer import Step, learn_masks

__all__ = [
    "METHODS",
    "CalibrationError",
    "InitialMasks",
    "LearnConfig",
    "LearnerError",
    "ModelError",
    "Perplexity",
    "Step",
    "apply_masks",
    "calibration_blocks",
    "chat_perplexity",
    "initial_masks",
    "learn_masks",
    "select_layers",
    "text_perplexity",
]
