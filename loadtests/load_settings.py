"""What a run asks of an endpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoadSettings:
    """What is asked of an endpoint; two runs with equal settings are asked the same.

    Attributes:
        workload: one of workloads.WORKLOADS.
        seed: of requests and arrivals.
        users: greenlets that ask; in an open loop, the sources that share the rate.
        rate: requests per second of an open loop; 0 is a closed loop.
        requests: measured requests; 0 is no end.
        warmup: requests of each user that are not measured; measuring starts when all users have done theirs.
        abort_share: share of requests that hang up halfway.
        timeout: seconds for a request.
        retries: see streaming.StreamingClient.
        fixed_length: see workloads.Request.payload.
    """

    workload: str = "chat"
    seed: int = 0
    users: int = 1
    rate: float = 0.0
    requests: int = 0
    warmup: int = 0
    abort_share: float = 0.0
    timeout: float = 300.0
    retries: int = 2
    fixed_length: bool = True
