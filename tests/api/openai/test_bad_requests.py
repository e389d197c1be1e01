"""Requests that cannot be answered: each a 4xx in OpenAI's shape that names the field, and none leaks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from mini_sglang.errors import OverloadedError, UnavailableError
from tests.api.openai.harness import ScriptedEngine, Server, scripted_server

USER = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
SURROGATE = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
DEEP: Any = {"a": 1}
for _ in range(70):
    DEEP = {"a": DEEP}


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "chat/completions", {"messages": USER, **fields}


def text(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "completions", {"prompt": "Hi", **fields}


def response(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "responses", {"input": "Hi", **fields}


def messages(*given: Any) -> tuple[str, dict[str, Any]]:
    return "chat/completions", {"messages": list(given)}


# Each with the field the error must name.
BAD: list[tuple[tuple[str, Any], str | None]] = [
    (chat(temperature=2.1), "temperature"),
    (chat(temperature="1"), "temperature"),
    (chat(temperature=True), "temperature"),
    (chat(top_p=0), "top_p"),
    (chat(top_p=1.1), "top_p"),
    (chat(presence_penalty=2.5), "presence_penalty"),
    (chat(frequency_penalty=-2.5), "frequency_penalty"),
    (chat(n=0), "n"),
    (chat(n=129), "n"),
    (chat(n=True), "n"),
    (chat(n=1.0), "n"),
    (chat(n=10**30), "n"),
    (chat(max_tokens=0), "max_tokens"),
    (chat(max_tokens=-1), "max_tokens"),
    (chat(max_tokens=4, max_completion_tokens=5), "max_completion_tokens"),
    (chat(min_tokens=5, max_tokens=4), "min_tokens"),
    (chat(min_tokens=100_000), "min_tokens"),
    (chat(top_logprobs=2), "top_logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (chat(logprobs=1), "logprobs"),
    (chat(stop=""), "stop"),
    (chat(stop=["x"] * 17), "stop"),
    (chat(stop=[1]), "stop"),
    (chat(seed=1.5), "seed"),
    (chat(seed=2**64), "seed"),
    (chat(logit_bias={"x": 1}), "logit_bias"),
    (chat(logit_bias={"1": 101}), "logit_bias"),
    (chat(logit_bias={"999999": 1}), "logit_bias"),
    (chat(stop_token_ids=[-1]), "stop_token_ids"),
    (chat(stop_token_ids=[99999]), "stop_token_ids"),
    (chat(top_k=-2), "top_k"),
    (chat(stream="yes"), "stream"),
    (chat(stream_options={"include_usage": True}), "stream_options"),
    (chat(stream=True, stream_options={"include_usage": 1}), "include_usage"),
    (chat(stream=True, stream_options={"other": 1}), "other"),
    (chat(response_format={"type": "xml"}), "response_format.type"),
    (chat(response_format={"type": "json_schema"}), "response_format.json_schema.schema"),
    (chat(response_format="json"), "response_format"),
    (chat(regex="a", ebnf="start: x"), "regex"),
    (chat(regex="a" * 9000), "regex"),
    (chat(json_schema="{"), "json_schema"),
    (chat(json_schema=5), "json_schema"),
    (chat(tools=[{"type": "web_search"}]), "tools[0]"),
    (chat(tools=[TOOL, TOOL]), "tools"),
    (chat(tools=[{"type": "function", "function": {"name": "a b"}}]), "tools[0].function.name"),
    (
        chat(tools=[{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]),
        "tools[0].function.parameters",
    ),
    (chat(tools=[TOOL] * 129), "tools"),
    (chat(tool_choice="required"), "tool_choice"),
    (chat(tools=[TOOL], tool_choice="sometimes"), "tool_choice"),
    (chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "sub"}}), "tool_choice"),
    (
        chat(tools=[TOOL], tool_choice="required", response_format={"type": "json_object"}),
        "response_format",
    ),
    (chat(reasoning_effort="high"), "reasoning_effort"),
    (chat(chat_template_kwargs={"messages": []}), "chat_template_kwargs"),
    (chat(cache_salt="x" * 300), "cache_salt"),
    (chat(best_of=2), "best_of"),
    (chat(functions=[]), "functions"),
    (chat(audio={}), "audio"),
    (chat(modalities=["audio"]), "modalities"),
    (chat(continue_final_message=True), "continue_final_message"),
    (chat(temprature=1), "temprature"),
    (messages(), "messages"),
    (("chat/completions", {}), "messages"),
    (("chat/completions", {"messages": None}), "messages"),
    (("chat/completions", {"messages": "Hi"}), "messages"),
    (("chat/completions", []), "the body"),
    (messages("Hi"), "messages"),
    (messages({"role": "robot", "content": "Hi"}), "messages[0].role"),
    (messages({"content": "Hi"}), "messages[0].role"),
    (messages({"role": "user"}), "messages[0].content"),
    (messages({"role": "user", "content": 5}), "messages[0].content"),
    (messages({"role": "user", "content": []}), "messages[0].content"),
    (
        messages({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}),
        "messages[0].content[0]",
    ),
    (messages({"role": "user", "content": "Hi", "mood": "good"}), "messages[0]"),
    (messages(*USER, {"role": "tool", "content": "5", "tool_call_id": "c1"}), "messages[1].tool_call_id"),
    (
        messages(
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "5", "tool_call_id": "c2"},
        ),
        "messages[1].tool_call_id",
    ),
    (messages({"role": "user", "content": "Hi", "tool_calls": [CALL]}), "messages[0].tool_calls"),
    (messages({"role": "assistant", "tool_calls": [{"id": "x"}]}), "messages[0].tool_calls[0]"),
    (messages({"role": "assistant", "tool_calls": 5}), "messages[0].tool_calls"),
    (text(suffix="x"), "suffix"),
    (text(best_of=1), "best_of"),
    (text(prompt=""), "prompt"),
    (text(prompt=[]), "prompt"),
    (text(prompt=["a", ""]), "prompt"),
    (text(prompt=["a", 1]), "prompt"),
    (text(prompt=[1, "a"]), "prompt"),
    (text(prompt=[-1]), "prompt"),
    (text(prompt=[99999]), "prompt"),
    (text(prompt=["a"] * 129), "prompt"),
    (text(prompt=["a"] * 65, n=2), "n"),
    (text(max_tokens=0), "max_tokens"),
    (text(logprobs=21), "logprobs"),
    (text(logprobs=True), "logprobs"),
    (text(prompt=None), "prompt"),
    (response(input=""), "input"),
    (response(input=[]), "input"),
    (response(input=[{"type": "image", "role": "user"}]), "input[0].type"),
    (response(input=[{"role": "tool", "content": "x"}]), "input[0].role"),
    (response(input=[{"type": "function_call", "name": "add"}]), "input[0].call_id"),
    (
        response(input=[{"type": "function_call_output", "call_id": "x", "output": "5"}]),
        "messages[0].tool_call_id",
    ),
    (response(input=[{"type": "reasoning", "summary": []}]), "input"),
    (response(previous_response_id="resp_none"), "previous_response_id"),
    (response(background=True), "background"),
    (response(conversation="x"), "conversation"),
    (response(truncation="auto"), "truncation"),
    (response(tools=[{"type": "web_search"}]), "tools[0].type"),
    (response(text={"format": {"type": "xml"}}), "text.format.type"),
    (response(text={"format": 5}), "text.format"),
    (response(text={"colour": 5}), "text"),
    (response(reasoning={"effort": 5}), "reasoning.effort"),
    (response(include=["file_search_call.results"]), "include"),
    (response(max_output_tokens=0), "max_output_tokens"),
    (("embeddings", {"input": "Hi", "model": "scripted"}), None),
    (chat(chat_template_kwargs=DEEP), None),
]


@pytest.fixture(scope="module")
def http(scripted: tuple[Server, ScriptedEngine]) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=scripted[0].url, timeout=30) as client:
        yield client


def check_error(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].endswith((".", "…")) and len(error["message"]) < 2000
    return dict(error)


@pytest.mark.parametrize(("request_", "param"), BAD, ids=lambda value: str(value)[:60])
def test_a_bad_field_is_named(
    http: httpx.Client, engine: ScriptedEngine, request_: tuple[str, Any], param: str | None
) -> None:
    path, body = request_
    error = check_error(http.post("/" + path, json=body), 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert engine.works == []


RAW = [
    b"", b"{", b"[1", b'{"messages": NaN}', b'{"temperature": 1e400}', b'{"n": 1' + b"0" * 400 + b"}",
    b"\xff{}",
    b'{"messages": [{"role": "user", "content": "\xff"}]}', SURROGATE, b"[" * 100_000, b'{"a": Infinity}',
]  # fmt: skip


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
@pytest.mark.parametrize("raw", RAW, ids=range(len(RAW)))
def test_a_body_that_is_no_json(http: httpx.Client, engine: ScriptedEngine, path: str, raw: bytes) -> None:
    check_error(http.post("/" + path, content=raw, headers={"content-type": "application/json"}), 400)
    assert engine.works == []


def test_routes_methods_and_content_types(http: httpx.Client) -> None:
    check_error(http.get("/nothing"), 404)
    check_error(http.get("/chat/completions"), 405)
    check_error(http.post("/models", json={}), 405)
    body = json.dumps({"messages": USER})
    check_error(http.post("/chat/completions", content=body, headers={"content-type": "text/plain"}), 415)


def test_nothing_has_leaked(scripted: tuple[Server, ScriptedEngine], engine: ScriptedEngine) -> None:
    pool = scripted[0].service.pool.stats()
    assert (pool.inflight, pool.queued, pool.reserved, scripted[0].service.in_flight) == (0, 0, 0, 0)
    answer = scripted[0].client.chat.completions.create(model="scripted", messages=USER)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "Hello."


def test_errors_are_the_clients_own(
    client: OpenAI, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, scripted: Any
) -> None:
    create: Any = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as bad:
        create(model="scripted", messages=USER, temperature=3)
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="gpt-none", messages=USER)
    assert (missing.value.param, missing.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.BadRequestError) as long:
        create(model="scripted", messages=[{"role": "user", "content": "x" * 5000}])
    assert long.value.code == "context_length_exceeded"
    assert "maximum context length is 4096 tokens" in str(long.value)
    assert long.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
        client.embeddings.create(model="scripted", input="Hi")

    service = scripted[0].service

    def full(count: int = 1) -> Any:
        raise OverloadedError("The queue is full.", retry_after=3.0)

    def ending(count: int = 1) -> Any:
        raise UnavailableError("The server is ending.", retry_after=3.0)

    monkeypatch.setattr(service, "reserve", full)
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as refused:
            create(model="scripted", messages=USER, stream=stream)
        assert refused.value.response.headers["retry-after"] == "3"
    monkeypatch.setattr(service, "reserve", ending)
    with pytest.raises(openai.InternalServerError) as down:
        create(model="scripted", messages=USER)
    assert down.value.status_code == 503


def test_a_fault_in_the_middle_of_a_stream(
    client: OpenAI, engine: ScriptedEngine, http: httpx.Client
) -> None:
    engine.error = "the engine fell over"
    with pytest.raises(openai.APIError, match="fell over"):
        list(client.chat.completions.create(model="scripted", messages=USER, stream=True))  # type: ignore[arg-type]
    body = {"messages": USER, "stream": True}
    for path in ("chat/completions", "completions"):
        answer = http.post(f"/{path}", json=body if "chat" in path else {"prompt": "Hi", "stream": True})
        if answer.status_code == 200:
            assert "[DONE]" not in answer.text
            assert answer.text.count('"error"') == 1
        else:
            check_error(answer, 500)
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="scripted", messages=USER)  # type: ignore[arg-type]


def test_a_model_whose_template_takes_no_tools(tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.tiny_folders import tiny_folder

    folder = tiny_folder(tmp_path_factory.mktemp("plain"))
    with scripted_server(folder, responses_store_size=0) as (server, engine):
        engine.say("Hello.")
        with pytest.raises(openai.BadRequestError) as refused:
            server.client.chat.completions.create(model="scripted", messages=USER, tools=[TOOL])  # type: ignore
        assert refused.value.param == "tools"
        first = server.client.responses.create(model="scripted", input="Hi")
        assert first.to_dict()["store"] is False
        with pytest.raises(openai.BadRequestError, match="keeps no responses"):
            server.client.responses.create(model="scripted", input="Hi", previous_response_id=first.id)
        aliased = server.client.chat.completions.create(model=folder.name, messages=USER)  # type: ignore[arg-type]
        assert aliased.model == "scripted"


@pytest.mark.parametrize(
    "fields",
    [
        {"json_schema": {"$ref": "#/nowhere"}},
        {"json_schema": {"type": "nothing"}},
        {"regex": "(unclosed"},
        {"ebnf": "start: missing"},
        {
            "tools": [TOOL | {"function": {"name": "a", "parameters": {"$ref": "#/no"}}}],
            "tool_choice": "required",
        },
    ],
    ids=str,
)
def test_grammars_that_cannot_be_used(tiny: Server, fields: dict[str, Any]) -> None:
    for stream in (False, True):
        body = {"messages": USER, "stream": stream, "max_tokens": 1, **fields}
        answer = httpx.post(tiny.url + "/chat/completions", json=body, timeout=30)
        assert check_error(answer, 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields",
    [
        {"regex": "(a+)+$"},
        {"regex": ".{1,99999}"},
        {"json_schema": {"type": "object", "properties": {"a": {"$ref": "#"}}}},
    ],
    ids=str,
)
def test_hostile_grammars_are_compiled_or_refused(tiny: Server, fields: dict[str, Any]) -> None:
    answer = httpx.post(
        tiny.url + "/chat/completions", json={"messages": USER, "max_tokens": 1, **fields}, timeout=30
    )
    assert answer.status_code in (200, 400), answer.text
