"""One run's clock and lateness, with a client that answers as it is told."""

from __future__ import annotations

import statistics
import time

import gevent
import pytest
from load_run import LoadRun
from load_settings import LoadSettings
from records import Record
from workloads import arrivals

ANSWER_S = 0.05


class Client:
    """Answers after ANSWER_S, in which nothing else runs (``blocks``) or everything does; some requests at once."""

    def __init__(self, blocks: bool, at_once: range = range(0)) -> None:
        self._wait = time.sleep if blocks else gevent.sleep
        self._at_once = at_once
        self.asked: list[int] = []

    def send(self, request):
        self.asked.append(request.index)
        record = Record(request.index, request.shape, begin=time.perf_counter(), status="ok")
        self._wait(0 if request.index in self._at_once else ANSWER_S)
        record.total = time.perf_counter() - record.begin
        return record


def go(settings: LoadSettings, client: Client):
    run = LoadRun(client, settings, lambda request, record: None)

    def user() -> None:
        number = run.join()
        while run.step(number):
            pass

    gevent.joinall([gevent.spawn(user) for _ in range(settings.users)], raise_error=True)
    assert run.done.is_set()
    return run.result()


def test_measuring_starts_when_the_last_user_is_warm():
    settings = LoadSettings(users=2, requests=4, warmup=20)
    client = Client(blocks=False, at_once=range(-20, 0))  # the warm-up of the first user
    began = time.perf_counter()
    result = go(settings, client)
    elapsed = time.perf_counter() - began
    assert [index < 0 for index in client.asked] == [True] * 40 + [False] * 4
    assert sorted(record.index for record in result.records) == [0, 1, 2, 3]
    warm_up = settings.warmup * ANSWER_S
    assert 2 * ANSWER_S <= result.wall <= elapsed - warm_up
    assert all(0 <= record.begin <= elapsed - warm_up for record in result.records)


def test_an_arrival_that_was_held_up_is_late():
    settings = LoadSettings(requests=8, rate=1000, seed=3)
    result = go(settings, Client(blocks=True))
    planned = [at for at, _ in zip(arrivals(1000, 3), range(8), strict=False)]
    for record, at in zip(sorted(result.records, key=lambda record: record.index), planned, strict=True):
        assert record.late >= 0
        assert record.begin >= at
        # Sent when it was planned and that much later, by whichever of the two clock readings.
        assert record.begin - at - record.late == pytest.approx(0, abs=1.5 * ANSWER_S)
    assert max(record.late for record in result.records) >= 4 * ANSWER_S


def test_arrivals_come_when_they_are_planned():
    result = go(LoadSettings(requests=9, rate=8, seed=3), Client(blocks=False))
    planned = [at for at, _ in zip(arrivals(8, 3), range(9), strict=False)]
    assert planned[4] > 0.25
    assert statistics.median(record.late for record in result.records) < planned[4]
