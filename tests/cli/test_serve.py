"""The socket that ``mini-sglang serve`` listens at."""

from __future__ import annotations

import asyncio
import socket

from mini_sglang.cli.serve import _listen
from mini_sglang.config import Settings


def test_tokens_do_not_wait_for_acknowledgements() -> None:
    """A connection that asyncio accepts there sends each write at once, also small ones in a row."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        class Look(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                connection = transport.get_extra_info("socket")
                found.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                transport.close()

        with _listen(Settings.resolve({"port": 0}, {})) as listener:
            server = await asyncio.get_running_loop().create_server(Look, sock=listener)
            async with server:
                _, writer = await asyncio.open_connection(*listener.getsockname())
                nodelay = await asyncio.wait_for(found, 30)
                writer.close()
            return nodelay

    assert asyncio.run(accepted())
