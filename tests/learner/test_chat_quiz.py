"""The quiz: how answers are marked, and that its questions are none the mask was learned on."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from maskpro_learner import LearnerError, ModelError
from maskpro_learner.chat_corpus import answer
from maskpro_learner.chat_prompts import prompt_families, short_families
from maskpro_learner.chat_quiz import Question, degenerate, quiz, read_questions
from maskpro_learner.writers import ModelWriter


@pytest.fixture(scope="module")
def shipped() -> dict[str, Question]:
    return {question.question: question for question in read_questions()}


def test_forty_questions_and_none_of_them_a_training_prompt(shipped: dict[str, Question]) -> None:
    assert len(shipped) == 40
    kinds = Counter(question.kind for question in shipped.values())
    assert kinds == {"capital": 8, "sum": 6, "opposite": 8, "colour": 3, "fact": 9, "sentence": 6}
    families = [*prompt_families().items(), *short_families().items()]
    prompts = [prompt.casefold() for _, family in families for prompt in family]
    assert [question for question in shipped if question.casefold() in prompts] == []
    # Nor are they asked in other words.
    subjects = {
        "capital": "croatia|zagreb|romania|bucharest|netherlands|amsterdam|south korea|seoul|philippines|manila|"
        "pakistan|islamabad|england|london|saudi|riyadh",
        "sum": r"(1 \S+ [126]|[26] \S+ 1|6 (\+|plus) 6|(11|30) \S+ (11|30)|2 (x|times) (1|6|11|30)|"
        r"double (1|6|11|30)|half of (2|12|22|60))\W*$",
        "opposite": 'opposite of "?(cold|small|left|down|tall|north|yes|top)|direction of (south|north)',
        "colour": "raven|swan|leaf (of|is)|leaves of",
        "fact": "in a week|hours are|seconds are|fingers|a dog have|first month|sun rise|its light|we live on",
        "sentence": "(about|describe) (the )?(rain|dogs|summer|a mountain|mountains|apples|elephants)",
    }
    asked = [prompt.casefold() for family in short_families().values() for prompt in family]
    for kind, pattern in subjects.items():
        assert [prompt for prompt in asked if re.search(rf"\b({pattern})(\b|$)", prompt)] == [], kind


# What SmolLM2-135M-Instruct said, greedily, and some that it did not.
@pytest.mark.parametrize(
    ("question", "text", "right"),
    [
        ("What is the capital of Croatia?", "The capital of Croatia is Zagreb.", True),
        ("What is the capital of Croatia?", "the capital is ZAGREB", True),
        ("What is the capital of Croatia?", "Zagrebia.", False),
        ("What is the capital of Croatia?", "It is Split. Others are Zagreb, Rijeka and Osijek.", False),
        ("What is 1 + 1?", "1 + 1 = 2 in mathematics.", True),
        ("What is 1 + 1?", "The answer is two.", True),
        ("What is 1 + 1?", "1 + 1 = 12", False),
        ("What is 30 + 30?", "30 + 30 = 30, which is the sum of 30.", False),
        ("What is 11 + 11?", "11 + 11 = 22, which is the sum of 11 and 11.", True),
        ('What is the opposite of "left"?', 'The opposite of "left" is "right".', True),
        ('What is the opposite of "left"?', "Brightness.", False),
        ("What star gives the Earth its light and heat?", "The star is called the Sun.", True),
        (
            "Which planet do we live on?",
            "The planet we live on is called Kepler-41B. It's a terrestrial planet, similar to Earth, but with a "
            "slightly different orbit.",
            False,
        ),
        ("How many legs does a dog have?", "The answer to this classic question is 4. A dog has four legs.", True),
        (
            "What color are the leaves of a tree in spring?",
            "The leaves of a tree in spring are typically a vibrant shade of green, often with a mix of shades of blue "
            "and green. They are typically a mix of leaves that are in the process of growing, with a few leaves that "
            "are still in the process of growing.",
            True,
        ),
        ("What color is a raven?", "Black black black black black black black black.", False),
        ("What color is a raven?", "Black", True),
        ("What color is a raven?", "", False),
        ("What color is a raven?", None, False),
        (
            "Write one sentence about the rain.",
            "The rain is a natural phenomenon that occurs when water from the Earth's oceans and atmosphere falls onto "
            "the ground, creating a heavy and unpredictable precipitation.",
            True,
        ),
        ("Write one sentence about the rain.", 'He said: "Rain makes the old stones shine."', True),
        ("Write one sentence about the rain.", "S.S.S.S.", False),
        ("Write one sentence about the rain.", "S S rain S S S.", False),
        ("Write one sentence about the rain.", "B C D rain E.", False),
        ("Write one sentence about the rain.", "Rain rain rain rain rain.", False),
        ("Write one sentence about the rain.", "The rain falls on the", False),
        ("Write one sentence about the rain.", "The rain falls.", False),
        ("Write one sentence about the rain.", "The sun shines on the green hills.", False),
        ("Write one sentence about the rain.", "Trains drain the brain of the strained.", False),
        ("Write one sentence about the rain.", "Write one sentence about the rain.", False),
        ("Write one sentence about the rain.", "It may rain on some of the days. " * 9, False),
    ],
)
def test_marking(shipped: dict[str, Question], question: str, text: str | None, right: bool) -> None:
    assert shipped[question].accepts(text) == right


def test_loops_are_found_anywhere_in_an_answer() -> None:
    prose = " ".join(f"word{i}" for i in range(60))
    assert not degenerate(prose)
    assert degenerate(f"{prose} {'and so on ' * 20}")
    assert not degenerate("no no no no no no")


def test_a_quiz_is_the_marked_greedy_answers(
    tiny_model: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = tiny_model(seed=1)  # one that ends some of its answers
    prompts = ["the cat", "red bird fly", "rain", "on old stones", "a mat"]
    texts = answer(ModelWriter(model, tokenizer), prompts, max_new_tokens=60)
    assert texts[0]
    assert texts[3]
    assert None in texts
    path = tmp_path / "questions.jsonl"
    rows = [{"question": prompt, "kind": "said", "accept": [f"({texts[0]})"]} for prompt in prompts[:3]]
    rows += [{"question": prompt, "kind": "unsaid", "accept": ["nothing"]} for prompt in prompts[3:]]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    advanced: list[int] = []
    result = quiz(model, tokenizer, read_questions(path), batch=2, max_new_tokens=60, advance=advanced.append)
    assert [each.text for each in result.answers] == texts
    assert (result.total, advanced) == (5, [2, 2, 1])
    assert result.answers[0].right
    assert result.right == sum(each.right for each in result.answers)
    assert result.kinds == {"said": (result.right, 3), "unsaid": (0, 2)}


def test_no_chat_model_no_quiz(
    tiny_model: Callable[[], PreTrainedModel], tokenizer: PreTrainedTokenizerFast, shipped: dict[str, Question]
) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        quiz(tiny_model(), tokenizer, list(shipped.values()))
    tokenizer.chat_template = "x"
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        quiz(tiny_model(), tokenizer, list(shipped.values()))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "expected questions, found none"),
        ("{", "line 1: Expecting property name"),
        ("[1]", "line 1: expected question, kind and accept .*found a list"),
        ('{"question": "a", "kind": "b"}', r"line 1: .*found the fields \['kind', 'question'\]"),
        ('{"question": "a", "kind": "b", "accept": []}', "line 1: expected question, kind and accept"),
        ('\n{"question": "a", "kind": "b", "accept": ["("]}', "line 2: missing \\), unterminated"),
        ('{"question": "a", "kind": "b", "accept": ["c"], "rule": "poem"}', "line 1: expected question"),
        ('{"question": "a", "kind": "b", "rule": "sentence", "topic": "c"}', "min_words and max_words, found"),
    ],
)
def test_bad_questions_are_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(content)
    with pytest.raises(LearnerError, match=message) as raised:
        read_questions(path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)
    with pytest.raises(LearnerError, match="no such file of questions"):
        read_questions(tmp_path / "absent.jsonl")
