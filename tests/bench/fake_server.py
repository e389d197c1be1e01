"""A server on the loopback with a known delay to its first token and for each one after, in any dialect."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.bench.streams import PROMPT, Piece, messages


@dataclass
class Behaviour:
    """What it does.

    Attributes:
        first, each: seconds before the first piece and before each further one.
        together: tokens of a piece.
        fault: what goes wrong with the nth request (from 0): a status, "reset", "cut" or None.
        owner: what ``/v1/models`` says.
        missing: tokens that it gives fewer than asked for.
    """

    dialect: str
    first: float = 0.02
    each: float = 0.005
    together: int = 1
    fault: Callable[[int], int | str | None] = lambda number: None
    owner: str = "somebody"
    missing: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)


def wanted(body: dict[str, Any]) -> int:
    """The tokens that a request asks for, in any dialect."""
    places = (body, body.get("sampling_params", {}), body.get("options", {}))
    names = ("max_new_tokens", "max_tokens", "n_predict", "num_predict")
    return int(next(place[name] for place in places for name in names if name in place))


def pieces_of(count: int, together: int = 1) -> list[Piece]:
    ids = list(range(100, 100 + count))
    return [
        Piece(tuple(ids[at : at + together]), "".join(f" t{token}" for token in ids[at : at + together]))
        for at in range(0, count, together)
    ]


class FakeServer:
    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self._numbers = iter(range(1_000_000))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = next(
                    (
                        int(line.split(":")[1])
                        for line in head.split("\r\n")
                        if "content-length" in line.lower()
                    ),
                    0,
                )
                body = await reader.readexactly(length)
                method, path, _ = head.split(" ", 2)
                if method == "GET":
                    self._get(path, writer)
                elif not await self._answer(json.loads(body), writer):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _get(self, path: str, writer: asyncio.StreamWriter) -> None:
        if path == "/v1/models":
            found = {"data": [{"id": "fake", "owned_by": self.behaviour.owner}]}
            write(writer, 200, json.dumps(found).encode())
        elif path in ("/api/version", "/api/tags") and self.behaviour.dialect == "ollama":
            write(writer, 200, b"{}")
        else:
            write(writer, 200 if path in ("/health", "/ready") else 404, b"{}")

    async def _answer(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        """Whether the connection goes on."""
        said = self.behaviour
        fault = said.fault(next(self._numbers))
        said.bodies.append(body)
        if isinstance(fault, int):
            write(writer, fault, b'{"error": {"message": "no place left"}}')
            return True
        if fault == "reset":
            writer.transport.abort()
            return False
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        pieces = pieces_of(wanted(body) - said.missing, said.together)
        parts = messages(said.dialect, pieces)
        # A chat begins with a message that has no token in it.
        for number, part in enumerate(parts):
            place = number - (1 if "chat" in said.dialect else 0)
            if 0 <= place < len(pieces):
                await asyncio.sleep(said.each if place else said.first)
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))
            await writer.drain()
            if fault == "cut" and place == 1:
                writer.transport.abort()
                return False
        writer.write(b"0\r\n\r\n")
        return True


def write(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
    head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nContent-Type: application/json\r\n\r\n"
    writer.write(head.encode() + body)


@contextmanager
def fake_server(behaviour: Behaviour) -> Iterator[str]:
    """Its URL, while it runs in a thread of its own."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(FakeServer(behaviour).serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:

        async def end() -> None:
            server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


__all__ = ["PROMPT", "Behaviour", "fake_server", "pieces_of", "wanted"]
