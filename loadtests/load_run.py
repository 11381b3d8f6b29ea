"""One run: warm-up, then requests from a closed loop of users or from Poisson arrivals, until there are enough."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict

import gevent
from gevent.event import Event
from gevent.pool import Group
from load_settings import LoadSettings
from records import Record, RunFile
from streaming import StreamingClient
from workloads import Request, arrivals, make_request


class LoadRun:
    """The state that all users of a run share.

    Args:
        client: sends the requests.
        settings: what to send.
        report: told of every measured request.
    """

    def __init__(
        self, client: StreamingClient, settings: LoadSettings, report: Callable[[Request, Record], None]
    ) -> None:
        self.done = Event()
        """Set when the last measured request has ended."""
        self._client = client
        self._settings = settings
        self._report = report
        self._indices = itertools.count()
        self._joined = itertools.count()
        self._warm = Event()
        self._warm_users = 0
        self._warmup_failures = 0
        self._records: list[Record] = []
        self._start = self._end = 0.0
        self._cpu_start = self._cpu_end = 0.0

    def join(self) -> int:
        """One more user: its warm-up, then the wait for everyone's; returns its number."""
        number = next(self._joined)
        settings = self._settings
        for step in range(settings.warmup):
            index = -1 - (number * settings.warmup + step)  # no measured request has it
            record = self._client.send(make_request(settings.workload, settings.seed, index))
            self._warmup_failures += record.failed
        self._warm_users += 1
        if not self._warm.is_set() and (self._warm_users == settings.users or not settings.warmup):
            self._start = self._end = time.perf_counter()
            self._cpu_start = self._cpu_end = time.process_time()
            self._warm.set()
        self._warm.wait()
        return number

    def step(self, number: int) -> bool:
        """A user's next request, or in an open loop all arrivals of this source; False if there is nothing more."""
        if self._settings.rate > 0:
            self._open_loop(number)
            return False
        if (request := self._next()) is None:
            return False
        self._perform(request, late=0.0)
        return True

    def _open_loop(self, number: int) -> None:
        in_flight = Group()
        start = time.perf_counter()  # one that joins late has missed nothing
        try:
            for at in arrivals(self._settings.rate / self._settings.users, self._settings.seed, number):
                gevent.sleep(max(0.0, start + at - time.perf_counter()))
                if (request := self._next()) is None:
                    break
                in_flight.spawn(self._perform, request, time.perf_counter() - start - at)
            in_flight.join()
        finally:
            in_flight.kill()

    def _next(self) -> Request | None:
        index = next(self._indices)
        if self._settings.requests and index >= self._settings.requests:
            return None
        settings = self._settings
        return make_request(settings.workload, settings.seed, index, abort_share=settings.abort_share)

    def _perform(self, request: Request, late: float) -> None:
        record = self._client.send(request)
        self._end, self._cpu_end = time.perf_counter(), time.process_time()
        record.begin -= self._start
        record.late = late
        if self._settings.requests:
            self._records.append(record)  # kept only where there is an end
        self._report(request, record)
        if len(self._records) == self._settings.requests > 0:
            self.done.set()

    def result(self) -> RunFile:
        """What has been measured so far."""
        return RunFile(
            settings=asdict(self._settings),
            wall=self._end - self._start,
            cpu=self._cpu_end - self._cpu_start,
            warmup_failures=self._warmup_failures,
            records=self._records,
        )
