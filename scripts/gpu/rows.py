"""What a run on a GPU leaves behind: rows in a JSON file, each written as soon as it is measured."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from maskpro_kernels.files import write_atomically

_REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Machine:
    """Attributes are what their names say; memory in bytes; of the code a hash, so that other code is measured anew."""

    gpu: str
    capability: str
    memory: int
    driver_cuda: str | None
    torch: str
    triton: str
    python: str
    code: str

    def __str__(self) -> str:
        return (
            f"{self.gpu} ({self.memory / 2**30:.0f} GiB, compute capability {self.capability}), torch {self.torch} "
            f"(CUDA {self.driver_cuda}), Triton {self.triton}, Python {self.python}"
        )


def this_machine() -> Machine:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return Machine(
        gpu=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        memory=properties.total_memory,
        driver_cuda=torch.version.cuda,
        torch=torch.__version__,
        triton=triton.__version__,
        python=sys.version.split()[0],
        code=_code(),
    )


def _code() -> str:
    """Of the kernels, how they are chosen, and what measures them."""
    digest = hashlib.sha256()
    for folder in ("kernels/maskpro_kernels", "scripts/gpu"):
        for path in sorted((_REPOSITORY / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class OutOfTimeError(Exception):
    """The run's time is used up: what is missing waits for the next."""


class Rows:
    """The rows of one section; a row that the file has for this machine is not measured again.

    Args:
        path: of the JSON file.
        machine: it starts anew where another machine's rows are.
        deadline: of time.monotonic(); no row is begun after it.
    """

    def __init__(self, path: Path, machine: Machine, deadline: float) -> None:
        self.path, self.deadline = path, deadline
        self._content: dict[str, Any] = {"command": sys.argv, "machine": asdict(machine), "rows": {}}
        if path.exists():
            stored = json.loads(path.read_text())
            if stored["machine"] == self._content["machine"]:
                self._content = stored

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return self._content["rows"]

    def row(self, key: str, measure: Callable[[], dict[str, Any]], needs: float = 5.0) -> None:
        """Measures a row unless it is there.

        Args:
            key: of the row.
            measure: its content.
            needs: seconds that must be left for it to begin.

        Raises:
            OutOfTimeError: they are not.
        """
        if key in self.rows:
            return
        if time.monotonic() + needs > self.deadline:
            raise OutOfTimeError(f"{self.path.name}: {key}")
        found = measure()
        self.rows[key] = found
        write_atomically(self.path, (json.dumps(self._content, indent=1) + "\n").encode())
        print(f"{key}: {', '.join(f'{name} {short(value)}' for name, value in found.items())}", flush=True)


def short(value: object) -> str:
    """A number to three digits, or whatever it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows: dict[str, dict[str, Any]], first: str) -> str:
    """Markdown of rows that have the same columns; those of others begin a table of their own."""
    lines: list[str] = []
    columns: list[str] = []
    for key, row in rows.items():
        if list(row) != columns:
            columns = list(row)
            lines += ["", f"| {first} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        lines.append(f"| {key} | {' | '.join(short(row[name]) for name in columns)} |")
    return "\n".join(lines)
