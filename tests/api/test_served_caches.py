"""Caches of a server whose engines are processes: warm from the start, saved at the end, told by /metrics."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mini_sglang import Engine, MiniSglangError
from tests.api.serving import KV_TOKENS, Server, settle

SYSTEM = "You are a very patient helper who answers in few words. "
ASK: dict[str, Any] = {
    "prompt": f"{SYSTEM}Hello",
    "max_new_tokens": 8,
    "ignore_eos": True,
    "return_token_ids": True,
}


def ask(server: Server) -> dict[str, Any]:
    status, _, body = server.request("POST", "/generate", ASK)
    assert status == 200, body
    told: dict[str, Any] = json.loads(body)
    return told


def totals(server: Server) -> list[dict[str, Any]]:
    return [dict(engine) for engine in server.metrics()["engines"]]


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_a_restart_starts_warm_and_every_engine_has_its_file(
    tiny_model: Path, tmp_path: Path, isolation: str
) -> None:
    path = tmp_path / "cache.safetensors"
    answers = []
    for turn in ("cold", "warm"):
        server = Server(
            tiny_model,
            tmp_path / turn,
            ENGINE_ISOLATION=isolation,
            NUM_ENGINES="2",
            PREFIX_CACHE_FILE=str(path),
            PREFILL_CACHE_SIZE="0",
            PAGE_TOKEN_BUDGET="4096",
        )
        try:
            server.wait_ready()
            settle(lambda server=server: all(e["state"] == "ready" for e in totals(server)), "both engines")
            answers += [ask(server) for _ in range(2)]
            settle(lambda server=server: sum(e["running"] for e in totals(server)) == 0, "the counters")
            for engine in totals(server):
                assert engine["host_tokens_total"] == 4096
                assert (engine["prefix_loaded_tokens"] > 0) is (turn == "warm")
            assert server.end() == 0
        finally:
            server.close()
        assert "Traceback" not in server.said
        assert sorted(file.name for file in tmp_path.glob("*cache*")) == [
            "cache.1.safetensors",
            "cache.safetensors",
        ]
    assert [answer["cached_tokens"] for answer in answers] == [0, 0, 48, 48]
    assert len({tuple(answer["token_ids"]) for answer in answers}) == 1
    assert "The prefix cache begins with 64 tokens of" in server.said


@pytest.mark.parametrize("background", ["0", "1"])
def test_every_engine_is_warmed(tiny_model: Path, tmp_path: Path, background: str) -> None:
    server = Server(
        tiny_model,
        tmp_path / "log",
        ENGINE_ISOLATION="process",
        NUM_ENGINES="2",
        WARM_PREFIXES=f"{SYSTEM}||Another one, of a page at least. ",
        ASYNC_PREFILL_QUEUE=background,
    )
    try:
        server.wait_ready()
        settle(lambda: [e.get("warm_prefixes_done") for e in totals(server)] == [2, 2], "the warm prefixes")
        # Until each has had one: on a busy machine an engine may be passed over for a moment.
        cached: list[int] = []

        def asked_and_hit() -> bool:
            cached.append(ask(server)["cached_tokens"])
            return all(engine["prefix_hits"] for engine in totals(server))

        settle(asked_and_hit, "a hit on each engine")
        assert min(cached) > 0
        text = server.request("GET", "/metrics")[2].decode()
        for engine in "01":
            assert f'mini_sglang_engine_warm_prefixes_done{{engine="{engine}"}} 2' in text
        for name in ("host_spilled_tokens_total", "prefill_cache_misses_total", "prefill_cache_entries"):
            assert f'mini_sglang_engine_{name}{{engine="0"}}' in text
        assert server.end() == 0
    finally:
        server.close()


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"WARM_PREFIXES": "a||  "},
            "WARM_PREFIXES is 'a||  '; it must be texts with || between, none of them empty.",
        ),
        (
            {"WARM_PREFIXES": SYSTEM, "PREFIX_CACHE_MAX_TOKENS": "10"},
            "A prefix of WARM_PREFIXES is '56 tokens'; it must be at most 10 tokens",
        ),
        (
            {"PREFIX_CACHE_FILE": "/nowhere/at/all"},
            "PREFIX_CACHE_FILE is '/nowhere/at/all'; it must be a file",
        ),
    ],
)
def test_what_cannot_be_stops_the_start_with_a_sentence(
    tiny_model: Path, tmp_path: Path, variables: dict[str, str], sentence: str
) -> None:
    server = Server(tiny_model, tmp_path / "log", ENGINE_ISOLATION="process", **variables)
    try:
        assert server.process.wait(60) != 0
    except subprocess.TimeoutExpired:
        raise AssertionError(server.said) from None
    finally:
        server.close()
    assert sentence in server.said and "Traceback" not in server.said


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"warm_prefixes": f"{SYSTEM}||Short"},
            "A prefix of WARM_PREFIXES is '5 tokens'; it must be at least 16 tokens, a page",
        ),
        ({"page_token_budget": 5}, "PAGE_TOKEN_BUDGET is 5; it must be at least 16, one page."),
    ],
)
def test_what_an_engine_refuses_is_a_sentence(
    tiny_model: Path, settings: dict[str, Any], sentence: str
) -> None:
    """Of which the test above has one whose process says it, and ends."""
    with pytest.raises(MiniSglangError, match=re.escape(sentence)):
        Engine(str(tiny_model), num_threads=1, kv_token_budget=KV_TOKENS, **settings)
