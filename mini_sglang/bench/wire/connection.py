"""One connection to a server, with one request at a time."""

from __future__ import annotations

import asyncio

from mini_sglang.bench.wire.http1 import Response, ResponseError


class ResponseSink:
    """What a response is handed to as it comes."""

    def head(self, response: Response) -> None: ...

    def body(self, data: bytes, now: float) -> None: ...


class StaleError(Exception):
    """A kept connection that turned out to be closed."""


class Connection(asyncio.Protocol):
    """Make one, connect it as a protocol, then ``run`` requests on it."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._response: Response | None = None
        self._sink: ResponseSink | None = None
        self._done: asyncio.Future[None] | None = None
        self._now = asyncio.get_running_loop().time
        self._fresh = True
        self._whole = True

    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing() and self._whole

    async def run(self, data: bytes, sink: ResponseSink) -> None:
        """Raises: StaleError, ResponseError, OSError."""
        assert self._transport is not None
        self._response, self._sink, self._whole = Response(), sink, False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        try:
            await self._done
        finally:
            self._done = self._sink = None
            self._fresh = False

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        now = self._now()
        response, sink, done = self._response, self._sink, self._done
        if response is None or sink is None or done is None or done.done():
            # Nothing was asked: whatever this is, it is not the answer to the next request.
            self.abort()
            return
        try:
            for piece in response.feed(data):
                if piece is None:
                    sink.head(response)
                elif piece:
                    sink.body(piece, now)
        except Exception as error:
            done.set_exception(error)
            return
        if response.complete:
            self._whole = response.reusable
            done.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        done, response = self._done, self._response
        self._transport = None
        if done is None or done.done() or response is None:
            return
        if response.ends_with_connection and error is None:
            done.set_result(None)
        elif not response.begun:
            # Of a new connection it is a failure that a user would see.
            late = StaleError() if not self._fresh else ConnectionResetError("closed before any answer")
            done.set_exception(late)
        elif isinstance(error, ConnectionError):
            done.set_exception(ConnectionResetError("reset while the answer came"))
        else:
            done.set_exception(ResponseError("cut short", "the connection ended in the middle of the answer"))
