"""Workloads follow from their seed."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import pytest
from workloads import MIXED, SHAPES, WORKLOADS, arrivals, make_request


@pytest.mark.parametrize("workload", WORKLOADS)
def test_requests_are_reproducible_and_differ(workload):
    requests = [make_request(workload, 7, index) for index in range(20)]
    assert requests == [make_request(workload, 7, index) for index in reversed(range(20))][::-1]
    assert len({request.prompt for request in requests}) == 20
    assert {request.prompt for request in requests}.isdisjoint(make_request(workload, 8, i).prompt for i in range(20))


def test_another_process_asks_the_same(repository):
    code = "from workloads import make_request; print(make_request('mixed', 3, 5))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=repository / "loadtests", capture_output=True, text=True, check=True,
        env={"PYTHONHASHSEED": "123"},
    )  # fmt: skip
    assert run.stdout.strip() == str(make_request("mixed", 3, 5))


@pytest.mark.parametrize(("workload", "shape"), SHAPES.items())
def test_lengths_are_those_of_the_shape(workload, shape):
    requests = [make_request(workload, 0, index) for index in range(50)]
    answers = [request.max_tokens for request in requests]
    assert shape.answer_tokens[0] <= min(answers) < max(answers) <= shape.answer_tokens[1]
    longest_sentence = 40
    for request in requests:
        words = len(request.prompt.split())
        assert shape.prompt_words[0] <= words <= shape.prompt_words[1] + longest_sentence
        assert (len(request.system.split()) >= shape.prefix_words) if shape.prefix_words else not request.system


def test_shared_prefixes_are_shared_within_a_seed_only():
    of_seed = [{make_request("shared-prefix", seed, index).system for index in range(5)} for seed in (1, 2)]
    assert [len(prefixes) for prefixes in of_seed] == [1, 1]
    assert of_seed[0] != of_seed[1]


def test_mixed_has_its_shares():
    shapes = [make_request("mixed", 0, index).shape for index in range(2000)]
    for shape, share in MIXED.items():
        deviation = (share * (1 - share) / 2000) ** 0.5
        assert abs(shapes.count(shape) / 2000 - share) < 5 * deviation


def test_aborts_are_a_seeded_share_and_change_nothing_else():
    plain = [make_request("chat", 0, index) for index in range(1000)]
    some = [make_request("chat", 0, index, abort_share=0.3) for index in range(1000)]
    aborted = [request for request in some if request.abort_after is not None]
    assert abs(len(aborted) / 1000 - 0.3) < 5 * (0.3 * 0.7 / 1000) ** 0.5
    assert all(0 < request.abort_after < request.max_tokens for request in aborted)
    assert plain == [replace(request, abort_after=None) for request in some]


def test_arrivals_are_a_poisson_process():
    rate, count = 5.0, 5000
    times = list(itertools.islice(arrivals(rate, 0), count))
    gaps = [b - a for a, b in itertools.pairwise([0.0, *times])]
    assert times == list(itertools.islice(arrivals(rate, 0), count))
    assert times[:9] != list(itertools.islice(arrivals(rate, 0, source=1), 9))
    assert min(gaps) >= 0
    mean = sum(gaps) / count
    assert abs(mean - 1 / rate) < 5 / rate / count**0.5
    variance = sum((gap - mean) ** 2 for gap in gaps) / count  # of an exponential: the mean squared
    assert abs(variance * rate**2 - 1) < 5 * (8 / count) ** 0.5


def test_payloads_are_the_protocol():
    chat = make_request("shared-prefix", 0, 0)
    body = chat.payload("m")
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}
    assert (body["ignore_eos"], body["max_tokens"]) == (True, chat.max_tokens)
    assert "ignore_eos" not in chat.payload("m", fixed_length=False)
    completion = make_request("long-prompt", 0, 0).payload("m")
    assert completion["prompt"]
    assert "messages" not in completion


def test_an_unknown_workload_is_named():
    with pytest.raises(ValueError, match=r"workload 'chatty': expected one of chat, .*mixed"):
        make_request("chatty", 0, 0)
