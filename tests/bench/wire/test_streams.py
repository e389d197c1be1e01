"""Each dialect's stream says the same whatever pieces its bytes come in, and counts tokens, not pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_sglang.bench.wire import Event, dialect
from mini_sglang.bench.wire.frames import Lines, ServerSentEvents
from tests.bench.streams import (
    CACHE_TOLD,
    CACHED,
    IDS_TOLD,
    NAMES,
    PROMPT,
    Piece,
    error_message,
    messages,
    spoken,
)

TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=6)
PIECES = st.lists(
    st.builds(Piece, st.lists(st.integers(0, 50_000), min_size=1, max_size=4).map(tuple), TEXT),
    min_size=1,
    max_size=6,
)


def read(name: str, parts: list[bytes]) -> list[Event]:
    reader = dialect(spoken(name)).reader()
    return [event for part in parts for event in reader.feed(part)] + reader.close()


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({min(place, len(data)) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in pairwise(ends)]


@pytest.mark.parametrize("name", NAMES)
@given(pieces=PIECES, places=st.lists(st.integers(0, 3000), max_size=12))
def test_any_cut_of_the_bytes_gives_the_same_events(
    name: str, pieces: list[Piece], places: list[int]
) -> None:
    data = b"".join(messages(name, pieces))
    assert read(name, cut(data, places)) == read(name, [data])
    assert read(name, [bytes([byte]) for byte in data]) == read(name, [data])


@pytest.mark.parametrize("name", NAMES)
@given(pieces=PIECES)
def test_ids_text_and_counts_are_those_that_were_sent(name: str, pieces: list[Piece]) -> None:
    events = read(name, messages(name, pieces))
    ids = [token for piece in pieces for token in piece.ids]
    assert "".join(event.text for event in events) == "".join(piece.text for piece in pieces)
    assert not any(event.error for event in events)
    if name in IDS_TOLD:
        assert [token for event in events for token in event.ids or ()] == ids
    last = {
        field: next((v for e in reversed(events) if (v := getattr(e, field)) is not None), None)
        for field in ("output_tokens", "prompt_tokens", "cached_tokens", "finish")
    }
    assert last["output_tokens"] == len(ids)
    assert last["prompt_tokens"] == PROMPT
    assert last["cached_tokens"] == (CACHED if name in CACHE_TOLD else None)
    assert last["finish"] in ("length", "limit")


@pytest.mark.parametrize("name", NAMES)
def test_an_error_in_the_middle_is_told_in_the_servers_words(name: str) -> None:
    first = messages(name, [Piece((1,), "a")])[0]
    events = read(name, [first, error_message(name, 'out of "memory"')])
    assert events[-1].error == 'out of "memory"'


@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_message_is_an_error_and_not_a_fault(name: str) -> None:
    for payload in (b"{", b"\xff\xfe", b"7", b"null", b'{"choices": 3}', b'{"meta_info": 1}', b'{"done": 1}'):
        frame = payload + b"\n" if spoken(name) in ("ours", "ollama") else b"data: " + payload + b"\n\n"
        (event,) = read(name, [frame])
        if payload in (b"{", b"\xff\xfe", b"7"):
            assert event.error is not None and event.error.startswith("a message that cannot be read")


def test_a_character_may_be_cut_in_the_middle() -> None:
    data = b"".join(messages("openai", [Piece((1, 2), "né"), Piece((3,), "😀")]))
    middle = data.index("😀".encode()) + 2
    assert "".join(event.text for event in read("openai", [data[:middle], data[middle:]])) == "né😀"


def test_events_with_carriage_returns_comments_and_several_data_lines() -> None:
    frames = ServerSentEvents()
    data = b": hello\r\nid: 3\r\ndata: one\r\ndata:two\r\n\r\nevent: x\r\n\r\ndata: three\r\n\r\ndata: cut"
    assert frames.feed(data) == [b"one\ntwo", b"three"]
    assert frames.close() == []


def test_a_last_line_needs_no_end() -> None:
    frames = Lines()
    assert frames.feed(b'{"a": 1}\n\n{"b"') == [b'{"a": 1}']
    assert frames.feed(b": 2}") == []
    assert frames.close() == [b'{"b": 2}']


def test_continuous_usage_counts_tokens_that_come_without_ids() -> None:
    reader = dialect("openai").reader()
    chunk = b'data: {"choices": [{"text": "ab"}], "usage": {"completion_tokens": 2, "prompt_tokens": 5}}\n\n'
    (event,) = reader.feed(chunk)
    assert (event.made, event.output_tokens) == (2, None)


def test_reasoning_and_tool_calls_are_output_too() -> None:
    reader = dialect("openai-chat").reader()
    told = b'data: {"choices": [{"delta": {"reasoning_content": "hm"}}]}\n\n'
    called = b'data: {"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}\n\n'
    assert [bool(event.text) for event in reader.feed(told + called)] == [True, True]


def test_sglangs_ids_that_do_not_fit_its_count_are_an_error() -> None:
    reader = dialect("sglang").reader()
    (event,) = reader.feed(
        b'data: {"text": "a", "output_ids": [1, 2], "meta_info": {"completion_tokens": 3}}\n\n'
    )
    assert event.error == "2 ids came where its count says 3"
