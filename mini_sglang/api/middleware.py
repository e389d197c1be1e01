"""What every request passes before a route sees it, as pure ASGI: nothing here hides a disconnect.

From the outside in: ``Envelope`` (request id, metrics, log), CORS where it is set, ``ErrorTeller``, ``Gate``
(header size, Host, API key), ``BodyReader`` (content type, size, time). Refusals are raised as
``RequestError`` and told in the shape of the API that was called.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from mini_sglang.api.connections import Connection, Connections
from mini_sglang.api.errors import ClientGoneError, Problem, RequestError, error_body, problem_of
from mini_sglang.errors import InvalidValueError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from mini_sglang.api.metrics import Metrics

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/ready"})
MAX_HEADER_BYTES = 32 << 10
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_ID, _TENANT, _CONNECTION = "mini_sglang.request_id", "mini_sglang.tenant", "mini_sglang.connection"
_BODY_METHODS = frozenset({"POST", "PUT", "PATCH"})


def request_id_of(scope: Scope) -> str:
    """The client's ``x-request-id`` where that is fit for a log line, else an id made here."""
    return str(scope.get(_ID, ""))


def connection_of(scope: Scope) -> Connection:
    """The connection a request came through."""
    connection = scope.get(_CONNECTION)
    return connection if isinstance(connection, Connection) else Connection(None)


def tenant_of(scope: Scope) -> str:
    """Which API key a request came with, as a digest; empty where there is one key or none."""
    return str(scope.get(_TENANT, ""))


class Envelope:
    """The outermost layer: a request id in and out, one metric and one log line of each response.

    Args:
        route_of: the path pattern of an endpoint, so that no client's text becomes a label.
        write_timeout: seconds that what is left of a response may wait for its reader.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        connections: Connections,
        route_of: Mapping[Callable[..., Any], str],
        write_timeout: float,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._connections = connections
        self._route_of = route_of
        self._write_timeout = write_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "there are no websockets here"})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = header_of(scope, b"x-request-id").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope[_ID] = request_id
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        with self._connections.hold(send) as connection:
            scope[_CONNECTION] = connection
            try:
                await self._app(scope, receive, send_with_id)
                await connection.flush(self._write_timeout)
            except ClientGoneError:
                connection.cut()
                # The server learns of it now, and not after it has wondered why no response came.
                await asyncio.sleep(0)
            finally:
                route = self._route_of.get(scope.get("endpoint"), "other")  # type: ignore[arg-type]
                self._metrics.response(route, status)
                if logger.isEnabledFor(logging.INFO):
                    logger.info(
                        "http request=%s %s %.100r status=%d seconds=%.3f",
                        request_id, scope["method"], scope["path"], status, time.perf_counter() - started,
                    )  # fmt: skip


class ErrorTeller:
    """Turns what the layers below raise into a response, and lets nothing past but a client that left."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def noting(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except ClientGoneError:
            raise
        except Exception as error:
            problem = problem_of(error)
            if begun:
                # Too late for a status; an end without an end is all that can tell.
                raise ClientGoneError("the response broke off") from None
            await _refuse(problem, scope, send)


class Gate:
    """Header size, Host allow-list and API key. Every path needs the key but ``OPEN_PATHS``.

    Raises:
        InvalidValueError: ``api_key`` is set and has no key in it.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None, allowed_hosts: str | None) -> None:
        self._app = app
        self._hosts = _split(allowed_hosts)
        self._keys = [key.encode() for key in _split(api_key)]
        if api_key is not None and not self._keys:
            raise InvalidValueError("API_KEY", "…", "a key, or several with commas between")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
                message = f"The request's headers are larger than {MAX_HEADER_BYTES} bytes."
                raise RequestError(431, "headers_too_large", message)
            self._check_host(scope)
            if self._keys and scope["path"] not in OPEN_PATHS:
                self._check_key(scope)
        await self._app(scope, receive, send)

    def _check_host(self, scope: Scope) -> None:
        if "*" in self._hosts:
            return
        host = host_name(header_of(scope, b"host").decode("latin-1"))
        if self._hosts:
            allowed = host in self._hosts
        else:
            # A page on the web can make a browser call this machine under the page's own name.
            server = scope.get("server")
            allowed = server is None or not _is_loopback(server[0]) or _is_loopback(host)
        if not allowed:
            message = f"The Host header names {host[:100]!r}, which ALLOWED_HOSTS does not."
            raise RequestError(400, "invalid_host", message)

    def _check_key(self, scope: Scope) -> None:
        scheme, _, bearer = header_of(scope, b"authorization").partition(b" ")
        shown = bearer.strip() if scheme.lower() == b"bearer" else header_of(scope, b"x-api-key")
        matched = None
        # Every key is compared, so that the time tells nothing about which one fits.
        for key in self._keys:
            if hmac.compare_digest(shown, key):
                matched = key
        if matched is None:
            what = "is not a valid one" if shown else "is missing (Authorization: Bearer …, or x-api-key)"
            raise RequestError(401, "invalid_api_key", f"The API key {what}.")
        if len(self._keys) > 1:
            scope[_TENANT] = hashlib.sha256(b"tenant\0" + matched).hexdigest()


class BodyReader:
    """Reads the body of a request that may have one, whole, within its bounds of size and time."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout = timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] in _BODY_METHODS:
            self._check_type(scope)
            length = header_of(scope, b"content-length")
            if length.isdigit() and int(length[:20]) > self._max_bytes:
                raise self._too_large()
            try:
                async with asyncio.timeout(self._timeout):
                    body = await self._read(receive)
            except TimeoutError:
                message = f"The body did not come within {self._timeout:g} seconds (READ_TIMEOUT)."
                raise RequestError(408, "timeout", message) from None
            receive = _replay(body, receive)
        await self._app(scope, receive, send)

    def _check_type(self, scope: Scope) -> None:
        given = header_of(scope, b"content-type").decode("latin-1")
        kind, _, parameters = given.partition(";")
        charset = re.search(r"charset\s*=\s*\"?([\w\-]+)", parameters.lower())
        wrong_charset = charset is not None and charset[1] not in ("utf-8", "utf8", "us-ascii")
        if kind.strip().lower() != "application/json" or wrong_charset:
            message = f"The content type is {given[:100]!r}; it must be application/json, in UTF-8."
            raise RequestError(415, "unsupported_media_type", message)
        if header_of(scope, b"content-encoding") not in (b"", b"identity"):
            message = "The body is compressed; it must be sent as it is."
            raise RequestError(415, "unsupported_media_type", message)

    async def _read(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError("the client left while it sent its request")
            part = message.get("body", b"")
            size += len(part)
            if size > self._max_bytes:
                raise self._too_large()
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> RequestError:
        message = f"The body is larger than {self._max_bytes} bytes (MAX_BODY_BYTES)."
        return RequestError(413, "body_too_large", message)


async def _refuse(problem: Problem, scope: Scope, send: Send) -> None:
    body = error_body(problem, scope["path"], request_id_of(scope))
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        **problem.headers,
    }
    if problem.status in (408, 413):
        # The rest of the body is still on its way, and nobody will read it.
        headers["connection"] = "close"
    start: dict[str, Any] = {
        "type": "http.response.start",
        "status": problem.status,
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
    }
    await send(start)
    await send({"type": "http.response.body", "body": body})


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that gives the body that was read, then what comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def header_of(scope: Scope, name: bytes) -> bytes:
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return b""


def host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _is_loopback(host: str) -> bool:
    if host in ("localhost", "") or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _split(text: str | None) -> Sequence[str]:
    return [part for part in (piece.strip() for piece in (text or "").split(",")) if part]
