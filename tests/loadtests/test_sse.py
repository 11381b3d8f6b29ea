"""Server-sent events, however the bytes are cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from sse import EventParser


def parse(*chunks: bytes) -> list[str]:
    parser = EventParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


def test_events():
    assert parse(b"data: a\n\ndata:b\n\n") == ["a", "b"]
    assert parse(b": ping\n\nevent: x\nid: 1\ndata: a\n\n") == ["a"]
    assert parse(b"data: a\ndata: b\n\n") == ["a\nb"]
    assert parse(b"data\n\n") == [""]
    assert parse(b"data:  two spaces\n\n") == [" two spaces"]


def test_an_unfinished_event_is_none():
    assert parse(b"data: a\n") == []
    assert parse(b"data: a") == []


def test_every_line_end():
    assert parse(b"data: a\r\n\r\ndata: b\r\rdata: c\n\n") == ["a", "b", "c"]
    assert parse(b"data: a\r", b"\n\r", b"\ndata: b\n\n") == ["a", "b"]  # one line end in two pieces


def test_a_character_in_two_pieces():
    content = 'data: {"text": "äß漢🙂"}\n\n'.encode()
    for cut in range(len(content)):
        assert parse(content[:cut], content[cut:]) == ['{"text": "äß漢🙂"}']


@given(
    texts=st.lists(st.text(st.characters(exclude_characters="\r\n", codec="utf-8")), max_size=6),
    end=st.sampled_from(["\n", "\r\n"]),
    cuts=st.lists(st.integers(0, 200), max_size=10),
)
def test_cuts_change_nothing(texts, end, cuts):
    content = "".join(f"data: {text}{end}{end}" for text in texts).encode()
    places = sorted({min(cut, len(content)) for cut in cuts} | {0, len(content)})
    pieces = [content[a:b] for a, b in pairwise(places)]
    assert parse(*pieces) == texts
