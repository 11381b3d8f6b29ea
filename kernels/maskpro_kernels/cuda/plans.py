"""What was measured on a kind of GPU: the time of every backend for a shape and a number of tokens, in a file.

One file for a device, a torch, a Triton and a cuSPARSELt: other versions bring other kernels. Processes that tune at
the same time do so one after the other; a reader sees the file before or after, never a part.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from maskpro_kernels.cuda.device import Device
from maskpro_kernels.files import write_atomically
from maskpro_kernels.pattern import NMPattern
from maskpro_kernels.triton.tile import Tile

logger = logging.getLogger(__name__)

TABLE_VERSION = 1
"""Counted up whenever older measurements would speak of other kernels."""

_LONGEST_WAIT_S = 300
_LARGEST_BUCKET = 8192
_SMALLEST_BUCKET = 16


def bucket(tokens: int) -> int:
    """The number of tokens that is measured for so many: the next power of two, from 16 to 8,192."""
    return min(max(_SMALLEST_BUCKET, 1 << (tokens - 1).bit_length()), _LARGEST_BUCKET)


def buckets(most_tokens: int) -> list[int]:
    """Every bucket of 1 to ``most_tokens`` tokens."""
    return [1 << power for power in range(_SMALLEST_BUCKET.bit_length() - 1, bucket(most_tokens).bit_length())]


@dataclass(frozen=True)
class Problem:
    """What a time is of."""

    pattern: NMPattern
    activation: torch.dtype
    weight: torch.dtype
    out_features: int
    in_features: int
    tokens: int

    def __str__(self) -> str:
        dtypes = (str(dtype).removeprefix("torch.") for dtype in (self.activation, self.weight))
        return f"{self.pattern} {' '.join(dtypes)} {self.out_features}x{self.in_features} {self.tokens}"


@dataclass(frozen=True)
class Plan:
    """A backend's best.

    Attributes:
        backend: its name.
        tile: how it cuts the product, where that is ours to say.
        microseconds: the median time of one call; None where nothing was measured, infinite where it failed.
    """

    backend: str
    tile: Tile | None = None
    microseconds: float | None = None


@dataclass
class PlanTable:
    """The plans of one kind of GPU, by problem and backend.

    Attributes:
        device: the GPU.
        folder: of the files; made when something is added.
    """

    device: Device
    folder: Path
    _plans: dict[str, dict[str, Plan]] = field(default_factory=dict)
    _for_now: dict[str, dict[str, Plan]] = field(default_factory=dict)
    _read: bool = False
    _waited: bool = False

    @property
    def environment(self) -> dict[str, object]:
        """What the times depend on, besides the problem."""
        return {
            "table_version": TABLE_VERSION,
            "device": self.device.name,
            "capability": list(self.device.capability),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cusparselt": torch.backends.cusparselt.version(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),  # dense products obey it
        }

    @property
    def path(self) -> Path:
        environment = json.dumps(self.environment, sort_keys=True).encode()
        name = re.sub(r"[^a-z0-9]+", "-", self.device.name.lower()).strip("-")
        return self.folder / f"{name}-{hashlib.sha256(environment).hexdigest()[:12]}.json"

    def of(self, problem: Problem) -> dict[str, Plan]:
        """What is known of a problem, by backend."""
        if not self._read:
            self._plans = self._load()
            self._read = True
        return self._for_now.get(str(problem), {}) | self._plans.get(str(problem), {})

    def add_for_now(self, problem: Problem, plans: list[Plan]) -> None:
        """Adds what this process alone shall know: failures that may pass. It does not try them again."""
        self._for_now.setdefault(str(problem), {}).update({plan.backend: plan for plan in plans})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """No other process adds meanwhile, and what others had added is known.

        Without a folder there is no lock, nor where another process holds it for too long: it may wait for this one.
        That is waited for once.
        """
        lock = FileLock(self.path.with_suffix(".lock"), is_singleton=True)  # add() may take it once more
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0 if self._waited else _LONGEST_WAIT_S)
            held = True
        except OSError as error:  # Timeout is one
            held, self._waited = False, self._waited or isinstance(error, Timeout)
            logger.warning("kernel times are measured without a lock: %s", error)
        try:
            self._merge()
            yield
        finally:
            if held:
                lock.release()

    def add(self, problem: Problem, plans: list[Plan]) -> None:
        """Adds measurements, here and in the file; a folder that cannot be written is logged."""
        self.of(problem)
        self._plans.setdefault(str(problem), {}).update({plan.backend: plan for plan in plans})
        try:
            with self.locked():
                write_atomically(self.path, self._content())
        except OSError as error:
            logger.warning("measured kernel times are not kept: %s", error)

    def _merge(self) -> None:
        stored = self._load()
        for key, known in self._plans.items():
            stored[key] = stored.get(key, {}) | known
        self._plans, self._read = stored, True

    def _content(self) -> bytes:
        plans = {key: {name: _to_json(plan) for name, plan in known.items()} for key, known in self._plans.items()}
        return (json.dumps(self.environment | {"plans": plans}, indent=1, sort_keys=True) + "\n").encode()

    def _load(self) -> dict[str, dict[str, Plan]]:
        """The file's plans; none where it is missing or is not ours to read."""
        try:
            content = json.loads(self.path.read_text())
            return {
                key: {name: _from_json(name, plan) for name, plan in known.items()}
                for key, known in content["plans"].items()
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s: kernel times are not readable, and are measured again: %s", self.path, error)
            return {}


def _to_json(plan: Plan) -> dict[str, object]:
    failed = plan.microseconds == float("inf")
    return {
        "tile": None if plan.tile is None else asdict(plan.tile),
        "microseconds": None if failed else plan.microseconds,
    }


def _from_json(name: str, plan: dict[str, object]) -> Plan:
    tile, time = plan["tile"], plan["microseconds"]
    if not (tile is None or isinstance(tile, dict)) or not (time is None or isinstance(time, float)):
        raise ValueError(f"{name}: expected a tile and microseconds, found {plan}")
    return Plan(name, None if tile is None else Tile(**tile), float("inf") if time is None else time)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def default_folder() -> Path:
    """Beside the built models: MASKPRO_CACHE, else the user's cache folder."""
    if configured := os.environ.get("MASKPRO_CACHE"):
        return Path(configured) / "kernel-times"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maskpro-serve" / "kernel-times"
