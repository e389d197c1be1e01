"""The client in virtual time: what a server does at a known moment is reported at exactly that moment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from mini_sglang.bench.wire import Ask, WireError, dialect
from mini_sglang.bench.wire.client import Answer, Client
from tests.bench.fake_server import pieces_of
from tests.bench.streams import IDS_TOLD, NAMES, PROMPT, error_message, messages, spoken
from tests.bench.virtual_time import FakeTransport, VirtualLoop, connect_to, run_virtual

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
FIRST, EACH = 0.5, 0.125


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def ask(
    answer: Callable[[FakeTransport, bytes, bytes], None],
    name: str = "ours",
    *,
    times: int = 1,
    connecting: float = 0.0,
    **options: Any,
) -> list[Answer]:
    """The answers to one request after another, on one client."""
    form = dialect(spoken(name)).takes[0]
    prompt: Any = {"ids": [1, 2], "text": "x", "messages": [{"role": "user", "content": "x"}]}[form]

    async def run() -> list[Answer]:
        client = Client("http://fake", connect=connect_to(answer, connecting), **options)
        return [await client.ask(dialect(spoken(name)), Ask(4, **{form: prompt})) for _ in range(times)]

    return run_virtual(run())


def serve(name: str, together: int = 1, split: Callable[[bytes], list[bytes]] = lambda part: [part]) -> Any:
    """Pieces at FIRST and then every EACH; the end comes with the last piece's moment."""

    def answer(transport: FakeTransport, head: bytes, body: bytes) -> None:
        pieces = pieces_of(4, together)
        parts = messages(name, pieces)
        before = 1 if "chat" in name else 0
        transport.send(0, HEAD)
        at = 0.25
        for number, part in enumerate(parts):
            place = number - before
            if place >= 0:
                at = FIRST + EACH * min(place, len(pieces) - 1)
            for bit in split(chunk(part)):
                transport.send(at, bit)
        transport.send(at, END)

    return answer


@pytest.mark.parametrize("name", NAMES)
def test_every_token_has_the_moment_it_came_at(name: str) -> None:
    (answer,) = ask(serve(name), name)
    start = VirtualLoop.START
    assert answer.error is None
    assert answer.sent == start
    assert answer.times == [start + FIRST + EACH * n for n in range(4)]
    assert answer.end == start + FIRST + 3 * EACH
    assert answer.first_byte == start + (0.25 if "chat" in name else FIRST)
    assert (answer.output_tokens, answer.prompt_tokens) == (4, PROMPT)
    assert answer.text == " t100 t101 t102 t103"
    assert answer.ids == ([100, 101, 102, 103] if name in IDS_TOLD else None)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_that_come_together_are_counted_each(name: str) -> None:
    (answer,) = ask(serve(name, together=2), name)
    start = VirtualLoop.START
    assert answer.output_tokens == 4
    first, second = start + FIRST, start + FIRST + EACH
    # Where ids are not named, only the moments of two pieces are known, and it says so.
    assert answer.times == ([first, first, second, second] if name in IDS_TOLD else [first, second])
    assert answer.counted == (name in IDS_TOLD)


@pytest.mark.parametrize("name", NAMES)
def test_messages_may_come_byte_by_byte(name: str) -> None:
    (answer,) = ask(serve(name, split=lambda part: [bytes([byte]) for byte in part]), name)
    assert (answer.error, answer.output_tokens, len(answer.times)) == (None, 4, 4)


def test_connecting_counts() -> None:
    (answer,) = ask(serve("ours"), connecting=0.25)
    assert answer.sent == VirtualLoop.START
    assert answer.times[0] == VirtualLoop.START + 0.25 + FIRST


@pytest.mark.parametrize("status", [429, 500])
def test_a_status_is_an_error_with_the_servers_words(status: int) -> None:
    body = b'{"error": {"message": "no place left"}}'

    def answer(transport: FakeTransport, head: bytes, sent: bytes) -> None:
        transport.send(0.5, b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body)

    (found,) = ask(answer)
    assert (found.error, found.detail) == (f"status {status}", "no place left")
    assert found.end == VirtualLoop.START + 0.5 and found.output_tokens is None


@pytest.mark.parametrize("name", NAMES)
def test_an_error_in_the_stream_is_one_although_the_stream_ends_well(name: str) -> None:
    def answer(transport: FakeTransport, head: bytes, body: bytes) -> None:
        part = messages(name, pieces_of(1))[0]
        transport.send(0.5, HEAD + chunk(part))
        transport.send(1.0, chunk(error_message(name, "out of memory")) + END)

    (found,) = ask(answer, name)
    assert (found.error, found.detail) == ("server", "out of memory")
    assert found.end == VirtualLoop.START + 1.0


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_without_its_end_is_cut_short(name: str) -> None:
    def answer(transport: FakeTransport, head: bytes, body: bytes) -> None:
        # sglang's last piece says itself that it is the last.
        parts = messages(name, pieces_of(3))[: 1 if spoken(name) == "sglang" else 2]
        transport.send(0.5, HEAD + b"".join(map(chunk, parts)) + END)

    (found,) = ask(answer, name)
    assert found.error == "cut short"


