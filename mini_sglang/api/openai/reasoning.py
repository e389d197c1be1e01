"""Takes the thoughts of a reasoning model out of its answer, as the text comes.

Such a model writes ``<think>…</think>`` before the answer. Where its chat template has written the opening
tag already, the answer begins inside.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

OPEN_TAG = "<think>"
CLOSE_TAG = "</think>"


class Thought(NamedTuple):
    """A piece of text and whether it was thought or said."""

    kind: Literal["reasoning", "content"]
    text: str


class ThinkParser:
    """Splits a text given in pieces; how it is cut into pieces changes nothing but the cuts given back.

    Only a block at the very start counts; a later ``<think>`` is content. White space next to the tags is
    dropped. A block that is never closed is reasoning to the end.

    Args:
        starts_inside: whether the prompt ended with the opening tag.
        continues: whether it ended within a thought, which the answer goes on with.
    """

    def __init__(self, *, starts_inside: bool = False, continues: bool = False) -> None:
        self._state: Literal["before", "open", "inside", "closed", "after"] = (
            "inside" if continues else "open" if starts_inside else "before"
        )
        self._starts_inside = starts_inside
        self._held = ""

    def push(self, text: str) -> list[Thought]:
        self._held += text
        result: list[Thought] = []
        if self._state == "before":
            self._begin(result)
        if self._state == "open":
            self._enter()
        if self._state == "inside":
            self._think(result)
        if self._state == "closed":
            self._held = self._held.lstrip()
            if self._held:
                self._state = "after"
        if self._state == "after" and self._held:
            result.append(Thought("content", self._held))
            self._held = ""
        return result

    def finish(self) -> list[Thought]:
        """What was held back; nothing may be pushed after it."""
        held, self._held = self._held, ""
        if self._state == "before" and held:
            return [Thought("content", held)]
        if self._state == "open" and self._starts_inside:
            held = held.lstrip()
        if self._state in ("open", "inside") and held.rstrip():
            return [Thought("reasoning", held.rstrip())]
        return []

    def _begin(self, result: list[Thought]) -> None:
        start = self._held.lstrip()
        if start.startswith(OPEN_TAG):
            self._held = start[len(OPEN_TAG) :]
            self._state = "open"
            self._starts_inside = False
        elif not OPEN_TAG.startswith(start):
            self._state = "after"

    def _enter(self) -> None:
        """Drop the white space after the opening tag, and a tag that repeats the prompt's."""
        start = self._held.lstrip()
        if self._starts_inside and OPEN_TAG.startswith(start[: len(OPEN_TAG)]):
            if len(start) < len(OPEN_TAG):
                return
            start = start[len(OPEN_TAG) :].lstrip()
            self._starts_inside = False
        self._held = start
        if start:
            self._state = "inside"

    def _think(self, result: list[Thought]) -> None:
        thought, tag, rest = self._held.partition(CLOSE_TAG)
        if tag:
            self._held, self._state = rest, "closed"
            thought = thought.rstrip()
        else:
            keep = held_back(thought, CLOSE_TAG)
            # White space is held too, as the closing tag may follow it.
            certain = thought[: len(thought) - keep].rstrip()
            self._held = thought[len(certain) :]
            thought = certain
        if thought:
            result.append(Thought("reasoning", thought))


def held_back(text: str, tag: str) -> int:
    """How many of the last characters of ``text`` may be the beginning of ``tag``."""
    for size in range(min(len(tag) - 1, len(text)), 0, -1):
        if tag.startswith(text[-size:]):
            return size
    return 0
