"""The folder of a comparison: what was asked for, what has been measured, on what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from endpoints import Endpoint
from load_settings import LoadSettings
from plan import Cell, Load, Plan, cells
from records import RunFile


class Results:
    """A comparison on disk; every run is a file, so that a later call goes on where an earlier one was stopped.

    Args:
        folder: of the comparison.
        endpoints: the sides.
        plan: what is measured.
    """

    def __init__(self, folder: Path, endpoints: Sequence[Endpoint], plan: Plan) -> None:
        self.folder = folder
        self.endpoints = list(endpoints)
        self.plan = plan
        self._notes_file = folder / "notes.json"

    def open(self, *, fresh: bool, command: str) -> None:
        """Prepares the folder; what an unfinished comparison measured is kept, what a finished one did is not.

        Args:
            fresh: forget an unfinished one too.
            command: that asks for the comparison, for the report.

        Raises:
            ValueError: the folder holds a comparison of other endpoints.
        """
        asked = json.loads(json.dumps([asdict(endpoint) for endpoint in self.endpoints]))
        notes = self.notes()
        fresh = fresh or notes.get("finished", False)
        if notes and notes.get("endpoints") != asked and not fresh:
            found = ", ".join(str(endpoint.get("name")) for endpoint in notes.get("endpoints", []))
            raise ValueError(
                f"{self.folder}: holds an unfinished comparison of other endpoints or flags ({found}); give another "
                "--output, or --fresh"
            )
        if fresh:
            for name in ("cells", "calibration"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            self._notes_file.unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.note("finished", False)
        self.note("endpoints", asked)
        self.note("command", command)

    def notes(self) -> dict[str, Any]:
        return json.loads(self._notes_file.read_text()) if self._notes_file.exists() else {}

    def note(self, key: str, value: Any) -> None:
        """Keeps a fact for the report."""
        temporary = self._notes_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.notes() | {key: value}, indent=2))
        temporary.replace(self._notes_file)

    def note_facts(self, endpoint: str, facts: dict[str, object]) -> None:
        self.note("facts", self.notes().get("facts", {}) | {endpoint: facts})

    def note_machine(self, machine: dict[str, object], versions: dict[str, str]) -> None:
        self.note("machine", machine)
        self.note("versions", versions)

    def cells(self) -> list[Cell]:
        return cells(self.plan, [endpoint.name for endpoint in self.endpoints])

    def settings(self, cell: Cell) -> LoadSettings:
        return self.plan.settings(cell.load, cell.round_number)

    def path(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.file_name

    def runs(self, load: Load, endpoint: str) -> list[RunFile]:
        """The runs of one load on one endpoint, by rounds.

        Raises:
            ValueError: one is missing.
        """
        wanted = [self.path(cell) for cell in self.cells() if (cell.load, cell.endpoint) == (load, endpoint)]
        if missing := [path for path in wanted if not path.exists()]:
            raise ValueError(f"{missing[0]}: expected a measured run, found none; measure first, with the same flags")
        return [RunFile.read(path) for path in wanted]
