"""From the bytes of a stream to its messages, wherever the bytes were cut."""

from __future__ import annotations

from typing import Protocol


class Frames(Protocol):
    """Takes a body's bytes in any pieces and gives each message's payload once it is whole."""

    def feed(self, data: bytes) -> list[bytes]: ...

    def close(self) -> list[bytes]:
        """What was still waiting for its end, where the body's end ends it too."""
        ...


class Lines:
    """One message a line (``application/x-ndjson``); empty lines are none."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        return [line for line in lines if not line.isspace() and line]

    def close(self) -> list[bytes]:
        rest, self._rest = self._rest, b""
        return [rest] if rest.strip() else []


class ServerSentEvents:
    """Payloads of ``text/event-stream``: the ``data`` of each event, and ``error`` as llama-server had it.

    Comments, other fields and an event that the stream's end cuts off are dropped, as the format says.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        found = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if not line:
                if self._data:
                    found.append(b"\n".join(self._data))
                    self._data = []
                continue
            field, _, value = line.partition(b":")
            if field in (b"data", b"error"):
                self._data.append(value.removeprefix(b" "))
        return found

    def close(self) -> list[bytes]:
        self._rest, self._data = b"", []
        return []
