"""The output of a response while it is made: items, and the events that tell a client of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from mini_sglang.api.openai.answer import Call, Whole, new_id
from mini_sglang.api.openai.calls import Piece
from mini_sglang.api.openai.door import sse


class EventWriter:
    """Turns the pieces of one answer into events, and keeps the items they tell of.

    Attributes:
        items: the output so far; the last one may still be open.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._numbers = itertools.count()
        self._open = False

    def event(self, kind: str, **data: Any) -> bytes:
        """One event with the next sequence number."""
        return sse({"type": kind, "sequence_number": next(self._numbers), **data}, kind)

    def add(self, pieces: Iterable[Piece], logprobs: list[dict[str, Any]]) -> list[bytes]:
        """The events of some pieces; ``logprobs`` go with the first text among them, and are then emptied."""
        events: list[bytes] = []
        for piece in pieces:
            if piece.kind == "content":
                events += self._text(piece.text, logprobs)
            elif piece.kind == "reasoning":
                events += self._thought(piece.text)
            elif piece.kind == "call":
                events += self._begin(call_item(Call(new_id("call_"), piece.name), "in_progress"))
            elif not self._open or self.items[-1]["type"] != "function_call":
                continue
            elif piece.kind == "arguments":
                self.items[-1]["arguments"] += piece.text
                events.append(self._on_item("response.function_call_arguments.delta", delta=piece.text))
            else:
                events += self.close("completed" if piece.ok else "incomplete")
        return events

    def close(self, status: str) -> list[bytes]:
        """The events that end the open item."""
        if not self._open:
            return []
        self._open = False
        item = self.items[-1]
        item["status"] = status
        events: list[bytes] = []
        if item["type"] == "function_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            events.append(self._on_item("response.function_call_arguments.done", **done))
        else:
            part = item["content"][0]
            done = {"text": part["text"], "content_index": 0}
            if item["type"] == "message":
                events.append(self._on_item("response.output_text.done", logprobs=part["logprobs"], **done))
            else:
                events.append(self._on_item("response.reasoning_text.done", **done))
            events.append(self._on_item("response.content_part.done", part=part, content_index=0))
        return [*events, self._about_item("response.output_item.done")]

    def add_empty(self, status: str) -> list[bytes]:
        """The events of a text without a word."""
        return self._begin(message_item("", [], "in_progress")) + self.close(status)

    def _text(self, text: str, logprobs: list[dict[str, Any]]) -> list[bytes]:
        events = self._switch(message_item("", [], "in_progress"))
        part = self.items[-1]["content"][0]
        given = list(logprobs)
        logprobs.clear()
        part["text"] += text
        part["logprobs"] += given
        delta = {"delta": text, "content_index": 0, "logprobs": given}
        return [*events, self._on_item("response.output_text.delta", **delta)]

    def _thought(self, text: str) -> list[bytes]:
        events = self._switch(reasoning_item("", "in_progress"))
        self.items[-1]["content"][0]["text"] += text
        return [*events, self._on_item("response.reasoning_text.delta", delta=text, content_index=0)]

    def _switch(self, item: dict[str, Any]) -> list[bytes]:
        """Begin ``item`` unless one of its type is open."""
        if self._open and self.items[-1]["type"] == item["type"]:
            return []
        return self._begin(item)

    def _begin(self, item: dict[str, Any]) -> list[bytes]:
        events = self.close("completed")
        self.items.append(item)
        self._open = True
        if item["type"] == "function_call":
            return [*events, self._about_item("response.output_item.added")]
        parts = item["content"]
        item["content"] = []
        events.append(self._about_item("response.output_item.added"))
        item["content"] = parts
        events.append(self._on_item("response.content_part.added", part=parts[0], content_index=0))
        return events

    def _about_item(self, kind: str) -> bytes:
        return self.event(kind, output_index=len(self.items) - 1, item=self.items[-1])

    def _on_item(self, kind: str, **data: Any) -> bytes:
        return self.event(kind, item_id=self.items[-1]["id"], output_index=len(self.items) - 1, **data)


def items_of(whole: Whole, logprobs: list[dict[str, Any]], status: str) -> list[dict[str, Any]]:
    """The output items of a whole answer: thoughts, text, calls; at least an empty text."""
    items: list[dict[str, Any]] = []
    if whole.reasoning:
        items.append(reasoning_item(whole.reasoning, "completed"))
    if whole.content or not whole.calls:
        items.append(message_item(whole.content, logprobs, status))
    return items + [call_item(call, "completed") for call in whole.calls]


def message_item(text: str, logprobs: list[dict[str, Any]], status: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
    return {
        "id": new_id("msg_"),
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [part],
    }


def reasoning_item(text: str, status: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"id": new_id("rs_"), "type": "reasoning", "status": status, "summary": [], "content": content}


def call_item(call: Call, status: str) -> dict[str, Any]:
    return {
        "id": new_id("fc_"),
        "type": "function_call",
        "status": status,
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }


def answer_message(items: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message that these items are, for the turn after it."""
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for item in items:
        if item["type"] == "message":
            texts.append(item["content"][0]["text"])
        elif item["type"] == "function_call":
            function = {"name": item["name"], "arguments": item["arguments"]}
            calls.append({"id": item["call_id"], "type": "function", "function": function})
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    return message | {"tool_calls": calls} if calls else message
