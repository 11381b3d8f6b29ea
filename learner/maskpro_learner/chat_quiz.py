"""A quiz in the model's chat format: short questions whose right answers a pattern or a rule recognises.

Perplexity does not show whether a pruned model still answers; this does. Answers are greedy, so a quiz has one result.
An answer counts only if it ends by itself, does not run in a loop, and is right in its first sentence: a small model
that rambles names the right word sooner or later.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from maskpro_learner.chat_corpus import answer, check_chat
from maskpro_learner.errors import LearnerError
from maskpro_learner.writers import ModelWriter

SHIPPED = Path(__file__).with_name("chat_questions.jsonl")
"""40 questions of the project's own; none is among the prompts of :mod:`maskpro_learner.chat_prompts`."""

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")  # noqa: RUF001  (the typographic apostrophe is meant)
_END = re.compile(r"[.!?][\"'”’)*]*$")  # noqa: RUF001
_FIRST_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n")
_SENTENCE_DISTINCT = 0.5  # plain English of 60 words has about 0.75 distinct ones
_LOOP_DISTINCT = 0.35  # below any prose, even a small model's that says everything twice


@dataclass(frozen=True)
class SentenceRule:
    """What a requested sentence must be: about its topic, of a sensible length, ended, and made of words."""

    topic: re.Pattern[str]
    min_words: int
    max_words: int

    def accepts(self, text: str) -> bool:
        """True for an answer that obeys it."""
        words = _WORD.findall(text)
        real = sum(len(word) > 1 or word in "aAI0123456789" for word in words)
        return (
            self.min_words <= len(words) <= self.max_words
            and _END.search(text) is not None
            and self.topic.search(text) is not None
            and real > len(words) / 2
            and _distinct(words) >= _SENTENCE_DISTINCT
        )


@dataclass(frozen=True)
class Question:
    """One question: right if the rule accepts the answer, or else if a pattern is found in its first sentence."""

    question: str
    kind: str
    accept: tuple[re.Pattern[str], ...] = ()
    rule: SentenceRule | None = None

    def accepts(self, text: str | None) -> bool:
        """Whether an answer is right; None is one that did not end."""
        if not text or degenerate(text) or self.question.casefold() in text.casefold():  # an echo is no answer
            return False
        if self.rule is not None:
            return self.rule.accepts(text)
        first = _FIRST_SENTENCE.split(text.strip(), maxsplit=1)[0]
        return any(pattern.search(first) for pattern in self.accept)


@dataclass(frozen=True)
class QuizAnswer:
    """A question, what the model said (None: it did not end in time), and whether that is right."""

    question: Question
    text: str | None
    right: bool


@dataclass(frozen=True)
class QuizResult:
    """All answers, in the order of the questions."""

    answers: tuple[QuizAnswer, ...]

    @property
    def right(self) -> int:
        """Right answers."""
        return sum(answer.right for answer in self.answers)

    @property
    def total(self) -> int:
        """Questions."""
        return len(self.answers)

    @property
    def kinds(self) -> dict[str, tuple[int, int]]:
        """Kind to its right answers and its questions, in the order of the file."""
        total = Counter(answer.question.kind for answer in self.answers)
        right = Counter(answer.question.kind for answer in self.answers if answer.right)
        return {kind: (right[kind], count) for kind, count in total.items()}


def degenerate(text: str) -> bool:
    """Whether a text runs in a loop: few of its words differ. Up to six words may be anything."""
    words = _WORD.findall(text)
    # Long texts repeat their small words, so look at stretches.
    stretches = [words[start : start + 60] for start in range(0, max(1, len(words)), 60)]
    return any(len(stretch) > 6 and _distinct(stretch) < _LOOP_DISTINCT for stretch in stretches)


def _distinct(words: Sequence[str]) -> float:
    return len({word.lower() for word in words}) / max(1, len(words))


def read_questions(path: Path = SHIPPED) -> list[Question]:
    """Reads a JSONL file of questions.

    A row is ``{"question", "kind", "accept": [regular expressions]}``, or instead of accept ``"rule": "sentence"``
    with ``"topic"`` (a regular expression), ``"min_words"`` and ``"max_words"``. Case never matters, and a pattern
    must match whole words.

    Raises:
        LearnerError: missing, empty or malformed; names the file and line, expected and found.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise LearnerError(f"{path}: no such file of questions") from error
    except (OSError, UnicodeDecodeError) as error:
        raise LearnerError(f"{path}: expected a UTF-8 file of questions: {error}") from error
    questions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            questions.append(_question(json.loads(line)))
        except (ValueError, re.error) as error:
            raise LearnerError(f"{path}: line {number}: {error}") from error
    if not questions:
        raise LearnerError(f"{path}: expected questions, found none")
    return questions


def _question(row: Any) -> Question:
    match row:
        case {
            "question": str(question), "kind": str(kind), "rule": "sentence", "topic": str(topic),
            "min_words": int(least), "max_words": int(most),
        }:  # fmt: skip
            return Question(question, kind, rule=SentenceRule(_words(topic), least, most))
        case {"question": str(question), "kind": str(kind), "accept": [_, *_] as accept} if "rule" not in row and all(
            isinstance(pattern, str) for pattern in accept
        ):
            return Question(question, kind, tuple(map(_words, accept)))
    found = f"the fields {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
    raise ValueError(
        f"expected question, kind and accept (regular expressions), or instead of accept rule: sentence, topic, "
        f"min_words and max_words, found {found}"
    )


def _words(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{pattern})(?!\w)", re.IGNORECASE)


def quiz(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    batch: int = 20,
    max_new_tokens: int = 96,
    advance: Callable[[int], None] = lambda count: None,
) -> QuizResult:
    """Asks every question in the model's chat format, and marks the greedy answers.

    Args:
        model: a chat model.
        tokenizer: its tokenizer, with a chat template.
        questions: from :func:`read_questions`.
        batch: questions asked at once; speed and memory only.
        max_new_tokens: the most an answer may take; one that does not end in time is wrong.
        advance: called with the number of questions answered.

    Raises:
        ModelError: the tokenizer has no chat template or no end-of-sequence token.
    """
    check_chat(tokenizer)
    writer = ModelWriter(model, tokenizer)
    marked: list[QuizAnswer] = []
    for start in range(0, len(questions), batch):
        part = questions[start : start + batch]
        texts = answer(writer, [each.question for each in part], max_new_tokens=max_new_tokens)
        marked += [QuizAnswer(each, text, each.accepts(text)) for each, text in zip(part, texts, strict=True)]
        advance(len(part))
    return QuizResult(tuple(marked))
