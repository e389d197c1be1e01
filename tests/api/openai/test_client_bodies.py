"""The request bodies that the ``llm`` tool and LangChain send, as they were captured, without either.

Captured of llm 0.36 and langchain-openai 1.7.4 over openai 3.57.0.
"""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.api.openai.harness import ScriptedEngine, Server

USER = [{"content": "Hi", "role": "user"}]
VERSION = {
    "type": "function",
    "function": {
        "name": "llm_version",
        "description": "Return the installed version of llm",
        "parameters": {"properties": {}, "type": "object"},
    },
}
WEATHER_PARAMETERS = {"properties": {"city": {"type": "string"}}, "required": ["city"], "type": "object"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": WEATHER_PARAMETERS,
    },
}
STRICT_WEATHER = {
    "type": "function",
    "function": {
        **WEATHER["function"],  # type: ignore[dict-item]
        "parameters": {**WEATHER_PARAMETERS, "additionalProperties": False},
        "strict": True,
    },
}
RESPONSES_WEATHER = {"type": "function", **WEATHER["function"]}  # type: ignore[dict-item]
RATING = {"anyOf": [{"type": "integer"}, {"type": "null"}]}
JOKE_SCHEMA = {
    "description": "A joke.",
    "properties": {
        "setup": {"description": "the start", "title": "Setup", "type": "string"},
        "punchline": {"title": "Punchline", "type": "string"},
        "rating": {**RATING, "title": "Rating"},
    },
    "required": ["setup", "punchline", "rating"],
    "title": "Joke",
    "type": "object",
    "additionalProperties": False,
}
JOKE_TOOL = {
    "type": "function",
    "function": {
        "name": "Joke",
        "description": "A joke.",
        "parameters": {
            "properties": {
                "setup": {"description": "the start", "type": "string"},
                "punchline": {"type": "string"},
                "rating": {**RATING, "default": None},
            },
            "required": ["setup", "punchline"],
            "type": "object",
        },
    },
}
DOG = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
}
DOG_FORMAT = {"type": "json_schema", "json_schema": {"name": "output", "schema": DOG}}
USAGE = {"include_usage": True}

WHOLE: Any = {"model": "scripted", "stream": False}
STREAM: Any = {"model": "scripted", "stream": True, "stream_options": USAGE}
CHAT = "chat/completions"
LEGACY = {"frequency_penalty": 0, "logprobs": None, "max_tokens": 256, "n": 1, "presence_penalty": 0}
LEGACY |= {"seed": None, "temperature": 0.7, "top_p": 1}

BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llm prompt": (CHAT, {**STREAM, "messages": USER, "max_tokens": 8}),
    "llm --no-stream": (CHAT, {**WHOLE, "messages": USER, "max_tokens": 8}),
    "llm options": (
        CHAT,
        {
            **STREAM,
            "messages": [{"role": "system", "content": "You are terse"}, *USER],
            "frequency_penalty": 0.1,
            "max_tokens": 8,
            "presence_penalty": 0.1,
            "seed": 3,
            "stop": "x",
            "temperature": 0.5,
            "top_p": 0.9,
        },
    ),
    "llm -c": (
        CHAT,
        {
            **STREAM,
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "\u0526\ufffd\ufffd3\u0014\ufffd"},
                {"role": "user", "content": "and then?"},
            ],
        },
    ),
    "llm --schema": (CHAT, {**STREAM, "messages": USER, "response_format": DOG_FORMAT}),
    "llm --schema --no-stream": (CHAT, {**WHOLE, "messages": USER, "response_format": DOG_FORMAT}),
    "llm -o json_object": (CHAT, {**STREAM, "messages": USER, "response_format": {"type": "json_object"}}),
    "llm -o logit_bias": (CHAT, {**STREAM, "messages": USER, "logit_bias": {"70": 5}}),
    "llm -T": (CHAT, {**STREAM, "messages": USER, "tools": [VERSION]}),
    "llm -T, the result": (
        CHAT,
        {
            **STREAM,
            "messages": [
                *USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "type": "function",
                            "id": "call_85c7",
                            "function": {"name": "llm_version", "arguments": "{}"},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "call_85c7", "content": "0.36"},
            ],
            "tools": [VERSION],
        },
    ),
    "llm completion": ("completions", {**STREAM, "prompt": "Once upon", "max_tokens": 8}),
    "llm completion --no-stream": ("completions", {**WHOLE, "prompt": "Once upon", "max_tokens": 8}),
    "llm completion logprobs": (
        "completions",
        {**STREAM, "prompt": "Once upon", "logprobs": 2, "max_tokens": 8},
    ),
    "ChatOpenAI invoke": (CHAT, {**WHOLE, "messages": USER}),
    "ChatOpenAI stream": (CHAT, {**STREAM, "messages": USER}),
    "ChatOpenAI parameters": (
        CHAT,
        {
            **WHOLE,
            "messages": USER,
            "frequency_penalty": 0.1,
            "logit_bias": {"70": 1},
            "max_completion_tokens": 20,
            "n": 2,
            "presence_penalty": 0.1,
            "seed": 3,
            "stop": ["zz"],
            "temperature": 0.2,
            "top_p": 0.9,
        },
    ),
    "ChatOpenAI logprobs": (CHAT, {**WHOLE, "messages": USER, "logprobs": True, "top_logprobs": 2}),
    "ChatOpenAI stream logprobs": (
        CHAT,
        {"model": "scripted", "stream": True, "messages": USER, "logprobs": True},
    ),
    "ChatOpenAI parts": (
        CHAT,
        {**WHOLE, "messages": [{"content": [{"type": "text", "text": "Hi"}], "role": "user"}]},
    ),
    "ChatOpenAI name": (CHAT, {**WHOLE, "messages": [{"content": "Hi", "role": "user", "name": "bob"}]}),
    "ChatOpenAI reasoning_effort": (CHAT, {**WHOLE, "messages": USER, "reasoning_effort": "none"}),
    "ChatOpenAI extra_body": (
        CHAT,
        {**WHOLE, "messages": USER, "top_k": 5, "min_p": 0.1, "regex": "a+"},
    ),
    "bind_tools": (CHAT, {**WHOLE, "messages": USER, "tools": [WEATHER]}),
    "bind_tools strict": (
        CHAT,
        {**WHOLE, "messages": USER, "parallel_tool_calls": False, "tools": [STRICT_WEATHER]},
    ),
    "a ToolMessage": (
        CHAT,
        {
            **WHOLE,
            "messages": [
                *USER,
                {
                    "content": None,
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "type": "function",
                            "id": "call_573c",
                            "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
                        }
                    ],
                },
                {"content": "sunny in Paris", "role": "tool", "tool_call_id": "call_573c"},
            ],
            "tools": [WEATHER],
        },
    ),
    "with_structured_output": (
        CHAT,
        {
            **WHOLE,
            "messages": USER,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"schema": JOKE_SCHEMA, "name": "Joke", "strict": True},
            },
        },
    ),
    "with_structured_output json_mode": (
        CHAT,
        {**WHOLE, "messages": USER, "response_format": {"type": "json_object"}},
    ),
    "responses": (
        "responses",
        {**WHOLE, "input": [{"content": "Hi", "role": "user", "type": "message"}]},
    ),
    "responses bind_tools": (
        "responses",
        {
            **WHOLE,
            "input": [{"content": "weather", "role": "user", "type": "message"}],
            "tools": [RESPONSES_WEATHER],
        },
    ),
    "responses ToolMessage": (
        "responses",
        {
            **WHOLE,
            "input": [
                {"content": "weather?", "role": "user", "type": "message"},
                {
                    "arguments": '{"city": "Paris"}',
                    "call_id": "call_c03b",
                    "name": "get_weather",
                    "type": "function_call",
                    "id": "fc_08d2",
                    "status": "completed",
                },
                {"type": "function_call_output", "output": "sunny in Paris", "call_id": "call_c03b"},
            ],
            "tools": [RESPONSES_WEATHER],
        },
    ),
    "responses history": (
        "responses",
        {
            **WHOLE,
            "input": [
                {"content": "a", "role": "user", "type": "message"},
                {
                    "type": "message",
                    "content": [{"type": "output_text", "text": "It is sunny.", "annotations": []}],
                    "role": "assistant",
                    "id": "msg_038a",
                },
                {"content": "b", "role": "user", "type": "message"},
            ],
        },
    ),
    "responses structured": (
        "responses",
        {
            **WHOLE,
            "input": [{"content": "j", "role": "user", "type": "message"}],
            "text": {
                "format": {"type": "json_schema", "strict": True, "name": "Joke", "schema": JOKE_SCHEMA}
            },
        },
    ),
    "OpenAI invoke": ("completions", {"model": "scripted", "prompt": ["Once"], **LEGACY}),
    "OpenAI batch": ("completions", {"model": "scripted", "prompt": ["a", "b"], **LEGACY}),
    "OpenAI stream": ("completions", {"model": "scripted", "stream": True, "prompt": "Once", **LEGACY}),
}


