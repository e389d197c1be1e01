"""The messages between a server and its engines' processes: typed msgpack, never pickle.

A message that does not fit its type is refused by the decoder, with ``msgspec.MsgspecError``.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import msgspec

from mini_sglang.config import Scalar
from mini_sglang.engine.handle import EngineInfo, Work
from mini_sglang.types import Adapter, FinishReason, TokenEvent


class Setup(msgspec.Struct, array_like=True, tag="setup"):
    """To the child, first: which model to load and how.

    Attributes:
        settings: by field name; the child takes nothing from its environment.
        description: goes into ``EngineInfo.description``, before the backend's own.
        num_engines: how many share this machine.
    """

    index: int
    num_engines: int
    settings: dict[str, Scalar]
    description: dict[str, str | int]


class Submit(msgspec.Struct, array_like=True, tag="submit"):
    """To the child: a request. ``serial`` names it in the journal of what was started.

    ``work`` is decoded on its own, so that one that cannot be read fails alone.
    """

    serial: int
    request_id: str
    work: msgspec.Raw


class Abort(msgspec.Struct, array_like=True, tag="abort"):
    request_id: str
    reason: FinishReason


class LoadAdapter(msgspec.Struct, array_like=True, tag="load_adapter"):
    """To the child: load an adapter, ``at_once`` or beside the steps. ``AdapterLoaded`` answers."""

    serial: int
    adapter: Adapter
    at_once: bool


class UnloadAdapter(msgspec.Struct, array_like=True, tag="unload_adapter"):
    key: str


class Close(msgspec.Struct, array_like=True, tag="close"):
    """To the child: end all requests with an event, then end."""


class Hello(msgspec.Struct, array_like=True, tag="hello"):
    """From the child, first: where it takes commands."""

    address: str


class Notice(msgspec.Struct, array_like=True, tag="notice"):
    """From the child while it loads, or saves at its end: a line for the user."""

    line: str


class Ready(msgspec.Struct, array_like=True, tag="ready"):
    """From the child: the model is loaded."""

    info: EngineInfo


class Failed(msgspec.Struct, array_like=True, tag="failed"):
    """From the child: it cannot start or go on, and why. Nothing comes after it."""

    message: str


class AdapterLoaded(msgspec.Struct, array_like=True, tag="adapter_loaded"):
    """From the child: the adapter of ``LoadAdapter`` is loaded, or why it cannot be."""

    serial: int
    failure: str | None = None


class Report(msgspec.Struct, array_like=True, tag="report"):
    """From the child: all events since the last report, or none as a sign of life.

    ``stats`` is None where the last one is still fresh.
    """

    events: list[TokenEvent]
    stats: dict[str, int] | None = None


Command = Setup | Submit | Abort | LoadAdapter | UnloadAdapter | Close
Message = Hello | Notice | Ready | Failed | AdapterLoaded | Report


def _plain(value: object) -> Any:
    if isinstance(value, MappingProxyType):  # SamplingParams.logit_bias
        return dict(value)
    raise NotImplementedError(f"{type(value).__name__} cannot be sent to another process")


class Codec:
    """Encoders and decoders for one thread; they are not to be shared between threads."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder(enc_hook=_plain)
        self._commands = msgspec.msgpack.Decoder(Command)
        self._messages = msgspec.msgpack.Decoder(Message)
        self._works = msgspec.msgpack.Decoder(Work)

    def encode(self, message: Command | Message) -> bytes:
        return self._encoder.encode(message)

    def submit(self, serial: int, work: Work) -> bytes:
        return self._encoder.encode(Submit(serial, work.request_id, msgspec.Raw(self._encoder.encode(work))))

    def command(self, data: bytes) -> Command:
        command: Command = self._commands.decode(data)
        return command

    def message(self, data: bytes) -> Message:
        message: Message = self._messages.decode(data)
        return message

    def work(self, submit: Submit) -> Work:
        return self._works.decode(submit.work)
