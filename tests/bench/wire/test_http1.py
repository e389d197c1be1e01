"""The response's framing against h11, for any cut of the bytes."""

from __future__ import annotations

from itertools import pairwise

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_sglang.bench.wire.http1 import Response, ResponseError

PARTS = st.lists(st.binary(min_size=1, max_size=300), max_size=8)


def response(parts: list[bytes], framing: str, status: int = 200) -> bytes:
    """As h11 writes it for a server."""
    server = h11.Connection(h11.SERVER)
    server.receive_data(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n")
    while not isinstance(server.next_event(), h11.EndOfMessage):
        pass
    headers = [("Content-Type", "text/plain")]
    if framing == "length":
        headers.append(("Content-Length", str(sum(map(len, parts)))))
    elif framing == "close":
        headers.append(("Connection", "close"))
    data = server.send(h11.InformationalResponse(status_code=103, headers=[])) or b""
    data += server.send(h11.Response(status_code=status, headers=headers)) or b""
    for part in parts:
        data += server.send(h11.Data(data=part)) or b""
    return data + (server.send(h11.EndOfMessage()) or b"")


def read(reader: Response, data: bytes, places: list[int]) -> bytes:
    ends = sorted({min(place, len(data)) for place in places} | {0, len(data)})
    body = b""
    for a, b in pairwise(ends):
        body += b"".join(piece for piece in reader.feed(data[a:b]) if piece)
    return body


@given(PARTS, st.sampled_from(["length", "chunked"]), st.lists(st.integers(0, 3000), max_size=30))
def test_the_body_is_the_one_that_was_sent(parts: list[bytes], framing: str, places: list[int]) -> None:
    reader = Response()
    assert read(reader, response(parts, framing), places) == b"".join(parts)
    assert reader.complete and reader.reusable and reader.status == 200


@given(PARTS, st.integers(0, 3000))
def test_a_cut_response_is_never_complete(parts: list[bytes], at: int) -> None:
    data = response(parts, "chunked")
    reader = Response()
    list(reader.feed(data[: min(at, len(data) - 1)]))
    assert not reader.complete


def test_without_a_length_the_connections_end_is_the_bodys() -> None:
    reader = Response()
    data = b"HTTP/1.0 200 OK\r\nServer: x\r\n\r\nabc"
    assert read(reader, data, [10, 30]) == b"abc"
    assert reader.ends_with_connection and not reader.reusable and not reader.complete


def test_chunks_with_extensions_and_trailers() -> None:
    reader = Response()
    data = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=1\r\nabc\r\n0\r\nTrailer: y\r\n\r\n"
    assert read(reader, data, list(range(len(data)))) == b"abc"
    assert reader.complete


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 2x0 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n",
        b"x" * 70_000,
    ],
)
def test_what_is_no_http_is_refused(data: bytes) -> None:
    with pytest.raises(ResponseError):
        list(Response().feed(data))


def test_a_connection_that_says_close_is_not_used_again() -> None:
    reader = Response()
    read(reader, b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 1\r\n\r\na", [])
    assert reader.complete and not reader.reusable


def test_bytes_after_the_end_spoil_the_connection() -> None:
    reader = Response()
    read(reader, b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nabc", [])
    assert reader.complete and not reader.reusable
