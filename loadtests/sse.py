"""Server-sent events, from bytes as they come off a socket."""

from __future__ import annotations

import re

_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventParser:
    """Collects the ``data`` of events, however the bytes are cut.

    Fields other than ``data`` and comments are skipped, as the OpenAI protocol uses neither.
    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html, 9.2.6.
    """

    def __init__(self) -> None:
        self._buffer = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[str]:
        """The data of the events that these bytes complete; several ``data`` lines of one event join by newlines."""
        self._buffer += chunk
        events: list[str] = []
        position = 0
        for end in _LINE_END.finditer(self._buffer):
            if end.group() == b"\r" and end.end() == len(self._buffer):
                break  # may be the first half of \r\n
            self._line(self._buffer[position : end.start()], events)
            position = end.end()
        self._buffer = self._buffer[position:]
        return events

    def _line(self, line: bytes, events: list[str]) -> None:
        if not line:
            if self._data:
                events.append(b"\n".join(self._data).decode(errors="replace"))
                self._data = []
            return
        field, _, value = line.partition(b":")
        if field == b"data":
            self._data.append(value.removeprefix(b" "))
