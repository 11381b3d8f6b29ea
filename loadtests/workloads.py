"""Seeded workloads: what is asked, how long the answers are, when requests arrive.

A request is a function of (workload, seed, index) alone, and so is an arrival: whatever is measured twice with
one seed is asked the same, in the same order, however many users share the work.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import prose

Api = Literal["chat", "completions"]
PATHS: dict[Api, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


@dataclass(frozen=True)
class Shape:
    """One kind of request.

    Attributes:
        api: which of the two endpoints is asked.
        prompt_words: least and most words of text before the question; 0 for the question alone.
        answer_tokens: least and most tokens of the answer, uniform between.
        prefix_words: words of a system prompt that all requests of one seed share.
    """

    api: Api
    prompt_words: tuple[int, int]
    answer_tokens: tuple[int, int]
    prefix_words: int = 0


SHAPES = {
    "chat": Shape("chat", (0, 0), (48, 80)),
    "completion": Shape("completions", (10, 40), (48, 80)),
    "long-prompt": Shape("completions", (350, 450), (16, 32)),
    "long-answer": Shape("chat", (0, 0), (192, 256)),
    "shared-prefix": Shape("chat", (0, 0), (48, 80), prefix_words=300),
}
MIXED = {"chat": 0.5, "long-prompt": 0.2, "shared-prefix": 0.2, "long-answer": 0.1}
"""Shares of the shapes in the workload ``mixed``."""

WORKLOADS = (*SHAPES, "mixed")


@dataclass(frozen=True)
class Request:
    """One request as a client would send it; ``abort_after`` is how many chunks it reads before it hangs up."""

    index: int
    shape: str
    api: Api
    system: str
    prompt: str
    max_tokens: int
    abort_after: int | None = None

    def payload(self, model: str, *, fixed_length: bool = True) -> dict[str, Any]:
        """The JSON body: streamed, greedy, with usage at the end.

        Args:
            model: name of the served model.
            fixed_length: answers have exactly ``max_tokens`` tokens (``ignore_eos``, which vLLM and SGLang know);
                False leaves the end to the model, for endpoints that refuse the field.
        """
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if fixed_length:
            body["ignore_eos"] = True
        if self.api == "completions":
            return body | {"prompt": f"{self.system}\n\n{self.prompt}" if self.system else self.prompt}
        system = [{"role": "system", "content": self.system}] if self.system else []
        return body | {"messages": [*system, {"role": "user", "content": self.prompt}]}


def make_request(workload: str, seed: int, index: int, *, abort_share: float = 0.0) -> Request:
    """The request of that index.

    Args:
        workload: one of :data:`WORKLOADS`.
        seed: of the whole run.
        index: position in the run, from 0.
        abort_share: share of requests whose client hangs up halfway through the answer.

    Raises:
        ValueError: no such workload.
    """
    rng = random.Random(f"{workload}/{seed}/{index}")  # of a string: hashed by SHA-512, equal in every process
    if workload == "mixed":
        shape_name = rng.choices(list(MIXED), weights=list(MIXED.values()))[0]
    elif workload in SHAPES:
        shape_name = workload
    else:
        raise ValueError(f"workload {workload!r}: expected one of {', '.join(WORKLOADS)}")
    shape = SHAPES[shape_name]
    text = prose.paragraph(rng, rng.randint(*shape.prompt_words))
    max_tokens = rng.randint(*shape.answer_tokens)
    return Request(
        index=index,
        shape=shape_name,
        api=shape.api,
        system=prose.paragraph(random.Random(f"prefix/{seed}"), shape.prefix_words),
        prompt=f"{text} {prose.question(rng)}".strip(),
        max_tokens=max_tokens,
        abort_after=max_tokens // 2 if rng.random() < abort_share else None,
    )


def arrivals(rate: float, seed: int, source: int = 0) -> Iterator[float]:
    """Arrival times of a Poisson process in seconds from its start, without end.

    Args:
        rate: mean arrivals per second, above 0.
        seed: of the whole run.
        source: several independent sources together are a Poisson process again, of the summed rate.
    """
    rng = random.Random(f"arrivals/{seed}/{source}")
    now = 0.0
    while True:
        now += rng.expovariate(rate)
        yield now
