"""A hub on loopback that speaks as much of Hugging Face's and ModelScope's HTTP as their clients need.

It also misbehaves on demand: ``faults`` maps a file name to how serving that file goes wrong.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0ff"
LFS_SUFFIXES = (".safetensors", ".gguf", ".bin")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub:
    """``repositories`` maps ``owner/name`` to file contents; ``requests`` notes what was asked,
    ``sent`` the name and request headers of each file whose bytes were."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        self.repositories = repositories
        self.faults: dict[str, str] = {}
        self.status: int | None = None
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.sent: list[tuple[str, dict[str, str]]] = []
        self.stopping = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.server.shutdown()
        self.server.server_close()

    def bodies(self, name: str) -> list[dict[str, str]]:
        """The request headers of each time that the file ``name`` was sent."""
        return [headers for sent, headers in self.sent if sent == name]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.hub
        hub.requests.append((self.command, self.path, dict(self.headers)))
        if hub.status is not None:
            self._send(hub.status, b"no")
            return
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        if match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)(/repo(?:/files)?)?", path):
            self._modelscope(match[1], match[2], query)
        elif match := re.fullmatch(r"/api/models/(.+?)/(revision|tree)/([^/]+)", path):
            self._hf_listing(match[1], match[2])
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            self._send_file(match[2], hub.repositories[match[1]][match[2]])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._hf_file(match[1], match[3])
        else:
            self._send(404, b"{}")

    def _hf_listing(self, repo: str, kind: str) -> None:
        files = self.hub.repositories.get(repo)
        if files is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        if "listing" in self.hub.faults:
            self._send(200, b"<html>Welcome to the hotel's network</html>")
            return
        if kind == "tree":
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": git_blob_id(content)}
                | (
                    {"lfs": {"oid": sha256(content), "size": len(content), "pointerSize": 9}}
                    if _lfs(name)
                    else {}
                )
                for name, content in files.items()
            ]
            self._send(200, json.dumps(tree).encode())
            return
        siblings = [
            {"rfilename": name, "size": len(content), "blobId": git_blob_id(content)}
            | (
                {"lfs": {"sha256": sha256(content), "size": len(content), "pointerSize": 9}}
                if _lfs(name)
                else {}
            )
            for name, content in files.items()
        ]
        self._send(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": siblings}).encode())

    def _hf_file(self, repo: str, name: str) -> None:
        content = self.hub.repositories.get(repo, {}).get(name)
        if content is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        elif _lfs(name):
            # Storage has another host name, as on the real hub: credentials must not follow.
            location = f"http://localhost:{self.hub.port}/cdn/{repo}/{name}"
            linked = {"X-Linked-ETag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
            self._send(302, b"", {"Location": location, "X-Repo-Commit": COMMIT} | linked)
        else:
            self._send_file(name, content, {"ETag": f'"{git_blob_id(content)}"', "X-Repo-Commit": COMMIT})

    def _modelscope(self, repo: str, what: str | None, query: dict[str, list[str]]) -> None:
        files = self.hub.repositories.get(repo)
        if files is None or query.get("Revision", ["master"]) != ["master"]:
            self._send(404, b'{"Code": 10010205001, "Success": false, "Message": "not found"}')
        elif what == "/repo":
            name = query["FilePath"][0]
            self._send_file(name, files[name])
        else:
            entries = [
                {"Path": name, "Type": "blob", "Size": len(content), "Sha256": sha256(content)}
                for name, content in files.items()
            ]
            entries.append({"Path": "original", "Type": "tree", "Size": 0, "Sha256": ""})
            self._send(200, json.dumps({"Code": 200, "Success": True, "Data": {"Files": entries}}).encode())

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_file(self, name: str, content: bytes, headers: dict[str, str] | None = None) -> None:
        fault = self.hub.faults.get(name, "")
        if self.command == "GET":
            self.hub.sent.append((name, dict(self.headers)))
        if fault.startswith("status "):
            self._send(int(fault.split()[1]), b"no")
            return
        if fault == "html":
            content = b"<html>Please log in</html>"
        elif fault == "short":
            content = content[:-7]
        elif fault == "long":
            content += b"more"
        elif fault == "flipped":
            content = content[:-1] + bytes([content[-1] ^ 1])
        start, status = 0, 200
        headers = dict(headers or {})
        if (
            wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        ) and fault != "cut, no range":
            start, status = int(wanted[1]), 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if fault in ("cut once", "cut, no range"):
            fault = "cut" if len(self.hub.bodies(name)) == 1 else ""
        if fault not in ("cut", "stall"):
            self._send(status, body, headers)
            return
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if fault == "stall":
            self.hub.stopping.wait()
        self.close_connection = True


def _lfs(name: str) -> bool:
    return name.endswith(LFS_SUFFIXES)


@contextmanager
def black_hole() -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def nobody_home() -> Iterator[str]:
    """An address where connections are refused: the port stays bound, so that nobody else takes it."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{unused.getsockname()[1]}"
