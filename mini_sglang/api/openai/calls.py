"""Finds the tool calls in a model's answer, as the text comes.

Two formats: Hermes, also Qwen's, ``<tool_call>{"name": …, "arguments": {…}}</tool_call>`` anywhere in the
text; and Llama 3's bare ``{"name": …, "parameters": {…}}`` at its start, with or without ``<|python_tag|>``.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from mini_sglang.api.openai.call_json import CallObject
from mini_sglang.api.openai.reasoning import held_back

OPEN_TAG = "<tool_call>"
CLOSE_TAG = "</tool_call>"
PYTHON_TAG = "<|python_tag|>"

Format = Literal["hermes", "bare"]

# What must be seen before a call is certain, and how often it may be tried: an answer that only looks like
# calls, over and over, must not cost more than its length.
MAX_UNCERTAIN_CHARS = 8192
MAX_ATTEMPTS = 128


@dataclass(frozen=True, slots=True)
class Piece:
    """One thing found in an answer.

    ``content`` and ``reasoning`` have text. ``call`` opens the call number ``index`` of the tool ``name``,
    ``arguments`` adds text to it, ``call_end`` closes it: ``ok`` tells whether the arguments are a JSON
    object, and ``text`` is then what the model wrote for the whole call.
    """

    kind: Literal["content", "reasoning", "call", "arguments", "call_end"]
    text: str = ""
    index: int = 0
    name: str = ""
    ok: bool = True


class CallParser:
    """Splits a text given in pieces into content and calls; how it is cut changes only the cuts.

    What begins like a call and is none (another JSON text, a name that is no tool) is content. Once a name
    is known and its arguments have begun they are given as they come, and cannot be taken back.

    Args:
        names: the tools that may be called.
        formats: what to look for.
        max_calls: calls given at most; the text of further ones is dropped.
    """

    def __init__(
        self, names: Collection[str], formats: Collection[Format], max_calls: int = MAX_ATTEMPTS
    ) -> None:
        self._names = frozenset(names)
        self._hermes = "hermes" in formats
        self._bare = "bare" in formats
        self._max_calls = max_calls
        self._state: Literal["start", "content", "tag", "object", "after"] = "start"
        self._held = ""
        self._space = ""
        self._attempts = 0
        self._tag = ""
        self._object = CallObject()
        self._sent = 0
        self._committed = False
        self._after_call = False
        self.calls = 0

    def push(self, text: str) -> list[Piece]:
        self._held += text
        result: list[Piece] = []
        # Each state takes what it can; it is done when a turn changes neither the state nor the text.
        while True:
            before = self._state, len(self._held)
            getattr(self, f"_in_{self._state}")(result)
            if (self._state, len(self._held)) == before:
                return result

    def finish(self) -> list[Piece]:
        """What was held back; nothing may be pushed after it."""
        result: list[Piece] = []
        if self._state == "object" and self._committed:
            self._end_call(result, ok=self._object.arguments() is not None)
        elif self._state == "object":
            self._say(result, self._tag + self._object.text)
        elif self._state == "tag":
            self._say(result, self._tag + self._held)
        elif self._state in ("content", "start"):
            self._say(result, self._held)
        if self._space and not self._after_call:
            result.append(Piece("content", self._space))
        self._held = self._space = ""
        return result

    def _in_start(self, result: list[Piece]) -> None:
        text = self._held.lstrip()
        if self._bare and (not text or (len(text) < len(PYTHON_TAG) and PYTHON_TAG.startswith(text))):
            return
        if self._bare and text.startswith(PYTHON_TAG):
            rest = text[len(PYTHON_TAG) :].lstrip()
            if not rest:
                return
            if rest[0] == "{":
                self._try(self._held[: len(self._held) - len(rest)], rest)
                return
        elif self._bare and text[0] == "{":
            self._try(self._held[: len(self._held) - len(text)], text)
            return
        self._state = "content"

    def _in_content(self, result: list[Piece]) -> None:
        text = self._held
        if not self._hermes or self._attempts >= MAX_ATTEMPTS:
            self._held = ""
            self._say(result, text)
            return
        place = text.find(OPEN_TAG)
        if place < 0:
            cut = len(text) - held_back(text, OPEN_TAG)
            self._held = text[cut:]
            self._say(result, text[:cut])
            return
        self._say(result, text[:place])
        self._state, self._tag, self._held = "tag", OPEN_TAG, text[place + len(OPEN_TAG) :]

    def _in_tag(self, result: list[Piece]) -> None:
        rest = self._held.lstrip()
        if rest and rest[0] == "{":
            self._try(self._tag + self._held[: len(self._held) - len(rest)], rest)
        elif rest or len(self._held) > MAX_UNCERTAIN_CHARS:
            self._attempts += 1
            self._say(result, self._tag)
            self._state = "content"

    def _in_object(self, result: list[Piece]) -> None:
        call = self._object
        # An uncertain call is read up to the bound only, however much has come at once.
        room = len(self._held) if self._committed else MAX_UNCERTAIN_CHARS + 1 - len(call.text)
        self._held = call.feed(self._held[:room]) + self._held[room:]
        if not self._committed and call.name in self._names and call.streams_arguments:
            self._open_call(result)
        if self._committed:
            if new := call.arguments_text[self._sent :]:
                self._sent += len(new)
                self._emit(result, Piece("arguments", new, self.calls))
            if call.failed or call.done:
                self._end_call(result, ok=call.arguments() is not None)
        elif call.failed or call.done or call.name not in (None, *self._names):
            if call.name in self._names and call.arguments() is not None:
                self._give_whole(result)
            else:
                self._give_up(result)
        elif len(call.text) > MAX_UNCERTAIN_CHARS:
            self._give_up(result)

    def _in_after(self, result: list[Piece]) -> None:
        """Between a call and what follows: its closing tag, white space, Llama's ``;``."""
        text = self._held.lstrip()
        if self._tag.startswith(OPEN_TAG):
            if text.startswith(CLOSE_TAG):
                self._tag, self._held = "", text[len(CLOSE_TAG) :]
                return
            if CLOSE_TAG.startswith(text):
                self._held = text
                return
        elif self._bare:
            text = text.lstrip("; \t\r\n")
            if not text:
                self._held = ""
                return
            if text[0] == "{" and self._attempts < MAX_ATTEMPTS:
                self._try("", text)
                return
        if text:
            self._held, self._state = text, "content"

    def _try(self, tag: str, text: str) -> None:
        self._attempts += 1
        self._object, self._tag, self._held, self._state = CallObject(), tag, text, "object"
        self._sent, self._committed = 0, False

    def _give_up(self, result: list[Piece]) -> None:
        """No call: its first character is content, and the rest is looked at again."""
        text = self._object.text
        first = self._tag + text[:1]
        self._held = text[1:] + self._held
        self._state = "content"
        self._say(result, first)

    def _open_call(self, result: list[Piece]) -> None:
        assert self._object.name is not None
        self._committed = True
        # White space before a call only separates it from what was said.
        self._space, self._after_call = "", True
        self._emit(result, Piece("call", "", self.calls, self._object.name))

    def _give_whole(self, result: list[Piece]) -> None:
        arguments = self._object.arguments()
        assert arguments is not None
        self._open_call(result)
        self._emit(result, Piece("arguments", arguments, self.calls))
        self._end_call(result, ok=True)

    def _end_call(self, result: list[Piece], *, ok: bool) -> None:
        written = self._tag + self._object.text
        self._emit(result, Piece("call_end", written, self.calls, self._object.name or "", ok))
        self.calls += 1
        self._state, self._committed = "after", False

    def _emit(self, result: list[Piece], piece: Piece) -> None:
        if self.calls < self._max_calls:
            result.append(piece)

    def _say(self, result: list[Piece], text: str) -> None:
        """Give content, less white space at its end, which a call may follow."""
        if not text:
            return
        text = self._space + text
        said = text.rstrip()
        self._space = text[len(said) :]
        if said:
            self._after_call = False
            result.append(Piece("content", said))


