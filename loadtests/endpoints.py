"""The endpoints that are compared: servers that we start, or URLs."""

from __future__ import annotations

import json
import shlex
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from server import Server

READY_SECONDS = 900.0
"""A first start compiles the model: minutes on two cores."""


@dataclass(frozen=True)
class Endpoint:
    """One side of a comparison.

    Attributes:
        name: what the report calls it.
        model: what ``maskpro-serve`` is to serve; or, with a URL, the served model's name (empty: the first listed).
        flags: of ``maskpro-serve``.
        environment: variables for ``maskpro-serve``, as NAME=VALUE.
        url: of a server that is up already, without the ``/v1``; empty to start one.
    """

    name: str
    model: str
    flags: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    url: str = ""

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """``NAME=URL`` or ``NAME=URL,MODEL``.

        Raises:
            ValueError: it is neither.
        """
        name, equals, place = text.partition("=")
        url, _, model = place.partition(",")
        if not (name and equals and url.startswith(("http://", "https://"))):
            raise ValueError(f"endpoint {text!r}: expected NAME=URL or NAME=URL,MODEL, the URL without /v1")
        return cls(name, model, url=url.rstrip("/").removesuffix("/v1"))

    @property
    def description(self) -> str:
        """How to have the same endpoint again."""
        if self.url:
            return f"{self.url} {self.model}".strip()
        return shlex.join([*self.environment, "maskpro-serve", "--model", self.model, *self.flags])


@dataclass
class Running:
    """An endpoint that answers.

    Attributes:
        endpoint: what it is.
        url: where it is.
        model: name of the served model, empty if the endpoint's first is meant.
        version: of the engine, as the endpoint tells; empty if it does not.
    """

    endpoint: Endpoint
    url: str
    model: str
    version: str
    server: Server | None = None

    @property
    def facts(self) -> dict[str, object]:
        """What only a running server knows: start-up time and memory."""
        if self.server is None:
            return {"version": self.version}
        return {
            "version": self.version,
            "seconds_to_ready": round(self.server.seconds_to_ready, 1),
            "memory_bytes": self.server.memory(),
        }


class Endpoints:
    """Starts what has to be started, one after the other, and stops it at the end; all are up at once.

    Up together, a drift of the machine meets them alike; an idle one costs nothing once vLLM's engine has stopped
    spinning, a second after its last message.

    Args:
        endpoints: with names that differ.
        logs: folder for the servers' logs.
    """

    def __init__(self, endpoints: Sequence[Endpoint], logs: Path) -> None:
        self._endpoints = endpoints
        self._logs = logs
        self._servers: list[Server] = []

    def __enter__(self) -> list[Running]:
        try:
            return [self._start(endpoint) for endpoint in self._endpoints]
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.stop()
        self._servers = []

    def _start(self, endpoint: Endpoint) -> Running:
        if endpoint.url:
            return Running(endpoint, endpoint.url, endpoint.model, _version(endpoint.url))
        self._logs.mkdir(parents=True, exist_ok=True)
        server = Server(
            ["--model", endpoint.model, *endpoint.flags],
            self._logs / f"{endpoint.name}.log",
            dict(variable.split("=", 1) for variable in endpoint.environment),
        ).start()
        self._servers.append(server)  # two starts at once would fight for the cores
        server.wait_ready(READY_SECONDS)
        return Running(endpoint, server.url, "", _version(server.url), server)


def _version(url: str) -> str:
    try:
        with urllib.request.urlopen(f"{url}/version", timeout=10) as response:
            return f"vLLM {json.load(response)['version']}"
    except (urllib.error.URLError, OSError, ValueError, KeyError, TypeError):
        return ""
