"""What the rank that leads and those that follow say to each other: typed msgpack in frames, over pipes.

A message that does not fit its type is refused by the decoder, with ``msgspec.MsgspecError``.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import IO

import msgspec

from mini_sglang.backend.step import SampleSpec, SequenceStep
from mini_sglang.config import Scalar
from mini_sglang.types import SamplingParams

_LENGTH_BYTES = 4


class Join(msgspec.Struct, array_like=True, tag="join"):
    """To a follower, first: which model to load, and its place.

    Attributes:
        folder: private to the ranks, to find one another in.
        sharing: backends that are loaded side by side, as ``load_backend`` takes it.
        settings: by field name; a follower takes none from its environment.
    """

    rank: int
    size: int
    folder: str
    path: str
    sharing: int
    settings: dict[str, Scalar]


class Rows(msgspec.Struct, array_like=True):
    """A ``SequenceStep`` without what only matters to who chooses tokens.

    Attributes:
        pages: as the bytes of an ``array("i")``.
        chosen: how many of the last rows a token is chosen after.
        targets: how many of the first rows have prompt logprobs.
    """

    token_ids: list[int]
    start: int
    pages: bytes
    chosen: int
    targets: int

    @classmethod
    def of(cls, step: SequenceStep) -> Rows:
        chosen = 0 if step.sample is None else 1 + len(step.draft_samples)
        return cls(list(step.token_ids), step.start, step.pages.tobytes(), chosen, len(step.prompt_targets))

    def step(self) -> SequenceStep:
        spec = SampleSpec(SamplingParams(), seed=0, index=0)
        return SequenceStep(
            self.token_ids,
            self.start,
            array("i", self.pages),
            sample=spec if self.chosen else None,
            prompt_targets=[0] * self.targets,
            draft_samples=[spec] * (self.chosen - 1),
        )


class Run(msgspec.Struct, array_like=True, tag="run"):
    """To a follower: run a step."""

    steps: list[Rows]


class CopyPages(msgspec.Struct, array_like=True, tag="copy"):
    """To a follower, as the next three: what ``PageStore`` does under the same name."""

    sources: list[int]
    targets: list[int]


class OpenHost(msgspec.Struct, array_like=True, tag="open_host"):
    num_slots: int


class Spill(msgspec.Struct, array_like=True, tag="spill"):
    pages: list[int]
    slots: list[int]


class Restore(msgspec.Struct, array_like=True, tag="restore"):
    slots: list[int]
    pages: list[int]


class Hello(msgspec.Struct, array_like=True, tag="hello"):
    """From a follower: it is about to look for the others."""


class Ready(msgspec.Struct, array_like=True, tag="ready"):
    """From a follower: it waits for steps."""


class Alive(msgspec.Struct, array_like=True, tag="alive"):
    """From a follower, again and again: its process is not stopped."""


class Failed(msgspec.Struct, array_like=True, tag="failed"):
    """From a follower: it cannot start or go on, and why. Nothing comes after it."""

    message: str


Command = Join | Run | CopyPages | OpenHost | Spill | Restore
Message = Hello | Ready | Alive | Failed


class Codec:
    """An encoder and decoders, for one thread."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._commands = msgspec.msgpack.Decoder(Command)
        self._messages = msgspec.msgpack.Decoder(Message)

    def frame(self, message: Command | Message) -> bytes:
        """A message with its length before it."""
        body = self._encoder.encode(message)
        return len(body).to_bytes(_LENGTH_BYTES, "little") + body

    def command(self, body: bytes) -> Command:
        command: Command = self._commands.decode(body)
        return command

    def message(self, body: bytes) -> Message:
        message: Message = self._messages.decode(body)
        return message


def rows_of(steps: Sequence[SequenceStep]) -> list[Rows]:
    return [Rows.of(step) for step in steps]


def read_frame(stream: IO[bytes]) -> bytes | None:
    """The next message's bytes; ``None`` where the other end is gone."""
    head = stream.read(_LENGTH_BYTES)
    if len(head) < _LENGTH_BYTES:
        return None
    length = int.from_bytes(head, "little")
    body = stream.read(length)
    return body if len(body) == length else None
