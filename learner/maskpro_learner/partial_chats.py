"""Chats in the making: whole batches of answers survive a kill, and prompts once all of them are written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maskpro_kernels.files import write_atomically
from maskpro_learner.errors import LearnerError


class PartialChats:
    """A file beside the output with a line for every batch, from which the output is made at the end.

    Args:
        output: the JSONL file of chats to write.
        run: all that they depend on.

    Attributes:
        prompts: those that an earlier run had written itself, or None.
        answered: how many prompts an earlier run, and this one so far, have asked.
        chats: lines of the output so far.

    Raises:
        LearnerError: the file is of another run.
        OSError: it cannot be read.
    """

    def __init__(self, output: Path, run: Mapping[str, Any]) -> None:
        self._output = output
        self._path = output.with_name(f"{output.name}.partial")
        self._run = json.dumps(run, sort_keys=True)
        self.prompts: list[str] | None = None
        self.answered = 0
        self.chats: list[str] = []
        if self._path.exists():
            self._take_up()

    def remember_prompts(self, prompts: Sequence[str]) -> None:
        """Keeps the prompts that the model wrote.

        Raises:
            OSError: the disk is full; what was there before is kept.
        """
        self._append({"prompts": list(prompts)})
        self.prompts = list(prompts)

    def add(self, answered: int, chats: Sequence[str]) -> None:
        """Keeps one more batch: how many prompts it had, and the lines that came of it.

        Raises:
            OSError: as :meth:`remember_prompts`.
        """
        self._append({"answered": answered, "chats": list(chats)})
        self.answered += answered
        self.chats += chats

    def finish(self) -> None:
        """Writes the output, whole, and removes the file.

        Raises:
            OSError: it cannot be written; the file is kept.
        """
        write_atomically(self._output, "".join(f"{chat}\n" for chat in self.chats).encode())
        self.discard()

    def discard(self) -> None:
        """Removes the file."""
        self._path.unlink(missing_ok=True)

    def _append(self, row: Mapping[str, Any]) -> None:
        begins = not self._path.exists()
        with self._path.open("ab") as file:
            if begins:
                file.write(self._run.encode() + b"\n")
            file.write(json.dumps(row).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _take_up(self) -> None:
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # without a line that a kill cut short
        run, _, rest = whole.decode(errors="replace").partition("\n")
        if not whole:
            self.discard()
            return
        if run != self._run:
            raise LearnerError(f"{self._path}: chats of another run (other settings, model or prompts): remove it, or "
                               "change --output")  # fmt: skip
        for row in map(json.loads, rest.split("\n")[:-1]):
            self.prompts = row.get("prompts", self.prompts)
            self.answered += row.get("answered", 0)
            self.chats += row.get("chats", [])
        os.truncate(self._path, len(whole))
