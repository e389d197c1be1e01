"""Datasets: exact lengths, shared where they say so, the same for the same seed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_sglang.bench.load.datasets import (
    FIRST_ID,
    KINDS,
    Dialogue,
    Lengths,
    Session,
    Shape,
    ids_below,
    made,
    words,
)
from mini_sglang.bench.load.files import read_sessions
from mini_sglang.errors import InvalidValueError, MiniSglangError

LENGTHS = Lengths((3, 9), (2, 5), 12)


def take(kind: str, count: int, seed: int = 0, vocab: int = 8192, **shape: Any) -> list[Session]:
    return list(itertools.islice(made(kind, Shape(LENGTHS, **shape), ids_below(vocab), seed), count))


def first_contents(sessions: list[Session]) -> list[list[int]]:
    return [list(session.turns[0].content) for session in sessions]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 1000), vocab=st.integers(2, 50_000))
def test_lengths_and_ids_are_within_what_was_asked(kind: str, seed: int, vocab: int) -> None:
    for session in take(kind, 5, seed, vocab):
        for turn in session.turns:
            length = len(turn.content) - (12 if kind == "shared-prefix" else 0)
            assert 3 <= length <= 9 and 2 <= turn.new_tokens <= 5
            assert all(0 <= token < vocab for token in turn.content)  # type: ignore[operator]
            assert vocab < 2 * FIRST_ID or min(turn.content) >= FIRST_ID  # type: ignore[type-var]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_asks_the_same_and_another_does_not(kind: str) -> None:
    assert take(kind, 6, 1) == take(kind, 6, 1)
    assert take(kind, 6, 1) != take(kind, 6, 2)


def test_prefixes_are_shared_and_the_rest_is_not() -> None:
    contents = first_contents(take("shared-prefix", 8, prefixes=2))
    assert len({tuple(content[:12]) for content in contents}) == 2
    assert contents[0][:12] == contents[2][:12] != contents[1][:12]
    assert len({tuple(content[12:]) for content in contents}) == 8


def test_random_prompts_share_nothing_and_repeat_repeats() -> None:
    assert len({tuple(content) for content in first_contents(take("random", 50))}) == 50
    sessions = take("repeat", 9, distinct=3)
    assert sessions[:3] * 3 == sessions and len(set(map(str, sessions))) == 3


def test_turns_and_thinking() -> None:
    (session,) = take("multi-turn", 1, turns=4, think=0.5)
    assert [turn.think for turn in session.turns] == [0.0, 0.5, 0.5, 0.5]


def test_texts_have_so_many_words() -> None:
    (session,) = itertools.islice(made("shared-prefix", Shape(LENGTHS), words, 0), 1)
    content = session.turns[0].content
    assert isinstance(content, str) and 15 <= len(content.split()) <= 21


def test_an_unknown_dataset_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="shared-prefix"):
        next(made("nonsense", Shape(), words, 0))


def test_history_needs_ids_where_prompts_are_ids() -> None:
    dialogue = Dialogue("ids")
    dialogue.ask([1])
    assert not dialogue.heard("text", None)


def write(path: Path, entries: list[Any], lines: bool) -> Path:
    text = "\n".join(map(json.dumps, entries)) if lines else json.dumps(entries)
    path.write_text(text, encoding="utf-8")
    return path


def read(path: Path, count: int, form: str = "text", turns: int = 3, seed: int = 0) -> list[Session]:
    return list(itertools.islice(read_sessions(path, (4, 4), turns, 1.0, seed, form=form), count))


@pytest.mark.parametrize("lines", [True, False])
def test_a_file_of_prompts_and_conversations(tmp_path: Path, lines: bool) -> None:
    talk = [
        {"from": "human", "value": "one"},
        {"from": "gpt", "value": "answer"},
        {"from": "human", "value": "two"},
        {"from": "human", "value": "three"},
    ]
    path = write(tmp_path / "x.json", [{"prompt": "hi", "output_len": 9}, {"conversations": talk}], lines)
    sessions = read(path, 4, turns=2)
    kinds = {session.turns[0].content: session for session in sessions}
    assert set(kinds) == {"hi", "one"}
    assert kinds["hi"].turns[0].new_tokens == 9
    # Two of its questions, after each other, with the answers that come.
    assert [(t.content, t.new_tokens, t.think) for t in kinds["one"].turns] == [
        ("one", 4, 0.0),
        ("two", 4, 1.0),
    ]
    assert sessions[:2] == sessions[2:]


def test_the_order_is_the_seeds(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": str(n)} for n in range(30)], True)
    assert read(path, 30, seed=1) == read(path, 30, seed=1) != read(path, 30, seed=2)
    assert {session.turns[0].content for session in read(path, 30)} == {str(n) for n in range(30)}


def test_messages_are_for_apis_that_take_them(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    path = write(tmp_path / "x.jsonl", [{"messages": messages, "max_tokens": 3}], True)
    assert read(path, 1, "messages")[0].turns[0].content == messages
    with pytest.raises(MiniSglangError, match="entry 1: this API takes text"):
        read(path, 1)


@pytest.mark.parametrize(
    "entry", [{}, [], 3, {"prompt": ""}, {"prompt": "a", "output_len": 0}, {"conversations": [1]}, None]
)
def test_an_entry_of_another_form_is_named(tmp_path: Path, entry: Any) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "good"}, entry], True)
    with pytest.raises(MiniSglangError, match="entry 2: it must be"):
        read(path, 1)


@pytest.mark.parametrize("text", ["", "[]", "{", "[1"])
def test_a_file_without_entries_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MiniSglangError, match=r"entries|neither JSON"):
        read(path, 1)
    with pytest.raises(MiniSglangError, match="cannot be read"):
        read(tmp_path / "missing.jsonl", 1)
