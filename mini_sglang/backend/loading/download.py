"""Bytes from a hub: a probe with a deadline, JSON, and files that are checked before they are trusted.

huggingface_hub's own transfer is not used for the bytes: it holds no checksum against what arrives,
starts an interrupted file from nothing, and waits six timeouts before it gives up.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import io
import json
import queue
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from mini_sglang.backend.loading.progress import Progress
from mini_sglang.errors import shorten

PROBE_SECONDS = 2.0
"""How long a hub has to begin an answer; two hubs cost at most twice that."""

_CHUNK_BYTES = 1 << 18
_MAX_JSON_BYTES = 64 << 20
_MAX_FRUITLESS_TRIES = 3
_FRUITFUL_BYTES = 1 << 20
_SECRET_HEADERS = ("Authorization", "Cookie")


class HubError(Exception):
    """Why a hub did not give a model, as a clause that goes on after the hub's name."""


class HubUnreachable(HubError):
    """The hub does not answer, or what answers in its place is no hub."""


class _BrokenOff(Exception):
    """The connection ended early; the rest may be asked for again."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository as its hub lists it.

    ``checksum`` is in hexadecimal: ``sha256`` of the content, or ``git`` for git's own blob id (SHA-1
    over a header and the content), or an empty ``checksum_kind`` where the hub gives none.
    """

    name: str
    size: int
    url: str
    checksum_kind: str = ""
    checksum: str = ""
    headers: dict[str, str] = field(default_factory=dict, repr=False)

    def hasher(self) -> hashlib._Hash:
        """A fresh hash object that reproduces ``checksum`` when fed the content."""
        if self.checksum_kind == "git":
            return hashlib.sha1(f"blob {self.size}\0".encode(), usedforsecurity=False)
        return hashlib.sha256()


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is None:
            return None
        old_url, new_url = urlsplit(req.full_url), urlsplit(newurl)
        if new_url.scheme != old_url.scheme and new_url.scheme != "https":
            raise HubError(f"redirects to {shorten(newurl)}, which is not encrypted")
        # A token must not follow to the storage host that files are redirected to.
        if (new_url.scheme, new_url.netloc) == (old_url.scheme, old_url.netloc):
            for name in _SECRET_HEADERS:
                if value := req.unredirected_hdrs.get(name):
                    new.add_unredirected_header(name, value)
        return new


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def probe(url: str) -> None:
    """Ask for the head of ``url``; any answer but a server error will do.

    The asking is done in a thread of its own, since looking a name up cannot be interrupted.

    Raises:
        HubUnreachable: no answer within ``PROBE_SECONDS``, or a status of 500 and above.
    """
    outcome: queue.SimpleQueue[HubError | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            with _open(url, {}, PROBE_SECONDS, method="HEAD", handler=_NoRedirects()):
                outcome.put(None)
        except urllib.error.HTTPError as error:
            # 501 is a server that has no HEAD.
            down = error.code >= 500 and error.code != 501
            outcome.put(HubUnreachable(f"answers with status {error.code}") if down else None)
        except Exception as error:
            outcome.put(unreachable(error, PROBE_SECONDS))

    threading.Thread(target=ask, name="hub-probe", daemon=True).start()
    try:
        problem = outcome.get(timeout=PROBE_SECONDS)
    except queue.Empty:
        problem = unreachable(TimeoutError(), PROBE_SECONDS)
    if problem is not None:
        raise problem


def fetch_json(url: str, headers: dict[str, str], timeout: float) -> Any:
    """The JSON document at ``url``, of at most 64 MB.

    Raises:
        HubUnreachable: no answer, a server error, or something that is not JSON.
        urllib.error.HTTPError: a status of 400 to 499.
    """
    try:
        with _open(url, headers, timeout) as response:
            body = response.read(_MAX_JSON_BYTES + 1)
    except urllib.error.HTTPError as error:
        if error.code >= 500:
            raise HubUnreachable(f"answers with status {error.code}") from None
        raise
    except (OSError, http.client.HTTPException) as error:
        raise unreachable(error, timeout) from None
    try:
        if len(body) > _MAX_JSON_BYTES:
            raise ValueError
        return json.loads(body)
    except (ValueError, RecursionError):
        raise HubUnreachable("answers with something that is not its list of files") from None


def download(file: RemoteFile, part: Path, *, timeout: float, progress: Progress) -> None:
    """Bring ``file`` whole and checked into ``part``, going on from what ``part`` already holds.

    A connection that breaks off is taken up again where it ended. After an error ``part`` keeps what
    may be gone on from, and is removed where its content cannot be right.

    Raises:
        HubUnreachable: ``timeout`` seconds without a byte, or a connection that breaks off again and again.
        HubError: the content has another size or checksum than listed, or is refused.
        OSError: ``part`` cannot be written; a full disk takes ``part`` with it, as does a limit on files.
    """
    resumed = part.exists() and part.stat().st_size > 0
    try:
        _transfer(file, part, timeout, progress)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            part.unlink(missing_ok=True)
        raise
    if _checksum_holds(file, part):
        return
    part.unlink()
    if not resumed:
        raise HubError(f"sent a {file.name} whose checksum is not the one it lists")
    # What an earlier run left behind may be at fault: once more, from nothing.
    progress.update(-file.size)
    download(file, part, timeout=timeout, progress=progress)


def _transfer(file: RemoteFile, part: Path, timeout: float, progress: Progress) -> None:
    with part.open("ab", buffering=0) as out:
        done = out.tell()
        if done > file.size:
            out.truncate(0)
            done = 0
        progress.update(done)
        fruitless = 0
        while done < file.size:
            before, problem = done, ""
            try:
                with _open_at(file, done, timeout) as response:
                    if done and response.status != 206:
                        out.truncate(0)
                        progress.update(-done)
                        before = done = 0
                    _check_length(file, response, done)
                    while chunk := _receive(file, response, timeout):
                        done += len(chunk)
                        if done > file.size:
                            out.truncate(0)
                            raise HubError(f"sends more of {file.name} than the {file.size} bytes it lists")
                        _write_all(out, chunk)
                        progress.update(len(chunk))
            except _BrokenOff as error:
                problem = f" ({error})"
            fruitless = 0 if done - before >= _FRUITFUL_BYTES else fruitless + 1
            if done < file.size:
                if fruitless >= _MAX_FRUITLESS_TRIES:
                    raise HubUnreachable(f"broke off {file.name} after {done} of {file.size} bytes{problem}")
                time.sleep(0.25 * 2**fruitless)


def _checksum_holds(file: RemoteFile, part: Path) -> bool:
    return not file.checksum_kind or content_checksum(file, part) == file.checksum


def content_checksum(file: RemoteFile, path: Path) -> str:
    """The checksum of ``path`` in the kind that ``file`` is listed with."""
    hasher = file.hasher()
    with path.open("rb") as content:
        while chunk := content.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


def _open_at(file: RemoteFile, offset: int, timeout: float) -> http.client.HTTPResponse:
    headers = file.headers | ({"Range": f"bytes={offset}-"} if offset else {})
    try:
        return _open(file.url, headers, timeout)
    except urllib.error.HTTPError as error:
        if error.code in (408, 416, 429) or error.code >= 500:
            raise _BrokenOff(f"status {error.code}") from None
        raise HubError(f"answers with status {error.code} for {file.name}") from None
    except (OSError, http.client.HTTPException) as error:
        cause = _cause(error)
        if isinstance(cause, TimeoutError):
            raise HubUnreachable(f"sent nothing of {file.name} for {timeout:g} seconds") from None
        raise _BrokenOff(_why(cause)) from None


def _check_length(file: RemoteFile, response: http.client.HTTPResponse, offset: int) -> None:
    if offset and not (response.headers.get("Content-Range") or "").startswith(f"bytes {offset}-"):
        raise HubError(f"sends another part of {file.name} than was asked for")
    if response.length is not None and response.length != file.size - offset:
        raise HubError(f"sends {response.length + offset} bytes of {file.name} where it lists {file.size}")


def _receive(file: RemoteFile, response: http.client.HTTPResponse, timeout: float) -> bytes:
    try:
        return response.read1(_CHUNK_BYTES)
    except TimeoutError:
        raise HubUnreachable(f"sent nothing more of {file.name} for {timeout:g} seconds") from None
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOff(_why(error)) from None


def _write_all(out: io.FileIO, data: bytes) -> None:
    # An unbuffered write may take less than it is given on a disk that is nearly full.
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]


