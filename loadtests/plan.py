"""What a comparison measures: cells, one run of load on one endpoint each, in an order that is fair to both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from load_settings import LoadSettings


@dataclass(frozen=True)
class Load:
    """A workload and how it arrives: from so many users in a closed loop, or at a rate.

    Attributes:
        workload: one of workloads.WORKLOADS.
        users: of a closed loop; 0 in an open one.
        rate: Poisson arrivals per second of an open loop; 0 in a closed one.
    """

    workload: str
    users: int = 0
    rate: float = 0.0

    @property
    def label(self) -> str:
        if self.rate:
            return f"{self.rate:g}/s"
        return f"{self.users} user{'s' if self.users > 1 else ''}"

    @property
    def key(self) -> str:
        return f"{self.workload}-{f'rate{self.rate:g}' if self.rate else f'users{self.users}'}"


@dataclass(frozen=True)
class Plan:
    """Which loads, how often, with how many requests.

    Attributes:
        loads: in the order they are run within a round.
        rounds: how often everything is repeated.
        requests_per_user: measured requests of a closed loop, per user.
        least_requests: of a closed loop, however few users.
        open_seconds: mean length of an open loop: its requests are rate times this.
        base: settings common to all runs; its seed is that of the first round.
    """

    loads: tuple[Load, ...]
    rounds: int
    requests_per_user: int
    least_requests: int
    open_seconds: float
    base: LoadSettings

    def settings(self, load: Load, round_number: int) -> LoadSettings:
        """The settings of one cell; equal for all endpoints.

        Every round has a seed of its own: a prompt that comes back would be found in the server's prefix cache.
        """
        if load.rate:
            requests = max(1, round(load.rate * self.open_seconds))
        else:
            requests = max(self.least_requests, self.requests_per_user * load.users)
        return replace(
            self.base,
            workload=load.workload,
            seed=self.base.seed + round_number,
            users=load.users or 1,
            rate=load.rate,
            requests=requests,
        )


@dataclass(frozen=True)
class Cell:
    """One run: of one load, on one endpoint, in one round."""

    endpoint: str
    load: Load
    round_number: int

    @property
    def file_name(self) -> str:
        return f"round{self.round_number}-{self.load.key}-{self.endpoint}.json"


def cells(plan: Plan, endpoints: Sequence[str]) -> list[Cell]:
    """A B A B: the endpoints take turns at every load, and everything is repeated in the next round."""
    return [
        Cell(endpoint, load, round_number)
        for round_number in range(plan.rounds)
        for load in plan.loads
        for endpoint in endpoints
    ]
