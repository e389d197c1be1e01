"""The parsers of thoughts and calls: what they find, and that it does not depend on how text is cut."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_sglang.api.openai.answer import AnswerParser, Whole
from mini_sglang.api.openai.calls import (
    MAX_ATTEMPTS,
    MAX_UNCERTAIN_CHARS,
    CallParser,
    ForcedCallParser,
    Format,
    Piece,
)
from mini_sglang.api.openai.reasoning import ThinkParser

Parsed = list[tuple[Any, ...]]
BOTH: tuple[Format, ...] = ("hermes", "bare")


def folded(pieces: Iterable[Piece]) -> Parsed:
    """Pieces with neighbours of a kind joined: what a client has at the end."""
    result: Parsed = []
    for piece in pieces:
        last = result[-1] if result else ("",)
        if piece.kind in ("content", "reasoning") and last[0] == piece.kind:
            result[-1] = (piece.kind, last[1] + piece.text)
        elif piece.kind == "arguments" and last[0] == "arguments":
            result[-1] = ("arguments", piece.index, last[2] + piece.text)
        elif piece.kind == "arguments":
            result.append(("arguments", piece.index, piece.text))
        elif piece.kind in ("content", "reasoning"):
            result.append((piece.kind, piece.text))
        elif piece.kind == "call":
            result.append(("call", piece.index, piece.name))
        else:
            result.append(("end", piece.index, piece.ok, piece.text))
    return result


def parse(make: Callable[[], Any], chunks: Iterable[str]) -> Parsed:
    parser = make()
    pieces = [piece for chunk in chunks for piece in parser.push(chunk)]
    return folded([*pieces, *parser.finish()])


def same_however_cut(make: Callable[[], Any], text: str) -> Parsed:
    """The result for ``text``, after checking that every single cut and single characters give it too."""
    whole = parse(make, [text])
    assert parse(make, text) == whole
    for cut in range(1, len(text)):
        assert parse(make, [text[:cut], text[cut:]]) == whole, cut
    return whole


def call_parser(formats: tuple[Format, ...] = BOTH, max_calls: int = 128) -> Callable[[], CallParser]:
    return lambda: CallParser(("weather", "add"), formats, max_calls)


def whole_of(text: str, formats: tuple[Format, ...] = BOTH) -> Whole:
    parser, whole = CallParser(("weather", "add"), formats), Whole()
    whole.add([*parser.push(text), *parser.finish()])
    return whole


PARIS = '{"city": "Pa\\"r}is", "days": [1, {"a": "</tool_call>"}]}'
HERMES = '<tool_call>\n{"name": "weather", "arguments": ' + PARIS + "}\n</tool_call>"
LLAMA = '{"name": "weather", "parameters": ' + PARIS + "}"

CALL_TEXTS = {
    HERMES: [("weather", PARIS)],
    "Let me see.\n" + HERMES: [("weather", PARIS)],
    HERMES + "\n" + HERMES.replace("weather", "add") + "\n": [("weather", PARIS), ("add", PARIS)],
    '<tool_call>{"arguments": {"x": 1}, "name": "add"}</tool_call>': [("add", '{"x": 1}')],
    '<tool_call>{"name": "add"}</tool_call>': [("add", "{}")],
    '<tool_call>{"name": "add", "arguments": "{\\"x\\": 1}"}</tool_call>': [("add", '{"x": 1}')],
    '<tool_call>{"name": "add", "arguments": {"x": 1}</tool_call> done': [("add", '{"x": 1}')],
    '<tool_call>{"id": 7, "name": "add", "ok": true, "arguments": {}}</tool_call>': [("add", "{}")],
    '<tool_call>{"name": "add", "arguments": {"x": 1}}': [("add", '{"x": 1}')],
    LLAMA: [("weather", PARIS)],
    "<|python_tag|>" + LLAMA: [("weather", PARIS)],
    " \n" + LLAMA + "; " + LLAMA.replace("weather", "add"): [("weather", PARIS), ("add", PARIS)],
    '{"type": "function", "name": "add", "parameters": {}}': [("add", "{}")],
}

NO_CALLS = [
    "",
    "plain words, and <tool_call without an end",
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    "<tool_call>not json</tool_call>",
    '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": "add", "arguments": "x"}</tool_call>',
    '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    '<tool_call>{"name"',
    "<tool_call>",
    "<tool_call>  ",
    '{"answer": 42}',
    '{"name": "Bob", "age": 5} is a person',
    "<|python_tag|>print(1)",
    "a < b and <tool",
    '<tool_call>{,"name": "add"}</tool_call>',
]


@pytest.mark.parametrize("text", CALL_TEXTS)
def test_calls_are_found_however_the_text_is_cut(text: str) -> None:
    same_however_cut(call_parser(), text)
    found = [(call.name, call.arguments) for call in whole_of(text).calls]
    assert found == CALL_TEXTS[text]
    assert all(isinstance(json.loads(arguments), dict) for _, arguments in found)


@pytest.mark.parametrize("text", NO_CALLS)
def test_what_is_no_call_is_content_to_the_last_character(text: str) -> None:
    assert same_however_cut(call_parser(), text) == ([("content", text)] if text else [])


def test_white_space_next_to_a_call_is_dropped_and_elsewhere_kept() -> None:
    text = "  A b \n\n" + HERMES + "\n\n then \n"
    parsed = same_however_cut(call_parser(), text)
    assert parsed[0] == ("content", "  A b")
    assert parsed[-1] == ("content", "then \n")


def test_arguments_stream_before_the_call_is_complete() -> None:
    parser = call_parser()()
    pieces = parser.push('<tool_call>{"name": "add", "arguments": {"x": 1')
    assert [(p.kind, p.text) for p in pieces] == [("call", ""), ("arguments", '{"x": 1')]
    assert [(p.kind, p.text) for p in parser.push(', "y": 2')] == [("arguments", ', "y": 2')]


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "add", "arguments": {"x": oops}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"x": 1, "y',
        '<tool_call>{"name": "add", "arguments": {"x": 1 </tool_call>',
    ],
)
def test_a_call_with_broken_arguments_is_content_where_the_answer_is_whole(text: str) -> None:
    parsed = same_however_cut(call_parser(), text)
    assert ("call", 0, "add") in parsed
    assert not any(part[0] == "end" and part[2] for part in parsed)
    whole = whole_of(text)
    assert whole.calls == []
    assert whole.content.startswith("<tool_call>")


def test_one_call_only() -> None:
    text = HERMES + HERMES
    parsed = same_however_cut(call_parser(max_calls=1), text)
    assert [part for part in parsed if part[0] == "call"] == [("call", 0, "weather")]


def test_each_format_alone() -> None:
    assert whole_of(LLAMA, ("hermes",)).content == LLAMA
    assert whole_of(HERMES, ("bare",)).content == HERMES


def test_an_answer_of_nothing_but_beginnings_is_bounded() -> None:
    text = '<tool_call>{"a": "' * 2000
    parser = call_parser(("hermes",))()
    pieces = [*parser.push(text), *parser.finish()]
    assert "".join(piece.text for piece in pieces) == text
    assert parser._attempts <= MAX_ATTEMPTS + 1
    long = '<tool_call>{"arguments": {"x": "' + "y" * (MAX_UNCERTAIN_CHARS + 10) + '"}, "name": "add"}'
    assert parse(call_parser(), [long]) == parse(call_parser(), long) == [("content", long)]


PIECES = st.sampled_from(
    [
        "<tool_call>", "</tool_call>", "<|python_tag|>", "<think>", "</think>", "{", "}", "[", "]", '"', "\\",
        ":", ",", '"name"', '"arguments"', '"parameters"', '"add"', '"weather"', " ", "\n", "x", "1", "é",
        '{"name": "add", "arguments": {"x": 1}}', '{"name": "add", "arguments": ', "<", "</", "<tool_", ";",
    ]
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=12).map("".join)


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = draw(TEXTS)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=6)))
    bounds = [0, *cuts, len(text)]
    return text, [text[a:b] for a, b in pairwise(bounds)]


@settings(max_examples=400, deadline=None)
@given(cut_texts(), st.sampled_from([BOTH, ("hermes",), ("bare",)]), st.sampled_from([1, 128]))
def test_any_text_gives_the_same_calls_however_it_is_cut(
    cut: tuple[str, list[str]], formats: tuple[Format, ...], max_calls: int
) -> None:
    text, chunks = cut
    make = call_parser(formats, max_calls)
    assert parse(make, chunks) == parse(make, [text]) == parse(make, text)


@settings(max_examples=300, deadline=None)
@given(cut_texts(), st.booleans())
def test_any_text_gives_the_same_thoughts_and_calls_however_it_is_cut(
    cut: tuple[str, list[str]], inside: bool
) -> None:
    text, chunks = cut

    def make() -> AnswerParser:
        return AnswerParser(ThinkParser(starts_inside=inside), call_parser()())

    assert parse(make, chunks) == parse(make, [text]) == parse(make, text)


@settings(max_examples=200, deadline=None)
@given(cut_texts(), st.sampled_from(["add", None]))
def test_forced_calls_are_the_same_however_cut(cut: tuple[str, list[str]], name: str | None) -> None:
    text, chunks = cut

    def make() -> ForcedCallParser:
        return ForcedCallParser(name, ("add", "weather"))

    assert parse(make, chunks) == parse(make, [text]) == parse(make, text)


def thoughts(inside: bool) -> Callable[[], AnswerParser]:
    return lambda: AnswerParser(ThinkParser(starts_inside=inside), None)


@pytest.mark.parametrize(
    ("inside", "text", "reasoning", "content"),
    [
        (False, "<think>\nhmm, 1 < 2\n</think>\n\nYes.", "hmm, 1 < 2", "Yes."),
        (False, "\n<think>hm</think>Yes. <think>no</think>", "hm", "Yes. <think>no</think>"),
        (False, "No thoughts.", "", "No thoughts."),
        (False, "  indented", "", "  indented"),
        (False, "<think>never closed </thin", "never closed </thin", ""),
        (False, "<think></think>Yes", "", "Yes"),
        (False, "<thinking>", "", "<thinking>"),
        (False, "<thi", "", "<thi"),
        (True, "\nhmm</think>Yes.", "hmm", "Yes."),
        (True, "<think>\nhmm</think>Yes.", "hmm", "Yes."),
        (True, "hmm", "hmm", ""),
        (True, "</think>Yes", "", "Yes"),
        (True, "<th", "<th", ""),
        (False, "   ", "", "   "),
    ],
)
def test_thoughts(inside: bool, text: str, reasoning: str, content: str) -> None:
    expected = [("reasoning", reasoning)] * bool(reasoning) + [("content", content)] * bool(content)
    assert same_however_cut(thoughts(inside), text) == expected


def test_calls_come_after_thoughts_and_not_from_within_them() -> None:
    parser = AnswerParser(ThinkParser(), call_parser()())
    whole = Whole()
    whole.add([*parser.push("<think>" + HERMES + "</think>\n" + HERMES), *parser.finish()])
    assert whole.reasoning == HERMES
    assert whole.content == ""
    assert [call.arguments for call in whole.calls] == [PARIS]


def test_forced_calls() -> None:
    def one() -> ForcedCallParser:
        return ForcedCallParser("add", ("add",))

    assert same_however_cut(one, ' {"x": 1}')[:2] == [("call", 0, "add"), ("arguments", 0, '{"x": 1}')]

    def several() -> ForcedCallParser:
        return ForcedCallParser(None, ("add", "weather"))

    text = '[{"name": "add", "arguments": {"x": 1}}, {"name":"weather","arguments":{}}]'
    parsed = same_however_cut(several, text)
    assert [part for part in parsed if part[0] in ("call", "arguments")] == [
        ("call", 0, "add"), ("arguments", 0, '{"x": 1}'), ("call", 1, "weather"), ("arguments", 1, "{}")
    ]  # fmt: skip
    assert [part[2] for part in parsed if part[0] == "end"] == [True, True]
