"""Responses that are made while they are sent, for a client that may leave or stop reading at any moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from mini_sglang.api.connections import Connection
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
        with _Patience(self._write_timeout, connection_of(scope)) as patience:
            try:
                async for chunk in self._chunks:
                    if not begun:
                        await self._begin(send)
                        begun = True
                    await patience.send(send, chunk)
            except ClientGoneError:
                raise
            except Exception as error:
                if not begun:
                    raise
                await patience.send(send, self._on_error(problem_of(error)))
            if not begun:
                await self._begin(send)
            await patience.send(send, b"", more=False)

    async def _begin(self, send: Send) -> None:
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self._headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": headers})


class _Patience:
    """Sends the parts of one body, and gives its reader up where one waits ``seconds`` to be taken.

    One timer serves all of them: ``asyncio.timeout`` around each would cost more than the writing.
    """

    def __init__(self, seconds: float, connection: Connection) -> None:
        self._seconds = seconds
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Any] | None = None
        self._since: float | None = None
        self._lost = False

    def __enter__(self) -> _Patience:
        self._task = asyncio.current_task()
        return self

    def __exit__(self, *error: object) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def send(self, send: Send, chunk: bytes, *, more: bool = True) -> None:
        """Raises ClientGoneError where the reader is given up; its connection is cut then."""
        self._since = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._seconds, self._look)
        try:
            await (self._connection.send or send)(
                {"type": "http.response.body", "body": chunk, "more_body": more}
            )
        except asyncio.CancelledError:
            if not self._lost:
                raise
            reason = f"the client read nothing for {self._seconds:g} seconds (WRITE_TIMEOUT)"
            raise ClientGoneError(reason) from None
        finally:
            self._since = None

    def _look(self) -> None:
        self._timer = None
        if self._since is None:
            return  # the next write sets it again
        left = self._since + self._seconds - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
            return
        assert self._task is not None
        self._lost = True
        # First the task: cutting may let its write end as if it had gone well.
        self._task.cancel()
        self._connection.cut()


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
