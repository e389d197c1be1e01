"""An HTTP/1.1 client that only streams: it notes when each piece came and costs next to nothing.

Its clock is the event loop's, so that a loop with a clock of its own makes every figure exact.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

from mini_sglang.bench.wire.base import Ask, Dialect, Event, Reader, WireError, error_text, shown
from mini_sglang.bench.wire.http1 import Response, ResponseError

MOST_ERROR_BYTES = 65_536
Connect = Callable[[Callable[[], asyncio.Protocol]], Awaitable[asyncio.Transport]]


@dataclass(slots=True)
class Answer:
    """What came of one request; times are the loop's, in seconds.

    Attributes:
        sent: when it was handed to the system, before any connection was made for it.
        first_byte: when the first byte of the answer's body came.
        times: of each token, where the stream tells how many came; else of each piece of text.
        ids: of the answer's tokens; None where the server does not name them all.
        output_tokens: by the server's count or its ids; None where neither was given.
        end: when the answer was whole, or failed.
        error: a kind of failure ("status 429", "refused", "reset", "cut short", "timeout", "server",
            "no count"); None where the answer is whole.
        detail: the same in a sentence.
    """

    sent: float
    first_byte: float | None = None
    times: list[float] = field(default_factory=list)
    counted: bool = False
    ids: list[int] | None = None
    text: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish: str | None = None
    end: float = 0.0
    error: str | None = None
    detail: str = ""

    def fail(self, kind: str, detail: str, now: float) -> None:
        if self.error is None:
            self.error, self.detail, self.end = kind, detail, now


class Client:
    """Connections to one server.

    Args:
        url: ``http://host:port``, with whatever path stands before the API's own.
        api_key: sent as a bearer token.
        keep_alive: use a connection again once its answer is whole.
        timeout: seconds that one answer may take altogether.
        connect: makes a connection for a protocol; by default to the URL's host.

    Raises:
        WireError: the URL is not one of HTTP.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        keep_alive: bool = True,
        timeout: float = 600.0,
        connect: Connect | None = None,
    ) -> None:
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname or "", parts.port or {"https": 443}.get(parts.scheme, 80)
        except ValueError:
            raise WireError(f"The URL {url!r} names no port.") from None
        if parts.scheme not in ("http", "https") or not self._host:
            raise WireError(f"The URL is {url!r}; it must be like http://127.0.0.1:8000.")
        self._secure = parts.scheme == "https"
        self._base = parts.path.rstrip("/")
        self._timeout = timeout
        self._keep_alive = keep_alive
        self._connect = connect or self._dial
        self._idle: list[_Exchange] = []
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        keep = "" if keep_alive else "Connection: close\r\n"
        self._headers = f"Host: {parts.netloc.rpartition('@')[2]}\r\n{key}{keep}"

    async def ask(
        self, dialect: Dialect, ask: Ask, on_event: Callable[[Event], None] | None = None
    ) -> Answer:
        """Send one request and read its answer to the end. Failures are in the answer.

        Args:
            on_event: is given each event as it comes.
        """
        # The body is made before the clock runs: how fast this client writes JSON is nobody's latency.
        body = msgspec.json.encode(dialect.body(ask))
        now = asyncio.get_running_loop().time
        taker = _Taker(Answer(now()), dialect.reader(), on_event)
        answer = taker.answer
        try:
            async with asyncio.timeout(self._timeout):
                await self._exchange("POST", dialect.path, body, taker)
            taker.finish(now())
        except TimeoutError:
            answer.fail("timeout", f"no whole answer within {self._timeout:g} s", now())
        except ResponseError as error:
            answer.fail(error.kind, str(error), now())
        except OSError as error:
            # A name with several addresses, none of which answers, gives an OSError of its own.
            refused = isinstance(error, ConnectionRefusedError) or "Connect call failed" in str(error)
            kind = "refused" if refused else "reset" if isinstance(error, ConnectionError) else "connection"
            answer.fail(kind, "nobody listens there" if refused else str(error) or kind, now())
        return answer

    async def get(self, path: str, accept: str = "application/json") -> tuple[int, bytes]:
        """Status and body of a GET; status 0 where nobody answers."""
        return await self._whole("GET", path, None, accept)

    async def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, bytes]:
        """Status and body of a POST; status 0 where nobody answers."""
        return await self._whole("POST", path, msgspec.json.encode(body), "application/json")

    async def _whole(self, method: str, path: str, body: bytes | None, accept: str) -> tuple[int, bytes]:
        taker = _Gather()
        try:
            async with asyncio.timeout(min(self._timeout, 30.0)):
                await self._exchange(method, path, body, taker, accept)
        except (TimeoutError, ResponseError, OSError):
            return 0, b""
        return taker.status, bytes(taker.data)

    async def _exchange(
        self, method: str, path: str, body: bytes | None, taker: Taker, accept: str | None = None
    ) -> None:
        content = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
        accepts = f"Accept: {accept}\r\n" if accept else ""
        head = f"{method} {self._base}{path} HTTP/1.1\r\n{self._headers}{accepts}{content}\r\n"
        data = head.encode("latin-1", "replace") + (body or b"")
        while self._idle:
            exchange = self._idle.pop()
            if exchange.usable():
                try:
                    await self._run(exchange, data, taker)
                    return
                except StaleError:
                    # It was closed at the other end before it had the request: a new one has to be made.
                    continue
        exchange = _Exchange()
        await self._connect(lambda: exchange)
        await self._run(exchange, data, taker)

    async def _run(self, exchange: _Exchange, data: bytes, taker: Taker) -> None:
        try:
            await exchange.run(data, taker)
        except BaseException:
            exchange.abort()
            raise
        if self._keep_alive and exchange.usable():
            self._idle.append(exchange)
        else:
            exchange.abort()

    async def _dial(self, protocol: Callable[[], asyncio.Protocol]) -> asyncio.Transport:
        secure = ssl.create_default_context() if self._secure else None
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_connection(protocol, self._host, self._port, ssl=secure)
        return transport

    def close(self) -> None:
        """Close the connections that are kept."""
        while self._idle:
            self._idle.pop().abort()