def _open(
    url: str,
    headers: dict[str, str],
    timeout: float,
    *,
    method: str = "GET",
    handler: urllib.request.HTTPRedirectHandler | None = None,
) -> http.client.HTTPResponse:
    if not url.startswith(("https://", "http://")):
        raise HubUnreachable(f"has the address {shorten(url)}, which is not http:// or https://")
    request = urllib.request.Request(url, method=method)
    request.add_header("User-Agent", "mini-sglang")
    for name, value in headers.items():
        if name.title() in _SECRET_HEADERS:
            request.add_unredirected_header(name.title(), value)
        else:
            request.add_header(name, value)
    handlers: list[urllib.request.BaseHandler] = [handler or _Redirects()]
    if url.startswith("https://"):
        handlers.append(urllib.request.HTTPSHandler(context=_tls_context()))
    opener = urllib.request.build_opener(*handlers)
    response: http.client.HTTPResponse = opener.open(request, timeout=timeout)
    return response


def _tls_context() -> ssl.SSLContext:
    context = ssl.create_default_context()
    paths = ssl.get_default_verify_paths()
    if paths.cafile is None and paths.capath is None:
        # Python from python.org on macOS comes without certificates.
        try:
            import certifi
        except ImportError:
            return context
        context.load_verify_locations(certifi.where())
    return context


def _cause(error: BaseException) -> BaseException:
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return error.reason
    return error


def unreachable(error: BaseException, seconds: float) -> HubUnreachable:
    if isinstance(error, HubUnreachable):
        return error
    cause = _cause(error)
    if isinstance(cause, TimeoutError):
        return HubUnreachable(f"does not answer within {seconds:g} seconds")
    return HubUnreachable(f"cannot be reached ({_why(cause)})")


def _why(error: BaseException) -> str:
    if isinstance(error, socket.gaierror):
        return "its name cannot be looked up"
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    if isinstance(error, ConnectionError | http.client.RemoteDisconnected | http.client.IncompleteRead):
        return "connection lost"
    text = str(error.strerror if isinstance(error, OSError) and error.strerror else error)
    return shorten(text or type(error).__name__).strip("'\"")
