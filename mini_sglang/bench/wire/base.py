"""What is asked of a server and what its stream says, whatever the dialect."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from mini_sglang.bench.wire.frames import Frames
from mini_sglang.errors import MiniSglangError


class WireError(MiniSglangError):
    """A server that cannot be asked this way, in one sentence."""


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    Attributes:
        new_tokens: tokens to generate at most; exactly so many where ``ignore_eos`` is kept.
        ids: the prompt as token ids; else ``text``, else ``messages``.
        temperature: 0 is greedy.
        priority: passed on where the dialect has such a field.
        extra: further fields of the body; they win over those made here.
    """

    new_tokens: int
    ids: Sequence[int] | None = None
    text: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    temperature: float = 0.0
    ignore_eos: bool = True
    seed: int | None = None
    priority: int | None = None
    model: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Event:
    """What one message of a stream says; None where it does not say.

    Attributes:
        ids: of the tokens that came with it.
        text: the text that came with it.
        made: tokens of the answer up to here, by the server's count.
        output_tokens, prompt_tokens, cached_tokens: the totals at the end.
        finish: why the answer ended.
        error: what the server says went wrong.
        last: nothing is to follow.
    """

    ids: list[int] | None = None
    text: str = ""
    made: int | None = None
    output_tokens: int | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    finish: str | None = None
    error: str | None = None
    last: bool = False


class Reader:
    """Makes events of the bytes of one answer; give it the bytes as they come, then ``close`` it."""

    def __init__(self, frames: Frames, parse: Callable[[bytes], Event | None]) -> None:
        self._frames = frames
        self._parse = parse

    def feed(self, data: bytes) -> list[Event]:
        return self._events(self._frames.feed(data))

    def close(self) -> list[Event]:
        return self._events(self._frames.close())

    def _events(self, payloads: list[bytes]) -> list[Event]:
        found = []
        for payload in payloads:
            try:
                event = self._parse(payload)
            except (msgspec.DecodeError, AttributeError, KeyError, TypeError, ValueError):
                # Whatever a server sends must end in a report, never in a fault of ours.
                event = Event(error=f"a message that cannot be read: {shown(payload)}")
            if event is not None:
                found.append(event)
        return found


@dataclass(frozen=True)
class Dialect:
    """How one kind of server is asked.

    Attributes:
        name: on the command line.
        path: of its endpoint.
        takes: forms of a prompt, best first: ``ids``, ``text``, ``messages``.
        gives_ids: whether its stream names the token ids.
        body: the JSON body of a streamed request.
        reader: a new reader for each answer.
        note: what its figures cannot tell, shown under them.
    """

    name: str
    path: str
    takes: tuple[str, ...]
    gives_ids: bool
    body: Callable[[Ask], dict[str, Any]]
    reader: Callable[[], Reader]
    note: str = ""


def shown(data: bytes, most: int = 200) -> str:
    """Bytes for an error's text: decoded, on one line, cut."""
    text = " ".join(data[: 4 * most].decode(errors="replace").split())
    return text if len(text) <= most else text[:most] + "…"


def error_text(body: Any) -> str | None:
    """The sentence in an error's JSON, in any of the shapes that servers use; None where it is no error."""
    if not isinstance(body, Mapping):
        return None
    error = body.get("error", body.get("detail"))
    if error is None and body.get("object") == "error":
        error = body
    if isinstance(error, Mapping):
        error = error.get("message", error)
    return None if error is None else shown(str(error).encode())
