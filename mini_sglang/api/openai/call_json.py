"""The JSON object of one tool call, read as it comes."""

from __future__ import annotations

import json
import re
from typing import Any, Literal

_SPACE = " \t\r\n"
# Outside of strings nothing else can be JSON: a tag or a word ends the call.
_OUTSIDE = frozenset(_SPACE + '{}[]:,"+-.0123456789eEtrufalsn')
_STRING_STOP = re.compile(r'["\\]')
_ARGUMENT_KEYS = ("arguments", "parameters")


class CallObject:
    """Reads ``{"name": …, "arguments": …}`` from its ``{`` on, with the keys in any order.

    Attributes:
        text: what was read.
        name: the value of ``name``, once complete.
        done: whether the closing brace was read.
        failed: whether this cannot become such an object; the character that tells is not in ``text``.
        arguments_complete: whether the value of the arguments has ended.
    """

    def __init__(self) -> None:
        self.text = ""
        self.name: str | None = None
        self.done = False
        self.failed = False
        self.arguments_complete = False
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._expect: Literal["key", "colon", "value", "comma", "inside"] = "key"
        self._key = ""
        self._is_key = False
        self._start = 0
        self._arguments: tuple[int, int | None] | None = None

    def feed(self, text: str) -> str:
        """Read on; returns what comes after the object, or from the character on that cannot be in it."""
        base = len(self.text)
        self.text += text
        place, end = base, len(self.text)
        while place < end and not self.done:
            if self._in_string and not self._escaped:
                match = _STRING_STOP.search(self.text, place)
                if match is None:
                    return ""
                place = match.start()
            if not self._take(self.text[place], place):
                self.failed = True
                break
            place += 1
        rest = self.text[place:]
        self.text = self.text[:place]
        return rest

    @property
    def streams_arguments(self) -> bool:
        """Whether the arguments have begun, as a JSON object."""
        return self._arguments is not None and self.text[self._arguments[0]] == "{"

    @property
    def arguments_text(self) -> str:
        """The arguments read so far, as they are written."""
        if self._arguments is None:
            return ""
        return self.text[self._arguments[0] : self._arguments[1]]

    def arguments(self) -> str | None:
        """The whole arguments as the text of a JSON object; ``None`` where they are none (yet).

        A call without arguments has ``{}``; arguments written as a string that holds JSON are unpacked.
        """
        if self._arguments is None:
            return "{}" if self.done else None
        if not self.arguments_complete:
            return None
        text = self.arguments_text
        value = _load(text)
        if isinstance(value, str):
            text, value = value, _load(value)
        return text if isinstance(value, dict) else None

    def _take(self, char: str, place: int) -> bool:
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif char == "\\":
                self._escaped = True
            else:
                self._in_string = False
                if self._depth == 1:
                    return self._end_string(place + 1)
            return True
        if char not in _OUTSIDE:
            return False
        if self._depth == 0:
            self._depth = 1
            return char == "{"
        if self._depth > 1:
            self._nested(char, place)
            return True
        return self._top(char, place)

    def _nested(self, char: str, place: int) -> None:
        if char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            if self._depth == 1:
                self._end_value(place + 1)

    def _top(self, char: str, place: int) -> bool:
        """A character between the outer braces and outside of their values' insides."""
        if self._expect == "inside":
            # A number, true, false or null ends with what follows it.
            if char not in _SPACE + ",}":
                return char not in '{["]:'
            self._end_value(place)
        if char in _SPACE:
            return True
        if self._expect == "key":
            self._in_string = self._is_key = char == '"'
            self._start = place
            if char == "}" and not self._key:
                self.done = True
                return True
            return self._in_string
        if self._expect == "colon":
            self._expect = "value"
            return char == ":"
        if self._expect == "value":
            return self._begin_value(char, place)
        if char == ",":
            self._expect = "key"
            return True
        self.done = char == "}"
        return self.done

    def _begin_value(self, char: str, place: int) -> bool:
        if char in "}],:":
            return False
        self._start = place
        if self._key in _ARGUMENT_KEYS:
            if self._arguments is not None:
                return False
            self._arguments = (place, None)
        self._in_string = char == '"'
        self._expect = "inside"
        if char in "{[":
            self._depth += 1
        return True

    def _end_string(self, end: int) -> bool:
        if not self._is_key:
            return self._end_value(end)
        self._is_key = False
        key = _load(self.text[self._start : end])
        if not isinstance(key, str) or not key:
            return False
        self._key, self._expect = key, "colon"
        return True

    def _end_value(self, end: int) -> bool:
        self._expect = "comma"
        if self._key in _ARGUMENT_KEYS:
            assert self._arguments is not None
            self._arguments = (self._arguments[0], end)
            self.arguments_complete = True
        elif self._key == "name":
            name = _load(self.text[self._start : end])
            if not isinstance(name, str) or self.name is not None:
                return False
            self.name = name
        return True


def _load(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