def texts_of(path: str, body: dict[str, Any], answer: httpx.Response) -> list[str]:
    """The answers' texts, as these clients put them together."""
    if not body.get("stream"):
        found = answer.json()
        if path == "responses":
            return [part["text"] for item in found["output"] for part in item["content"]]
        return [one["message"]["content"] if path == CHAT else one["text"] for one in found["choices"]]
    *events, last, empty = answer.text.split("\n\n")
    assert (last, empty) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    if "stream_options" in body:
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] > 0
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [one["finish_reason"] for one in choices if one["finish_reason"]] in (["stop"], ["length"])
    return ["".join((one["delta"].get("content") or "") if path == CHAT else one["text"] for one in choices)]


@pytest.mark.parametrize("name", BODIES)
def test_the_body_is_answered(scripted: tuple[Server, ScriptedEngine], name: str) -> None:
    path, body = BODIES[name]
    server, engine = scripted
    engine.say("It is sunny.")
    answer = httpx.post(f"{server.url}/{path}", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    limit = body.get("max_tokens", body.get("max_completion_tokens", 100))
    answers = body.get("n", 1) * (len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1)
    assert texts_of(path, body, answer) == ["It is sunny."[:limit]] * answers
    params = engine.works[-1].params
    for field in ("temperature", "top_p", "presence_penalty", "frequency_penalty", "top_k", "min_p", "regex"):
        if field in body:
            assert getattr(params, field) == body[field]
    wanted = body.get("response_format", body.get("text", {}).get("format", {}))
    assert (params.grammar is not None) == (wanted != {} or "regex" in body)
    if wanted.get("type") == "json_schema":
        schema = wanted.get("json_schema", wanted)["schema"]
        assert json.loads(params.json_schema or "") == schema


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "Joke"}}])
def test_a_tool_that_must_be_called(scripted: tuple[Server, ScriptedEngine], choice: Any) -> None:
    """``bind_tools(tool_choice="any")``, and ``with_structured_output(method="function_calling")``."""
    server, engine = scripted
    joke = {"setup": "s", "punchline": "p"}
    engine.say(json.dumps([{"name": "Joke", "arguments": joke}] if choice == "required" else joke))
    body = {**WHOLE, "messages": USER, "tools": [JOKE_TOOL], "tool_choice": choice}
    if choice != "required":
        body["parallel_tool_calls"] = False
    answer = httpx.post(f"{server.url}/{CHAT}", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    (call,) = answer.json()["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "Joke" and json.loads(call["function"]["arguments"]) == joke
    assert engine.works[-1].params.json_schema is not None


def test_previous_responses(scripted: tuple[Server, ScriptedEngine]) -> None:
    """``ChatOpenAI(use_previous_response_id=True)`` sends what is new alone."""
    server, engine = scripted
    engine.say("It is sunny.")
    first = httpx.post(f"{server.url}/responses", json=BODIES["responses"][1], timeout=30).json()
    body = {
        **WHOLE,
        "input": [{"content": "b", "role": "user", "type": "message"}],
        "previous_response_id": first["id"],
    }
    assert httpx.post(f"{server.url}/responses", json=body, timeout=30).status_code == 200
    assert "<|im_start|>assistant\nIt is sunny.<|im_end|>\n<|im_start|>user\nb<|im_end|>" in engine.prompt


def test_embeddings_are_refused(scripted: tuple[Server, ScriptedEngine]) -> None:
    """``OpenAIEmbeddings.embed_query``."""
    body = {"model": "scripted", "input": ["a"], "encoding_format": "base64"}
    answer = httpx.post(f"{scripted[0].url}/embeddings", json=body, timeout=30)
    assert answer.status_code == 400 and "makes no embeddings" in answer.json()["error"]["message"]
