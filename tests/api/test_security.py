"""Who may call what: keys, hosts, origins, tenants."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.testclient import TestClient

from mini_sglang.api.errors import RequestError
from mini_sglang.api.middleware import OPEN_PATHS, Gate, host_name
from mini_sglang.api.server import create_app
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError
from tests.api.serving import Client, serving

KEY, OTHER = "sk-one-Ü", "sk-two"


@pytest.fixture(scope="module")
def guarded(tiny_model: Path) -> Iterator[Client]:
    with serving(tiny_model, api_key=f"{KEY}, {OTHER}", cors_origins="https://a.example") as client:
        yield client


def bearer(key: str) -> dict[bytes, bytes]:
    return {b"authorization": b"Bearer " + key.encode()}


def test_every_route_but_two_needs_a_key(guarded: Client) -> None:
    app = create_app(guarded.service.settings, guarded.service)
    assert isinstance(app, Starlette) and len(app.routes) > 8
    for route in app.routes:
        assert isinstance(route, Route) and route.methods
        path = route.path.replace("{id}", "x").replace("{name}", "x").replace("{name:path}", "x")
        for method in route.methods:
            status = guarded.request(method, path).status_code
            assert (status == 200) if path in OPEN_PATHS else (status == 401), (method, path, status)


@pytest.mark.parametrize(
    "path",
    [
        "/nope",
        "/",
        "/health/",
        "/HEALTH",
        "//health",
        "/health/../metrics",
        "/metrics?x=/health",
        "/%68ealth/x",
    ],
)
def test_default_is_deny(guarded: Client, path: str) -> None:
    assert guarded.get(path).status_code == 401


@pytest.mark.parametrize("key", [KEY, OTHER])
def test_a_key_opens_in_either_header(guarded: Client, key: str) -> None:
    assert guarded.get("/metrics", headers=bearer(key)).status_code == 200
    assert guarded.get("/metrics", headers={b"x-api-key": key.encode()}).status_code == 200
    assert guarded.get("/metrics", headers={b"authorization": b"bearer  " + key.encode()}).status_code == 200


@pytest.mark.parametrize(
    "shown", ["", "sk-one", KEY + "x", f"{KEY}, {OTHER}", f"{KEY},{OTHER}", "é", "x" * 5000]
)
def test_another_key_does_not(guarded: Client, shown: str) -> None:
    for headers in (
        bearer(shown),
        {b"x-api-key": shown.encode()},
        {b"authorization": f"Basic {shown}".encode()},
    ):
        response = guarded.get("/metrics", headers=headers)
        assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
        assert not shown or shown not in response.text
    assert guarded.get("/v1/models", headers=bearer(shown)).json()["error"]["code"] == "invalid_api_key"


def test_tenants_do_not_share_prefixes(guarded: Client) -> None:
    body = {"prompt": "t" * 64, "max_new_tokens": 1}

    def cached(key: str) -> int:
        found: int = guarded.post("/generate", json=body, headers=bearer(key)).json()["cached_tokens"]
        return found

    assert [cached(KEY), cached(OTHER), cached(KEY) >= 48, cached(OTHER) >= 48] == [0, 0, True, True]


def test_no_key_in_settings_or_logs(guarded: Client, caplog: pytest.LogCaptureFixture) -> None:
    assert KEY not in repr(guarded.service.settings)
    with caplog.at_level(logging.DEBUG, "mini_sglang"):
        guarded.post("/generate", json={"prompt": "x", "max_new_tokens": 1}, headers=bearer(KEY))
        guarded.get("/metrics", headers=bearer(KEY + "x"))
    assert "sk-" not in caplog.text


def test_a_key_setting_without_a_key_stops_the_start(guarded: Client) -> None:
    async def app(*_: object) -> None: ...

    for api_key in (" ", ",", " , "):
        with pytest.raises(InvalidValueError, match="API_KEY"):
            Gate(app, api_key=api_key, allowed_hosts=None)


def test_cors_is_off_unless_set(client: Client, guarded: Client) -> None:
    asking = {"origin": "https://a.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in client.get("/health", headers=asking).headers
    assert client.options("/generate", headers=asking).status_code == 405
    answer = guarded.options("/generate", headers=asking)
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    refusal = guarded.get("/metrics", headers=asking)
    assert refusal.status_code == 401 and "access-control-allow-origin" in refusal.headers
    foreign = guarded.get("/health", headers={"origin": "https://b.example"})
    assert "access-control-allow-origin" not in foreign.headers


async def ask_gate(host: str | None, server: str, allowed: str | None) -> int:
    async def app(*_: object) -> None: ...

    async def nothing(*_: object) -> dict[str, object]:
        return {}

    headers = [] if host is None else [(b"host", host.encode())]
    scope = {"type": "http", "path": "/health", "headers": headers, "server": (server, 8000)}
    try:
        await Gate(app, api_key=None, allowed_hosts=allowed)(scope, nothing, nothing)
    except RequestError as error:
        return error.status
    return 200


@pytest.mark.parametrize(
    "host, server, allowed, status",
    [
        ("localhost:8000", "127.0.0.1", None, 200),
        ("127.0.0.1:8000", "127.0.0.1", None, 200),
        ("[::1]:8000", "::1", None, 200),
        (None, "127.0.0.1", None, 200),
        ("evil.example", "127.0.0.1", None, 400),
        ("evil.example:8000", "::1", None, 400),
        ("localhost.evil.example", "127.0.0.1", None, 400),
        ("evil.example", "127.0.0.1", "*", 200),
        ("any.example", "192.0.2.1", None, 200),
        ("a.example:80", "192.0.2.1", "a.example, b.example", 200),
        ("A.Example", "192.0.2.1", "a.example", 200),
        ("c.example", "192.0.2.1", "a.example,b.example", 400),
        ("localhost", "127.0.0.1", "a.example", 400),
    ],
)
def test_hosts(host: str | None, server: str, allowed: str | None, status: int) -> None:
    import asyncio

    assert asyncio.run(ask_gate(host, server, allowed)) == status


def test_host_names() -> None:
    assert [host_name(host) for host in ("a:1", "[::1]:2", "::1", "A", "")] == ["a", "::1", "::1", "a", ""]


def test_a_websocket_is_closed(client: Client) -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/generate"):
        pass


def test_settings_of_the_server_have_the_safe_defaults() -> None:
    settings = Settings.resolve({}, {})
    assert settings.host == "127.0.0.1" and settings.api_key is None and settings.cors_origins is None
    assert settings.trust_remote_code is False


def test_an_app_without_its_lifespan_says_so() -> None:
    from api.server import app

    with pytest.raises(RuntimeError, match="lifespan"):
        TestClient(app).get("/health")
