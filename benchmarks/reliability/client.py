"""A plain HTTP client over asyncio streams that sees every piece as it comes and can leave at any moment."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

LIMIT_SECONDS = 300.0
"""A guard against a hang: the longest a client waits for the next piece."""


class BrokenOffError(Exception):
    """The response ended before its end."""


class Exchange:
    """One request on a connection of its own.

    ``async with Exchange(port, path, body) as one: await one.head(); async for piece in one.pieces(): …``.
    Leaving the block closes the connection, whatever is still to come.

    Attributes:
        status, headers: of the response, once ``head`` has returned.
        request: the bytes that are sent.
        sent_at: when the request was sent, by ``time.perf_counter``.
        whole: whether the response has come to its end.
    """

    def __init__(
        self,
        port: int,
        path: str,
        body: Any = None,
        *,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        data = b"" if body is None else json.dumps(body).encode()
        lines = {"Host": f"127.0.0.1:{port}", "Connection": "close", **(headers or {})}
        if body is not None:
            lines |= {"Content-Type": "application/json", "Content-Length": str(len(data))}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        self.request = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\n{head}\r\n".encode() + data
        self._port = port
        self.status = 0
        self.headers: dict[str, str] = {}
        self.sent_at = 0.0
        self.whole = False

    async def __aenter__(self) -> Exchange:
        raw = socket.socket()
        try:
            raw.setblocking(False)
            self.sent_at = time.perf_counter()
            await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", self._port))
            self._reader, self._writer = await asyncio.open_connection(sock=raw)
        except BaseException:
            raw.close()
            raise
        self._writer.write(self.request)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._writer.close()

    def reset(self) -> None:
        """Leave with a reset instead of an orderly close."""
        raw: Any = self._writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def head(self) -> int:
        """Wait for the status.

        Raises:
            BrokenOffError: there is none.
        """
        try:
            async with asyncio.timeout(LIMIT_SECONDS):
                head = await self._reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise BrokenOffError("no response came") from error
        first, *rest = head[:-4].decode("latin-1").split("\r\n")
        self.status = int(first.split()[1])
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
        return self.status

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes: each chunk the server wrote, or the whole of a body with a length.

        Raises:
            BrokenOffError: it ended before its end.
        """
        try:
            if self.headers.get("transfer-encoding") != "chunked":
                async with asyncio.timeout(LIMIT_SECONDS):
                    body = await self._reader.readexactly(int(self.headers.get("content-length", 0)))
                self.whole = True
                yield body
                return
            while True:
                async with asyncio.timeout(LIMIT_SECONDS):
                    size = int(await self._reader.readuntil(b"\r\n"), 16)
                    piece = await self._reader.readexactly(size + 2)
                if size == 0:
                    self.whole = True
                    return
                yield piece[:-2]
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise BrokenOffError("the response broke off") from error

    async def body(self) -> bytes:
        """The rest of it at once. Raises as ``pieces``."""
        return b"".join([piece async for piece in self.pieces()])


@asynccontextmanager
async def lag(every: float = 0.01) -> AsyncIterator[list[float]]:
    """How late this client's own event loop is, in seconds, sampled while the block runs.

    What is measured by a client that is late itself is too long by as much.
    """
    late: list[float] = []

    async def look() -> None:
        while True:
            due = time.perf_counter() + every
            await asyncio.sleep(every)
            late.append(time.perf_counter() - due)

    task = asyncio.create_task(look())
    try:
        yield late
    finally:
        task.cancel()


async def ask(port: int, path: str, body: Any = None) -> tuple[int, dict[str, str], bytes]:
    """A request and its whole response: status, headers, body."""
    async with Exchange(port, path, body) as one:
        await one.head()
        return one.status, one.headers, await one.body()
