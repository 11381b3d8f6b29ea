"""Errors of the learner package.

LearnerError (ValueError)    an input that cannot be used; one sentence: which file, what was expected, what was found
    ModelError               a model folder or its tokenizer
    CalibrationError         a calibration or evaluation text
"""

from __future__ import annotations


class LearnerError(ValueError):
    """An input that cannot be used; the message is one sentence for the user."""


class ModelError(LearnerError):
    """A model folder that is missing, incomplete, or holds nothing to prune."""


class CalibrationError(LearnerError):
    """A calibration or evaluation text that is missing, empty, malformed or too short."""