class ForcedCallParser:
    """Reads an answer that a grammar has made: calls and nothing else.

    Args:
        name: the one tool, whose arguments the whole answer is; ``None`` where the answer is a JSON list
            of ``{"name": …, "arguments": …}``.
        names: the tools that may be called.
    """

    def __init__(self, name: str | None, names: Collection[str]) -> None:
        self._name = name
        self._names = frozenset(names)
        self._text = ""
        self._object: CallObject | None = None
        self._sent = 0
        self._open = False
        self._failed = False
        self.calls = 0

    def push(self, text: str) -> list[Piece]:
        if self._failed:
            return [Piece("content", text)]
        return self._push_one(text) if self._name is not None else self._push_list(text)

    def finish(self) -> list[Piece]:
        result: list[Piece] = []
        if self._name is not None and self._open:
            ok = _is_object(self._text)
            result.append(Piece("call_end", self._text, 0, self._name, ok))
            self.calls = 1
        elif self._open and self._object is not None:
            result.append(Piece("call_end", self._object.text, self.calls, self._object.name or "", False))
            self.calls += 1
        elif self._object is not None:
            result.append(Piece("content", self._object.text))
        self._open = False
        return result

    def _push_one(self, text: str) -> list[Piece]:
        assert self._name is not None
        text = text if self._open else text.lstrip()
        if not text:
            return []
        result = [] if self._open else [Piece("call", "", 0, self._name)]
        self._open = True
        self._text += text
        return [*result, Piece("arguments", text, 0)]

    def _push_list(self, text: str) -> list[Piece]:
        result: list[Piece] = []
        while text:
            if self._object is None:
                text = text[text.find("{") :] if "{" in text else ""
                if not text:
                    break
                self._object, self._sent = CallObject(), 0
            call = self._object
            text = call.feed(text)
            if not self._open and call.name is not None and call.streams_arguments:
                self._open = True
                result.append(Piece("call", "", self.calls, call.name))
            if self._open and (new := call.arguments_text[self._sent :]):
                self._sent += len(new)
                result.append(Piece("arguments", new, self.calls))
            if call.done or call.failed:
                if self._open:
                    ok = call.arguments() is not None and call.name in self._names
                    result.append(Piece("call_end", call.text, self.calls, call.name or "", ok))
                    self.calls += 1
                else:
                    result.append(Piece("content", call.text))
                self._object, self._open = None, False
                if call.failed:
                    # A grammar does not let this come; what comes all the same is passed on as it is.
                    self._failed = True
                    return [*result, Piece("content", text)] if text else result
        return result


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
