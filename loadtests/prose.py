"""English-looking text of a wanted length, made from a random number generator."""

from __future__ import annotations

import random

_SUBJECTS = (
    "the harbour master", "an old engineer", "my neighbour", "the night train", "a careful gardener",
    "the committee", "every student", "the winter storm", "a small bakery", "the lighthouse keeper",
    "our new colleague", "the orchestra", "a patient teacher", "the mountain village", "the research ship",
    "a young carpenter",
)  # fmt: skip
_VERBS = (
    "repaired", "described", "followed", "measured", "painted", "forgot", "discovered", "carried", "questioned",
    "organised", "defended", "translated", "collected", "abandoned", "improved", "remembered",
)  # fmt: skip
_OBJECTS = (
    "the broken clock", "a map of the coast", "seven wooden boxes", "the first draft", "an unusual recipe",
    "the northern bridge", "a letter from the archive", "the quiet machine", "two silver keys", "the garden wall",
    "a list of questions", "the long staircase", "an empty notebook", "the wool market", "a theory of tides",
    "the last harvest",
)  # fmt: skip
_ENDINGS = (
    "before the rain came", "without telling anyone", "for the third time", "because nobody else would",
    "in the spring of that year", "while the town slept", "as carefully as possible", "and never spoke of it again",
    "with borrowed tools", "on a Sunday morning", "after a long discussion", "despite the cold",
)  # fmt: skip
_QUESTIONS = (
    "Why do you think {}?", "Explain in plain words how it happened that {}.", "Write a short story in which {}.",
    "What could follow from the fact that {}?", "Give three reasons why {}.", "Summarise for a newspaper: {}.",
)  # fmt: skip


def clause(rng: random.Random) -> str:
    """One clause of eight to twelve words, without a full stop."""
    return " ".join((rng.choice(_SUBJECTS), rng.choice(_VERBS), rng.choice(_OBJECTS), rng.choice(_ENDINGS)))


def question(rng: random.Random) -> str:
    """One question or task of ten to twenty words."""
    return rng.choice(_QUESTIONS).format(clause(rng))


def paragraph(rng: random.Random, words: int) -> str:
    """Whole sentences, of at least so many words in all."""
    sentences: list[str] = []
    count = 0
    while count < words:
        text = clause(rng)
        count += len(text.split())
        sentences.append(text[0].upper() + text[1:] + ".")
    return " ".join(sentences)
