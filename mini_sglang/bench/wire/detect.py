"""Which dialect a server speaks, told by its URL or by what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import msgspec

from mini_sglang.bench.wire.base import Dialect, WireError
from mini_sglang.bench.wire.client import Client
from mini_sglang.bench.wire.dialects import DIALECTS, dialect

AUTO = "auto"
_OWNERS = {"mini-sglang": "ours", "vllm": "vllm", "sglang": "sglang", "llamacpp": "llama-server"}
_PATHS = {one.path: one.name for one in DIALECTS.values() if one.name in ("openai", "openai-chat")}
_PATHS |= {"/completion": "llama-server", "/api/generate": "ollama"}


@dataclass(frozen=True)
class Found:
    """A server's address without the API's own path, its dialect, and its first model's name, if it tells."""

    url: str
    dialect: Dialect
    model: str | None


async def detect(url: str, name: str = AUTO, api_key: str | None = None) -> Found:
    """Ask the server who it is.

    Args:
        url: the server's, or that of the endpoint itself (``…/v1/chat/completions``).
        name: a dialect, or ``auto``.

    Raises:
        WireError: nobody answers, or a dialect that there is not.
    """
    base, told = _split(url)
    chosen = dialect(told if name == AUTO and told else name) if name != AUTO or told else None
    client = Client(base, api_key=api_key, timeout=20.0)
    try:
        status, models = await _json(client, "/v1/models")
        listed = models.get("data") or [{}]
        first = listed[0] if isinstance(listed[0], dict) else {}
        model = first.get("id")
        if chosen is not None:
            return Found(base, chosen, model)
        owner = _OWNERS.get(str(first.get("owned_by")))
        if owner is not None:
            return Found(base, DIALECTS[owner], model)
        if (await _json(client, "/api/version"))[0] == 200 and (await _json(client, "/api/tags"))[0] == 200:
            return Found(base, DIALECTS["ollama"], model)
        if status == 200:
            return Found(base, DIALECTS["openai"], model)
        if status == 401:
            raise WireError(f"{base} wants a key: --api-key.")
        if status == 0:
            raise WireError(f"Nobody answers at {base}.")
    finally:
        client.close()
    names = ", ".join(DIALECTS)
    raise WireError(f"What {base} speaks cannot be told; say --dialect with one of {names}.")


def _split(url: str) -> tuple[str, str | None]:
    """The address without an endpoint's path, and the dialect which that path tells."""
    url = url if "://" in url else f"http://{url}"
    parts = urlsplit(url)
    path = parts.path.rstrip("/")
    for ending in ("/v1/chat/completions", "/v1/completions", "/completion", "/api/generate"):
        if path.endswith(ending):
            return urlunsplit(parts._replace(path=path.removesuffix(ending), query="")), _PATHS[ending]
    # ``/generate`` is ours and sglang's: which of them is asked below. ``/v1`` is how OpenAI clients put it.
    path = path.removesuffix("/generate").removesuffix("/v1")
    return urlunsplit(parts._replace(path=path, query="")), None


async def _json(client: Client, path: str) -> tuple[int, dict[str, Any]]:
    status, body = await client.get(path)
    try:
        found = msgspec.json.decode(body) if body else {}
    except msgspec.DecodeError:
        found = {}
    return status, found if isinstance(found, dict) else {}
