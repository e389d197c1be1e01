"""The sockets below ASGI, which has no word for "give this reader up"."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_LOOK_SECONDS = 0.02


class Connection:
    """The transport that a response goes to, where the ASGI server lets it be found.

    Attributes:
        send: the server's own, for the parts of a body: the layers between look at how a response begins
            and at nothing after that.
    """

    def __init__(self, transport: Any, send: Any = None) -> None:
        self._transport = transport
        self.send = send

    def cut(self) -> None:
        """Drop the connection with what is still unsent: closing would wait for a reader that never reads."""
        if self._transport is None:
            return
        raw = self._transport.get_extra_info("socket")
        if raw is not None:
            # Without a reset the system would go on for minutes to offer what is in its own buffer.
            with suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    async def flush(self, timeout: float) -> None:
        """Wait until the reader took what was written; past ``timeout`` seconds cut it off."""
        if self._transport is None or not self._transport.get_write_buffer_size():
            return
        try:
            async with asyncio.timeout(timeout):
                while self._transport.get_write_buffer_size() and not self._transport.is_closing():
                    await asyncio.sleep(_LOOK_SECONDS)
        except TimeoutError:
            self.cut()


class Connections:
    """Those with a request in progress."""

    def __init__(self) -> None:
        self._open: set[Connection] = set()

    @contextmanager
    def hold(self, send: Any) -> Iterator[Connection]:
        # uvicorn's ``send`` is a method of the object that has the transport, for each of its protocols.
        transport = getattr(getattr(send, "__self__", None), "transport", None)
        connection = Connection(transport if hasattr(transport, "abort") else None, send)
        self._open.add(connection)
        try:
            yield connection
        finally:
            self._open.discard(connection)

    def __len__(self) -> int:
        return len(self._open)

    def cut_all(self) -> None:
        for connection in list(self._open):
            connection.cut()
