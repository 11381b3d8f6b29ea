"""What one request measured, and the file that holds the requests of one run of Locust."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "failed", "timeout", "aborted"]


@dataclass
class Record:
    """One request. Times are seconds; those of the attempt that was answered, if there were several.

    Attributes:
        index: of the request in its run.
        shape: its kind, see workloads.
        begin: when the answered attempt was sent, from the start of measuring.
        status: ``aborted`` is the client's own doing and no failure; ``timeout`` and ``failed`` are.
        error: one sentence, for failures.
        retries: attempts before this one.
        lost: seconds spent on those.
        late: seconds between the planned arrival and the first attempt (open loop).
        first_token: until the first token, from sending; None if there was none.
        gaps: between consecutive chunks that carry tokens.
        total: until the end of the stream, or until it was given up.
        prompt_tokens: as the server counts.
        completion_tokens: as the server counts; chunks can hold several.
    """

    index: int
    shape: str
    begin: float = 0.0
    status: Status = "failed"
    error: str = ""
    retries: int = 0
    lost: float = 0.0
    late: float = 0.0
    first_token: float | None = None
    gaps: list[float] = field(default_factory=list)
    total: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def failed(self) -> bool:
        return self.status in ("failed", "timeout")

    @property
    def per_token(self) -> float | None:
        """Seconds per token after the first; None for fewer than two tokens."""
        if self.status != "ok" or self.completion_tokens < 2:
            return None
        return sum(self.gaps) / (self.completion_tokens - 1)


@dataclass
class RunFile:
    """The measured requests of one run, and the load generator's own share.

    Attributes:
        settings: what was asked for; a run is the same as another if these are equal.
        wall: seconds from the first measured request to the end of the last.
        cpu: CPU seconds of the load generator's process in that time.
        warmup_failures: of requests that are measured no further.
        records: in order of completion.
    """

    settings: dict[str, Any]
    wall: float
    cpu: float
    warmup_failures: int
    records: list[Record]

    def write(self, path: Path) -> None:
        """Writes it whole or not at all."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w") as file:
                json.dump(_rounded(asdict(self)) | {"settings": self.settings}, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> RunFile:
        """Reads it back.

        Raises:
            ValueError: the file is none of ours.
        """
        try:
            content = json.loads(path.read_text())
            content["records"] = [Record(**record) for record in content["records"]]
            return cls(**content)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: expected the records of a run, found something else ({error})") from error


def _rounded(value: Any) -> Any:
    """Seconds to the microsecond: more digits are noise, and most of the file."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
