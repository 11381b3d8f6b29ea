"""Varied user prompts, made by code: each family is templates times words, so thousands of distinct ones exist.

They only have to be *varied*: the model under study writes the answers itself (:mod:`maskpro_learner.chat_corpus`),
so a mask is learned on the text the model will meet and produce as a chat assistant.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

# fmt: off
_COUNTRIES = [
    "France", "Germany", "Italy", "Spain", "Portugal", "Greece", "Egypt", "Kenya", "Nigeria", "Morocco", "India",
    "Japan", "China", "Thailand", "Vietnam", "Indonesia", "Australia", "Canada", "Mexico", "Brazil", "Argentina",
    "Chile", "Peru", "Cuba", "Norway", "Sweden", "Finland", "Denmark", "Poland", "Austria", "Hungary", "Ireland",
    "Iceland", "Turkey", "Russia", "Ukraine", "Belgium", "Switzerland", "Nepal", "Iran",
]
_COLOURED = [
    "the sky", "grass", "a ripe banana", "snow", "coal", "a ripe tomato", "an orange", "the sea", "a lemon", "milk",
    "a carrot", "chocolate", "blood", "a strawberry", "an emerald", "a ruby", "the sun", "a cloud", "a flamingo",
    "an aubergine",
]
_OPPOSITES = [
    "hot", "big", "fast", "happy", "light", "up", "early", "old", "open", "rich", "loud", "strong", "full", "hard",
    "wet", "day", "love", "win", "near", "clean", "safe", "brave", "true", "buy", "begin", "arrive", "remember",
    "above", "inside", "thick",
]
_CONCEPTS = [
    "gravity", "photosynthesis", "a rainbow", "inflation", "democracy", "electricity", "an atom", "evolution",
    "a volcano", "the internet", "a computer program", "a black hole", "recycling", "the water cycle", "a vaccine",
    "friendship", "an earthquake", "a battery", "sound", "a budget", "a glacier", "DNA", "a library", "a magnet",
    "the moon", "climate change", "a neural network", "honesty", "the heart", "a prime number",
]
_SENTENCES = [
    "Send me the report now.", "The dog run fast to the park.", "I can't come to the meeting.",
    "She don't like apples.", "We was late because of the rain.", "Give me your phone number.", "This food is bad.",
    "He goed to school yesterday.", "You forgot to pay the bill.", "The movie was boring and too long.",
    "I want a refund.", "Tell me when you are done.",
]
_STYLES = [
    "Rewrite this sentence to be more polite", "Correct the grammar of this sentence",
    "Rewrite this sentence in formal English", "Make this sentence shorter", "Say this in a friendly way",
]
_LISTED = [
    "fruits", "colours", "animals that live in the sea", "countries in Europe", "musical instruments",
    "healthy breakfast ideas", "sports played with a ball", "planets of the solar system",
    "things to pack for a trip", "ways to save money", "vegetables", "jobs in a hospital", "kinds of trees",
    "board games", "ways to save energy at home", "famous scientists", "hobbies for a rainy day", "birds",
    "programming languages", "uses for a paper clip",
]
_HEROES = [
    "a fox", "a robot", "a girl", "an old sailor", "a lost kitten", "a brave mouse", "a wizard", "a lonely dragon",
    "a baker", "an owl",
]
_PLOTS = [
    "who finds a hidden key", "who is afraid of the dark", "who learns to share", "who wants to fly",
    "who gets lost in the forest", "who makes a new friend", "who visits the moon", "who helps a stranger",
    "who discovers a secret garden", "who loses a hat",
]
_DEFINED = [
    "generous", "curious", "fragile", "ancient", "reluctant", "enormous", "transparent", "temporary", "ambitious",
    "grateful", "stubborn", "frequent", "abundant", "hesitate", "brilliant", "obvious", "cautious", "sincere",
    "remote", "vivid",
]
_WORDS = [
    "water", "bread", "house", "friend", "thank you", "good morning", "dog", "cat", "book", "school", "red", "sun",
    "love", "hello", "please",
]
_LANGUAGES = [
    "French", "Spanish", "German", "Italian", "Portuguese",
]
_TASKS = [
    "boil an egg", "tie my shoes", "make a cup of tea", "write a thank-you note", "learn to swim", "plant a tree",
    "clean a window", "prepare for a job interview", "sleep better", "bake bread", "change a light bulb",
    "learn a new language", "make new friends", "save money every month", "wash a wool sweater", "start running",
    "read more books", "calm down when I am angry", "remember names", "cook rice",
]
_PAIRS = [
    "a cat and a dog", "tea and coffee", "a lake and a river", "weather and climate", "a city and a village",
    "bacteria and viruses", "a butterfly and a moth", "speed and velocity", "a novel and a poem",
    "the sun and the moon", "wood and metal", "a planet and a star", "rain and snow", "a bicycle and a motorcycle",
    "saving and investing", "a frog and a toad",
]
_FACTS = [
    "Who wrote Romeo and Juliet?", "How many days are in a leap year?", "How many legs does a spider have?",
    "What is the largest ocean on Earth?", "What is the boiling point of water?", "Who painted the Mona Lisa?",
    "What is the tallest mountain in the world?", "How many continents are there?", "What gas do plants absorb?",
    "Which planet is closest to the sun?", "What language is spoken in Brazil?", "How many minutes are in an hour?",
    "What is the freezing point of water?", "What do bees make?", "What is the largest animal on Earth?",
    "Which organ pumps blood through the body?", "How many sides does a triangle have?",
    "Who was the first person on the moon?", "What is H2O?", "In which season do leaves fall?",
    "What is the longest river in Africa?", "Which metal is liquid at room temperature?",
    "How many months have 31 days?", "What is the currency of Japan?", "Who discovered penicillin?",
]
_FUNCTIONS = [
    "adds two numbers", "reverses a string", "returns the largest number in a list",
    "checks whether a number is even", "counts the vowels in a word", "computes the factorial of a number",
    "returns the first n Fibonacci numbers", "removes duplicates from a list",
    "checks whether a word is a palindrome", "sums the digits of a number",
]
_GREETINGS = [
    "Hello!", "Hi, how are you today?", "Who are you?", "What is your name?", "What can you do?", "Good morning!",
    "Can you help me?", "Tell me something interesting.", "Thank you for your help.", "Who made you?",
    "I feel sad today.", "I am bored.", "Tell me a joke.",
]
_POEMS = [
    "autumn", "the sea", "a sleeping cat", "rain", "the night sky", "an old tree", "a new day", "winter", "music",
    "a train",
]
_RECIPIENTS = [
    "my boss", "a colleague", "my teacher", "a customer", "my neighbour", "a friend",
]
_MATTERS = [
    "asking for a day off", "thanking them for their help", "apologising for being late", "inviting them to dinner",
    "asking for a meeting on Monday", "telling them that I am moving",
]
_PASSAGES = [
    (
        "Bees visit flowers to collect nectar. While doing so they carry pollen from plant to plant, which "
        "helps plants make seeds and fruit."
    ),
    (
        "The town built a new bridge last year. It made the trip to work shorter for many people, but it also"
        " brought more traffic to the old centre."
    ),
    (
        "Anna bought three apples and two pears at the market. She gave one apple to her brother and used the"
        " rest to make a pie."
    ),
    "Glass can be recycled again and again without losing quality. Recycling it saves energy and raw materials.",
    (
        "The old library is open from Monday to Friday. Visitors may borrow up to five books at a time, and "
        "late books cost ten cents a day."
    ),
]
_REQUESTS = [
    "Summarize this in one sentence", "What is the main idea of this text", "Give this text a title",
]
# fmt: on

_CAPITALS = ("What is the capital of {}?", "Which city is the capital of {}?", "Name the capital city of {}.")
_SUMS = ("What is {} plus {}?", "What is {} + {}?", "Calculate {} + {}.", "Add {} and {}.")
_TIMES = ("What is {} times {}?", "What is {} minus {}?")
_EXPLAIN = ("Explain {} in one sentence.", "What is {}?", "Explain {} to a child.", "In two sentences, what is {}?")
_HOW_TO = ("How do I {}?", "Give me one tip to {}.", "Explain step by step how to {}.")


def _fill(templates: Sequence[str], *choices: Sequence[str]) -> list[str]:
    return [template.format(*words) for template in templates for words in itertools.product(*choices)]


def prompt_families() -> dict[str, list[str]]:
    """All prompts, by family; a list per family, without duplicates, always in the same order."""
    numbers = [str(number) for number in (2, 3, 4, 5, 7, 8, 9, 10, 12, 15, 20, 25, 50, 100)]
    return {
        "capital": _fill(_CAPITALS, _COUNTRIES),
        "sum": _fill(_SUMS, numbers, numbers),
        "product": _fill(_TIMES, numbers[6:], numbers[:6]),
        "colour": _fill(("What color is {}?", "What is the color of {}?"), _COLOURED),
        "opposite": _fill(('What is the opposite of "{}"?', "What is the opposite of {}?"), _OPPOSITES),
        "explain": _fill(_EXPLAIN, _CONCEPTS),
        "rewrite": _fill(("{}: {}",), _STYLES, _SENTENCES),
        "list": _fill(("List {} {}.", "Name {} {}."), ["three", "five"], _LISTED),
        "story": _fill(("Write a short story about {} {}.", "Tell me a story about {} {}."), _HEROES, _PLOTS),
        "define": _fill(('What does the word "{}" mean?', 'Use the word "{}" in a sentence.'), _DEFINED),
        "translate": _fill(('How do you say "{}" in {}?',), _WORDS, _LANGUAGES),
        "how-to": _fill(_HOW_TO, _TASKS),
        "difference": _fill(("What is the difference between {}?", "How do {} differ?"), _PAIRS),
        "fact": list(_FACTS),
        "code": _fill(("Write a Python function that {}.",), _FUNCTIONS),
        "greeting": list(_GREETINGS),
        "poem": _fill(("Write a short poem about {}.", "Write two lines about {}."), _POEMS),
        "email": _fill(("Write a short email to {} {}.",), _RECIPIENTS, _MATTERS),
        "read": _fill(("{}:\n\n{}",), _REQUESTS, _PASSAGES),
    }


def short_families() -> dict[str, list[str]]:
    """Short questions, which one fact or sentence answers, by family; without duplicates, always in the same order.

    They are for what pruning forgets first: a fact is one token of an answer. ``short_questions.json`` has, for each
    family, templates and the words that fill them. Some are among :func:`prompt_families` as well. What
    :mod:`maskpro_learner.chat_quiz` asks is not among them, nor in other words; questions of the same kinds are.
    """
    families = json.loads(Path(__file__).with_name("short_questions.json").read_text(encoding="utf-8"))
    return {
        name: list(dict.fromkeys(prompt for group in groups for prompt in _fill(group["ask"], *group["words"])))
        for name, groups in families.items()
    }


def seed_prompts(count: int, seed: int, by_family: Mapping[str, Sequence[str]]) -> list[str]:
    """Draws distinct prompts, as evenly over the families as their sizes allow, in random order.

    Any prefix is varied too, so a corpus may be cut into parts.

    Args:
        count: prompts to draw.
        seed: of the draw.
        by_family: the prompts there are.

    Raises:
        ValueError: ``count`` is below 1, or above the number of prompts there are.
    """
    generator = random.Random(seed)
    families = [list(family) for family in by_family.values()]
    total = sum(len(family) for family in families)
    if not 1 <= count <= total:
        raise ValueError(f"prompts: expected between 1 and {total}, found {count}")
    for family in families:
        generator.shuffle(family)
    chosen: list[str] = []
    while len(chosen) < count:
        one_each = [family.pop() for family in families if family]
        generator.shuffle(one_each)
        chosen += one_each
    return chosen[:count]
