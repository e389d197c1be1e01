"""One timer gives up a reader that takes nothing: it counts each write alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from mini_sglang.api.errors import ClientGoneError
from mini_sglang.api.streaming import SSE, StreamResponse


def respond(waits: list[float], write_timeout: float) -> tuple[list[bytes], bool]:
    """Send a body whose n-th part waits ``waits[n]`` seconds for its reader: what came, and if it closed."""
    closed = False

    async def chunks() -> AsyncGenerator[bytes, None]:
        nonlocal closed
        try:
            for number in range(len(waits)):
                yield b"%d" % number
        finally:
            closed = True

    sent: list[bytes] = []
    left = list(waits)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body" and message["body"]:
            await asyncio.sleep(left.pop(0))
            sent.append(message["body"])

    async def receive() -> Any:
        await asyncio.Event().wait()

    response = StreamResponse(
        chunks(), media_type=SSE, on_error=lambda problem: b"error", write_timeout=write_timeout
    )
    try:
        asyncio.run(response({"type": "http"}, receive, send))
    except ClientGoneError as error:
        assert "read nothing for" in str(error)
        assert closed
        return sent, True
    assert closed
    return sent, False


def test_a_slow_reader_is_waited_for_however_long_it_takes_in_all() -> None:
    assert respond([0.03] * 60, 1.5) == ([b"%d" % number for number in range(60)], False)


@pytest.mark.parametrize("fast", [0, 1, 30])
def test_one_that_stops_is_given_up(fast: int) -> None:
    sent, gone = respond([0.01] * fast + [30.0, 0.0], 1.0)
    assert gone and sent == [b"%d" % number for number in range(fast)]
