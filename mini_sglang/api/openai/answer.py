"""What an answer's text is made of: thoughts, words and tool calls."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from mini_sglang.api.openai.calls import Piece
from mini_sglang.api.openai.reasoning import ThinkParser


class PieceParser(Protocol):
    def push(self, text: str) -> list[Piece]: ...
    def finish(self) -> list[Piece]: ...


class AnswerParser:
    """Splits one answer, given in pieces, into ``Piece``s.

    Args:
        thinking: takes thoughts out first; ``None`` where they are content.
        calls: finds calls in the rest; ``None`` where there are none to find.
    """

    def __init__(self, thinking: ThinkParser | None, calls: PieceParser | None) -> None:
        self._thinking = thinking
        self._calls = calls

    def push(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._thinking is None:
            return self._content(text)
        return [piece for part in self._thinking.push(text) for piece in self._part(*part)]

    def finish(self) -> list[Piece]:
        result: list[Piece] = []
        if self._thinking is not None:
            for part in self._thinking.finish():
                result += self._part(*part)
        if self._calls is not None:
            result += self._calls.finish()
        return result

    def _part(self, kind: str, text: str) -> list[Piece]:
        return [Piece("reasoning", text)] if kind == "reasoning" else self._content(text)

    def _content(self, text: str) -> list[Piece]:
        return [Piece("content", text)] if self._calls is None else self._calls.push(text)


@dataclass(slots=True)
class Call:
    """A tool call: its id, the tool and the arguments as JSON text."""

    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Whole:
    """A whole answer, folded from its pieces.

    A call whose arguments turned out to be no JSON object is content, as the model wrote it.
    """

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    _open: Call | None = None

    def add(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if piece.kind == "reasoning":
                self.reasoning += piece.text
            elif piece.kind == "content":
                self.content += piece.text
            elif piece.kind == "call":
                self._open = Call(new_id("call_"), piece.name)
            elif self._open is None:
                continue
            elif piece.kind == "arguments":
                self._open.arguments += piece.text
            else:
                if piece.ok:
                    self.calls.append(self._open)
                else:
                    self.content += piece.text
                self._open = None


def new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


def call_json(call: Call) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
