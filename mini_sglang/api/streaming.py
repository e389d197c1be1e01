"""Responses that are made while they are sent, for a client that may leave or stop reading at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from mini_sglang.api.errors import ClientGoneError, Problem, problem_of
from mini_sglang.api.middleware import connection_of

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

T = TypeVar("T")

SSE = "text/event-stream; charset=utf-8"
JSON_LINES = "application/x-ndjson"


class StreamResponse:
    """Sends chunks as they come. Usable wherever Starlette takes a response.

    The status goes out with the first chunk, so that what fails before it is told with a status of its
    own. A fault after it becomes a last chunk. The chunks' generator is always closed, which is where a
    request that still runs is aborted: at once when the client disconnects.

    Args:
        chunks: what to send; one write each.
        on_error: the last chunk for a fault after the first.
        write_timeout: seconds one write may wait for its reader before the connection is cut.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        *,
        media_type: str,
        on_error: Callable[[Problem], bytes],
        write_timeout: float,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._chunks = chunks
        self._on_error = on_error
        self._write_timeout = write_timeout
        self._headers = {
            "content-type": media_type,
            "cache-control": "no-store",
            # Proxies such as nginx would otherwise collect the stream.
            "x-accel-buffering": "no",
            **(headers or {}),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._write(scope, send))
        finally:
            await self._chunks.aclose()

    async def _write(self, scope: Scope, send: Send) -> None:
        begun = False
        try:
            async for chunk in self._chunks:
                if not begun:
                    await self._begin(send)
                    begun = True
                await self._send(scope, send, chunk, more=True)
        except ClientGoneError:
            raise
        except Exception as error:
            if not begun:
                raise
            await self._send(scope, send, self._on_error(problem_of(error)), more=True)
        if not begun:
            await self._begin(send)
        await self._send(scope, send, b"", more=False)

    async def _begin(self, send: Send) -> None:
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self._headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _send(self, scope: Scope, send: Send, chunk: bytes, *, more: bool) -> None:
        try:
            async with asyncio.timeout(self._write_timeout):
                await send({"type": "http.response.body", "body": chunk, "more_body": more})
        except TimeoutError:
            connection_of(scope).cut()
            message = f"the client read nothing for {self._write_timeout:g} seconds (WRITE_TIMEOUT)"
            raise ClientGoneError(message) from None


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, or cancel it the moment the client disconnects.

    ``receive`` must be past the request's body.

    Raises:
        ClientGoneError: the client disconnected.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError("the client disconnected")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


def sse_event(data: bytes) -> bytes:
    """One server-sent event; ``data`` has no line ends, as JSON has none."""
    return b"data: " + data + b"\n\n"


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