def test_a_connection_that_ends_in_the_middle_is_cut_short() -> None:
    def answer(transport: FakeTransport, head: bytes, body: bytes) -> None:
        transport.send(0.5, HEAD + chunk(messages("ours", pieces_of(1))[0]))
        transport.end(1.0)

    (found,) = ask(answer)
    assert found.error == "cut short" and found.end == VirtualLoop.START + 1.0


def test_resets() -> None:
    def at_once(transport: FakeTransport, head: bytes, body: bytes) -> None:
        transport.end(0.5, ConnectionResetError())

    def later(transport: FakeTransport, head: bytes, body: bytes) -> None:
        transport.send(0.25, HEAD)
        transport.end(0.5, ConnectionResetError())

    assert [ask(one)[0].error for one in (at_once, later)] == ["reset", "reset"]


def test_refused() -> None:
    async def run() -> Answer:
        async def connect(factory: Any) -> Any:
            raise ConnectionRefusedError

        return await Client("http://fake", connect=connect).ask(dialect("ours"), Ask(1, ids=[1]))

    assert run_virtual(run()).error == "refused"


def test_no_answer_in_time() -> None:
    (found,) = ask(lambda transport, head, body: None, timeout=2.0)
    assert (found.error, found.end) == ("timeout", VirtualLoop.START + 2.0)


def test_an_answer_that_counts_nothing_is_invalid_and_says_why() -> None:
    def answer(transport: FakeTransport, head: bytes, body: bytes) -> None:
        text = b'data: {"choices": [{"text": "a", "finish_reason": "length"}]}\n\ndata: [DONE]\n\n'
        transport.send(0.5, HEAD + chunk(text) + END)

    (found,) = ask(answer, "openai")
    assert found.error == "no count"
    assert found.detail == "the server names neither token ids nor their number"


def test_ids_that_are_fewer_than_the_count_are_not_taken_for_the_answer() -> None:
    # llama-server does not send the ids of a character that is not whole yet.
    def answer(transport: FakeTransport, head: bytes, body: bytes) -> None:
        piece, end = (
            b'{"content": "a", "tokens": [1]}',
            b'{"content": "", "stop": true, "tokens_predicted": 2}',
        )
        transport.send(0.5, HEAD + chunk(b"data: " + piece + b"\n\ndata: " + end + b"\n\n") + END)

    (found,) = ask(answer, "llama-server")
    assert (found.error, found.output_tokens, found.ids) == (None, 2, None)


def connections(counted: list[FakeTransport], keep: bool) -> Callable[[FakeTransport, bytes, bytes], None]:
    def answer(transport: FakeTransport, head: bytes, body: bytes) -> None:
        counted.append(transport)
        assert (b"connection: close" in head.lower()) is not keep
        serve("ours")(transport, head, body)

    return answer


@pytest.mark.parametrize("keep", [True, False])
def test_a_connection_is_kept_or_not(keep: bool) -> None:
    used: list[FakeTransport] = []
    answers = ask(connections(used, keep), times=3, keep_alive=keep)
    assert [answer.error for answer in answers] == [None] * 3
    assert len({id(one) for one in used}) == (1 if keep else 3)


def test_a_kept_connection_that_was_closed_meanwhile_is_no_failure() -> None:
    used: list[FakeTransport] = []

    def answer(transport: FakeTransport, head: bytes, body: bytes) -> None:
        used.append(transport)
        if used.count(transport) == 2:
            transport.end(0)
        else:
            serve("ours")(transport, head, body)

    answers = ask(answer, times=2)
    assert [one.error for one in answers] == [None, None]
    assert len(used) == 3


def test_the_request_is_well_formed() -> None:
    seen: list[bytes] = []

    def answer(transport: FakeTransport, head: bytes, body: bytes) -> None:
        seen.append(head)
        assert json.loads(body)["prompt"] == [1, 2]
        assert f"Content-Length: {len(body)}".encode() in head
        serve("ours")(transport, head, body)

    ask(answer, api_key="secret")
    lines = seen[0].split(b"\r\n")
    assert lines[0] == b"POST /generate HTTP/1.1"
    assert b"Host: fake" in lines and b"Authorization: Bearer secret" in lines


@pytest.mark.parametrize("url", ["ftp://x", "http://", "localhost", "http://x:port"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(WireError, match="The URL"):
        Client(url)


def test_giving_up_a_request_closes_its_connection() -> None:
    used: list[FakeTransport] = []

    async def run() -> None:
        client = Client(
            "http://fake", connect=connect_to(lambda transport, head, body: used.append(transport))
        )
        task = asyncio.ensure_future(client.ask(dialect("ours"), Ask(1, ids=[1])))
        await asyncio.sleep(1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run_virtual(run())
    assert used[0].is_closing()
