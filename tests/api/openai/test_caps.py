"""An answer that was given fewer tokens than were asked for says so, through every door."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.openai.harness import CONTEXT, ScriptedEngine, Server, scripted_server
from tests.api.serving import settle

Pair = tuple[Server, ScriptedEngine]
MESSAGES = [{"role": "user", "content": "Hi"}]
TEN = {
    "/generate": {"prompt": "Hi", "max_new_tokens": 10},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 10},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 10},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 10},
}


@pytest.fixture(scope="module")
def adaptive(model_folder: Path) -> Iterator[Pair]:
    with scripted_server(
        model_folder, adaptive_max_new_tokens=True, adaptive_max_new_tokens_factor=0.6
    ) as pair:
        pair[1].say("x" * 40)
        yield pair


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    response = httpx.post(server.url.removesuffix("/v1") + path, json=body, timeout=30)
    assert response.status_code == 200, response.text
    return response


@contextmanager
def busy(pair: Pair, requests: int = 1) -> Iterator[None]:
    """As many requests are in flight meanwhile, the model waiting; those made inside end after it."""
    server, engine = pair
    engine.gate.clear()
    before = len(engine.works)
    with ThreadPoolExecutor() as threads:
        first = [threads.submit(post, server, "/generate", **TEN["/generate"]) for _ in range(requests)]
        settle(lambda: len(engine.works) == before + requests, "the requests before")
        try:
            yield
        finally:
            engine.gate.set()
        for one in first:
            one.result()
    settle(lambda: server.service.pool.in_flight == 0, "the end")


def behind_one(pair: Pair, path: str, **more: Any) -> tuple[httpx.Response, int]:
    """The answer to a request made while another one runs, and the tokens its engine was to make."""
    server, engine = pair
    with ThreadPoolExecutor() as threads:
        with busy(pair):
            before = len(engine.works)
            answer = threads.submit(post, server, path, **TEN[path], **more)
            settle(lambda: len(engine.works) > before, "the second request")
        return answer.result(), engine.works[before].max_new_tokens


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", TEN)
def test_a_cut_by_load_is_told(adaptive: Pair, path: str, stream: bool) -> None:
    response, given = behind_one(adaptive, path, stream=stream)
    assert given == 6
    if path == "/generate":
        last = events(response)[-1] if stream else response.json()
        assert (last["finish_reason"], last["completion_tokens"], last["max_new_tokens"]) == ("length", 6, 6)
        assert last["max_new_tokens_capped"] == "load"
    elif path == "/v1/responses":
        last = events(response)[-1]["response"] if stream else response.json()
        assert last["status"] == "incomplete" and last["max_tokens_capped"] == "load"
        assert last["usage"]["output_tokens"] == 6 and last["max_output_tokens"] == 10
    else:
        chunks = events(response) if stream else [response.json()]
        shown = [choice for chunk in chunks for choice in chunk["choices"]]
        assert [choice.get("max_tokens_capped") for choice in shown] == [None] * (len(shown) - 1) + ["load"]
        assert shown[-1]["finish_reason"] == "length"


@pytest.mark.parametrize("path", TEN)
def test_alone_nothing_is_cut_and_nothing_is_said(adaptive: Pair, path: str) -> None:
    server, engine = adaptive
    response = post(server, path, **TEN[path])
    assert engine.works[-1].max_new_tokens == 10
    body = response.json()
    assert "load" not in response.text and body.get("max_new_tokens_capped") is None
    assert "max_tokens_capped" not in response.text


def test_off_the_load_changes_nothing(scripted: Pair) -> None:
    scripted[1].say("x" * 40)
    response, given = behind_one(scripted, "/generate")
    assert given == 10 and response.json()["max_new_tokens_capped"] is None


def test_all_the_answers_of_a_request_count(adaptive: Pair) -> None:
    body = post(adaptive[0], "/v1/completions", prompt=["a", "b"], max_tokens=10).json()
    assert [choice["max_tokens_capped"] for choice in body["choices"]] == ["load", "load"]
    alone = post(adaptive[0], "/generate", prompt="Hi", max_new_tokens=10).json()
    assert alone["max_new_tokens_capped"] is None


def test_without_a_limit_of_its_own_a_chat_is_cut_from_what_the_context_leaves(adaptive: Pair) -> None:
    server, engine = adaptive
    with busy(adaptive), ThreadPoolExecutor() as threads:
        before = len(engine.works)
        answer = threads.submit(post, server, "/v1/chat/completions", messages=MESSAGES)
        settle(lambda: len(engine.works) > before, "the chat")
        engine.gate.set()
        choice = answer.result().json()["choices"][0]
    work = engine.works[before]
    assert work.max_new_tokens == int(0.6 * (CONTEXT - len(work.prompt_ids) - 16))
    # It ended by itself all the same.
    assert (choice["finish_reason"], choice["max_tokens_capped"]) == ("stop", "load")


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_a_cut_by_the_context_is_told(scripted: Pair, path: str) -> None:
    scripted[1].say("Hello.")
    name = "max_new_tokens" if path == "/generate" else "max_tokens"
    body = post(scripted[0], path, **TEN[path] | {name: 2 * CONTEXT}).json()
    told = body if path == "/generate" else body["choices"][0]
    assert told[f"{name}_capped"] == "context"
    assert scripted[1].works[-1].max_new_tokens == CONTEXT - len(scripted[1].works[-1].prompt_ids) - 16


@pytest.mark.parametrize("path", TEN)
def test_the_priority_of_a_request_arrives(scripted: Pair, path: str) -> None:
    scripted[1].say("Hello.")
    post(scripted[0], path, **TEN[path], priority=-7)
    assert scripted[1].works[-1].params.priority == -7
    refused = httpx.post(
        scripted[0].url.removesuffix("/v1") + path, json=TEN[path] | {"priority": 101}, timeout=30
    )
    assert refused.status_code == 400 and "priority" in refused.text
