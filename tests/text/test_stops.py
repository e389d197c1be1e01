from __future__ import annotations

from collections.abc import Iterable

from hypothesis import example, given, settings
from hypothesis import strategies as st

from mini_sglang.text.stops import StopMatcher

few_letters = st.text("ab", min_size=1, max_size=5)
stop_lists = st.lists(few_letters, max_size=4)


def stream(stops: Iterable[str], pieces: Iterable[str]) -> tuple[list[str], str | None]:
    matcher = StopMatcher(list(stops))
    given_texts, matched = [], None
    for piece in pieces:
        text, matched = matcher.push(piece)
        given_texts.append(text)
    return [*given_texts, matcher.finish()], matched


def brute_force(stops: list[str], text: str) -> tuple[str, str | None]:
    """Read character by character; stop at the first one that completes any stop string."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


def could_become(stops: list[str], text: str) -> bool:
    return any(stop.startswith(text) and stop != text for stop in stops)


@settings(max_examples=600, deadline=None)
@given(stop_lists, st.lists(st.text("abc", max_size=6), max_size=8))
@example(["abab", "ba"], ["a", "b", "a", "b"])
@example(["aab"], ["aa", "ab"])
@example(["ab", "abb"], ["abb"])
@example(["bb", "abb"], ["a", "bb"])
def test_equals_reading_character_by_character(stops: list[str], pieces: list[str]) -> None:
    texts, matched = stream(stops, pieces)
    assert ("".join(texts), matched) == brute_force(stops, "".join(pieces))


@settings(max_examples=300, deadline=None)
@given(stop_lists, st.lists(st.text("abc", max_size=6), max_size=8))
def test_holds_back_only_what_could_become_a_stop_string(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(stops)
    seen = sent = ""
    for piece in pieces:
        text, matched = matcher.push(piece)
        seen, sent = seen + piece, sent + text
        if matched is not None:
            return
        held = seen[len(sent) :]
        assert seen == sent + held
        assert held == "" or could_become(stops, held)
        # Nothing that was given could have become one.
        assert not any(could_become(stops, seen[i:]) for i in range(len(sent)))


def test_a_match_ends_the_text_for_good() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("one EN") == ("one ", None)
    assert matcher.push("D two") == ("", "END")
    assert matcher.push("three END") == ("", "END")
    assert matcher.finish() == ""


def test_what_was_held_is_given_at_the_end() -> None:
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("bye\n\nUse") == ("bye", None)
    assert matcher.finish() == "\n\nUse"


def test_without_stop_strings_everything_passes() -> None:
    assert stream([], ["a", "", "b"]) == (["a", "", "b", ""], None)


def test_long_hostile_stop_strings_cost_little() -> None:
    stops = ["a" * 1000 + str(i) for i in range(16)]
    texts, matched = stream(stops, ["a"] * 1500 + ["x"])
    assert ("".join(texts), matched) == ("a" * 1500 + "x", None)
    assert stream(stops, ["a"] * 1500 + ["7"])[1] == stops[7]