class Taker:
    """Whom a response is told to."""

    def head(self, response: Response) -> None: ...

    def body(self, data: bytes, now: float) -> None: ...


class _Gather(Taker):
    def __init__(self) -> None:
        self.status = 0
        self.data = bytearray()

    def head(self, response: Response) -> None:
        self.status = response.status

    def body(self, data: bytes, now: float) -> None:
        self.data += data


class _Taker(Taker):
    """Fills an answer from the events of its stream."""

    def __init__(self, answer: Answer, reader: Reader, on_event: Callable[[Event], None] | None) -> None:
        self.answer = answer
        self._reader = reader
        self._on_event = on_event
        self._status = 200
        self._error_body = bytearray()
        self._ids: list[int] = []
        self._named = False
        self._last = False
        self._ended: float | None = None
        self._text: list[str] = []

    def head(self, response: Response) -> None:
        self._status = response.status

    def body(self, data: bytes, now: float) -> None:
        if self.answer.first_byte is None:
            self.answer.first_byte = now
        if self._status != 200:
            if len(self._error_body) < MOST_ERROR_BYTES:
                self._error_body += data
            return
        for event in self._reader.feed(data):
            self._take(event, now)

    def _take(self, event: Event, now: float) -> None:
        answer = self.answer
        if event.error is not None:
            answer.fail("server", event.error, now)
        if event.ids is not None:
            self._named = answer.counted = True
            self._ids += event.ids
            answer.times += [now] * len(event.ids)
        elif event.made is not None:
            answer.counted = True
            answer.times += [now] * (event.made - len(answer.times))
        elif event.text and not answer.counted:
            answer.times.append(now)
        if event.text:
            self._text.append(event.text)
        if event.output_tokens is not None or event.prompt_tokens is not None or event.finish is not None:
            for name in ("prompt_tokens", "output_tokens", "cached_tokens", "finish"):
                if (value := getattr(event, name)) is not None:
                    setattr(answer, name, value)
        if event.last or event.finish is not None:
            self._last = True
            self._ended = now
        if self._on_event is not None:
            self._on_event(event)

    def finish(self, now: float) -> None:
        """The response ended as HTTP says: is the answer whole?"""
        answer = self.answer
        if self._status != 200:
            text = _error_of(bytes(self._error_body)) or "without a word"
            answer.fail(f"status {self._status}", text, now)
            return
        for event in self._reader.close():
            self._take(event, now)
        answer.text = "".join(self._text)
        if answer.output_tokens is None and self._named:
            answer.output_tokens = len(self._ids)
        if self._named and answer.output_tokens == len(self._ids):
            answer.ids = self._ids
        if not self._last:
            answer.fail("cut short", "the stream stopped without its end", now)
        elif answer.output_tokens is None:
            answer.fail("no count", "the server names neither token ids nor their number", now)
        elif answer.error is None:
            answer.end = self._ended if self._ended is not None else now


class StaleError(Exception):
    """A kept connection that turned out to be closed."""


class _Exchange(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._response: Response | None = None
        self._taker: Taker | None = None
        self._done: asyncio.Future[None] | None = None
        self._now = asyncio.get_running_loop().time
        self._fresh = True
        self._whole = True

    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing() and self._whole

    async def run(self, data: bytes, taker: Taker) -> None:
        """Raises: StaleError, ResponseError, OSError."""
        assert self._transport is not None
        self._response, self._taker, self._whole = Response(), taker, False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        try:
            await self._done
        finally:
            self._done = self._taker = None
            self._fresh = False

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        now = self._now()
        response, taker, done = self._response, self._taker, self._done
        if response is None or taker is None or done is None or done.done():
            # Nothing was asked: whatever this is, it is not the answer to the next request.
            self.abort()
            return
        try:
            for piece in response.feed(data):
                if piece is None:
                    taker.head(response)
                elif piece:
                    taker.body(piece, now)
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


def _error_of(body: bytes) -> str | None:
    try:
        return error_text(msgspec.json.decode(body)) or shown(body)
    except msgspec.DecodeError:
        return shown(body) if body else None
