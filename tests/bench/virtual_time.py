"""An event loop whose clock jumps to whatever is due next: times in a test are exact, and nothing waits."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any


class _Selector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None:
            raise RuntimeError("nothing is due, and nothing ever will be")
        self.now += timeout
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """Starts at 1000 s, so that a time which was never made relative shows."""

    START = 1000.0

    def __init__(self) -> None:
        self.clock = _Selector()
        super().__init__(self.clock)
        # The loop takes for due what is within it; it must be above 0, and below any time of a test.
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self.START + self.clock.now


def run_virtual(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The coroutine's result."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)


class FakeTransport(asyncio.Transport):
    """One end of a connection in virtual time; ``answer`` is called with each request's head and body."""

    def __init__(
        self, protocol: asyncio.Protocol, answer: Callable[[FakeTransport, bytes, bytes], None]
    ) -> None:
        super().__init__()
        self.protocol = protocol
        self._answer = answer
        self._closing = False
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def write(self, data: Any) -> None:
        head, _, body = bytes(data).partition(b"\r\n\r\n")
        self._answer(self, head, body)

    def send(self, seconds: float, data: bytes) -> None:
        """Let the client have these bytes, so many seconds from now."""
        self._later(seconds, lambda: self._give(data))

    def end(self, seconds: float, error: Exception | None = None) -> None:
        self._later(seconds, lambda: self._lose(error))

    def _later(self, seconds: float, do: Callable[[], None]) -> None:
        # The loop runs what is due at one moment in any order; bytes of one moment must keep theirs.
        loop = asyncio.get_running_loop()
        heapq.heappush(self._due, (loop.time() + seconds, next(self._count), do))
        loop.call_later(seconds, lambda: heapq.heappop(self._due)[2]())

    def is_closing(self) -> bool:
        return self._closing

    def abort(self) -> None:
        self._lose(None)

    def _give(self, data: bytes) -> None:
        if not self._closing:
            self.protocol.data_received(data)

    def _lose(self, error: Exception | None) -> None:
        if not self._closing:
            self._closing = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, error)


def connect_to(answer: Callable[[FakeTransport, bytes, bytes], None], after: float = 0.0) -> Any:
    """A ``Client``'s ``connect`` whose connections are answered so, each made ``after`` seconds."""

    async def connect(factory: Callable[[], asyncio.Protocol]) -> FakeTransport:
        if after:
            await asyncio.sleep(after)
        protocol = factory()
        transport = FakeTransport(protocol, answer)
        protocol.connection_made(transport)
        return transport

    return connect
