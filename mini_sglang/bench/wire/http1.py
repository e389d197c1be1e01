"""The framing of an HTTP/1.1 response, in as few steps as a stream of small chunks allows."""

from __future__ import annotations

from collections.abc import Iterator

MOST_HEAD_BYTES = 65_536
_HEAD, _LENGTH, _SIZE, _CHUNK, _CHUNK_END, _TRAILER, _UNTIL_CLOSE, _DONE = range(8)


class ResponseError(Exception):
    """An answer that is no HTTP, or that stops before its end; ``kind`` says which."""

    def __init__(self, kind: str, text: str) -> None:
        self.kind = kind
        super().__init__(text)


class Response:
    """Reads one response.

    ``feed`` gives None when status and headers are there, then pieces of the body as they come.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.begun = False
        self.reusable = False
        self._state = _HEAD
        self._buffer = b""
        self._left = 0

    @property
    def complete(self) -> bool:
        return self._state == _DONE

    @property
    def ends_with_connection(self) -> bool:
        return self._state == _UNTIL_CLOSE

    def feed(self, data: bytes) -> Iterator[bytes | None]:
        """Raises: ResponseError, where this is no HTTP/1 response."""
        self.begun = True
        data = self._buffer + data if self._buffer else data
        self._buffer = b""
        while data or self._state == _HEAD:
            if self._state == _HEAD:
                end = data.find(b"\r\n\r\n")
                if end < 0:
                    if len(data) > MOST_HEAD_BYTES:
                        raise ResponseError("not HTTP", "its headers do not end")
                    self._buffer = data
                    return
                interim = self._read_head(data[:end])
                data = data[end + 4 :]
                if not interim:
                    yield None
                elif not data:
                    return
            elif self._state == _SIZE:
                end = data.find(b"\r\n")
                if end < 0:
                    self._keep(data)
                    return
                try:
                    self._left = int(data[:end].partition(b";")[0], 16)
                except ValueError:
                    raise ResponseError("not HTTP", "a chunk's size is no number") from None
                data = data[end + 2 :]
                self._state = _CHUNK if self._left else _TRAILER
            elif self._state in (_CHUNK, _LENGTH):
                piece = data[: self._left]
                data = data[self._left :]
                self._left -= len(piece)
                yield piece
                if not self._left:
                    self._state = _CHUNK_END if self._state == _CHUNK else _DONE
            elif self._state == _CHUNK_END:
                if len(data) < 2:
                    self._buffer = data
                    return
                if data[:2] != b"\r\n":
                    raise ResponseError("not HTTP", "a chunk is longer than its size")
                data = data[2:]
                self._state = _SIZE
            elif self._state == _TRAILER:
                end = data.find(b"\r\n")
                if end < 0:
                    self._keep(data)
                    return
                if end == 0:
                    self._state = _DONE
                data = data[end + 2 :]
            elif self._state == _UNTIL_CLOSE:
                yield data
                return
            else:
                # More than it said: the connection cannot be trusted with another request.
                self.reusable = False
                return

    def _keep(self, data: bytes) -> None:
        if len(data) > MOST_HEAD_BYTES:
            raise ResponseError("not HTTP", "a line does not end")
        self._buffer = data

    def _read_head(self, head: bytes) -> bool:
        """Returns: whether it was an interim response, after which the real one follows."""
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        code = rest.partition(" ")[0]
        if not version.startswith("HTTP/1.") or not (code.isascii() and code.isdigit() and len(code) == 3):
            raise ResponseError("not HTTP", "its first line is not one of HTTP/1")
        self.status = int(code)
        if self.status < 200:
            return True
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        self.headers = headers
        connection = headers.get("connection", "").lower()
        self.reusable = "close" not in connection and (version == "HTTP/1.1" or "keep-alive" in connection)
        length = headers.get("content-length", "")
        if self.status in (204, 304):
            self._state = _DONE
        elif "chunked" in headers.get("transfer-encoding", "").lower():
            self._state = _SIZE
        elif length:
            if not (length.isascii() and length.isdigit()):
                raise ResponseError("not HTTP", "its Content-Length is no number")
            self._left = int(length)
            self._state = _LENGTH if self._left else _DONE
        else:
            self.reusable = False
            self._state = _UNTIL_CLOSE
        return False
