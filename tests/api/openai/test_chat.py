"""Chat completions as the official client sees them."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionChunk

from mini_sglang.api.openai.choices import Plan, run
from mini_sglang.api.service import Service
from mini_sglang.engine.pool import EnginePool
from mini_sglang.text.tokenizer import load_tokenizer
from mini_sglang.types import SamplingParams
from tests.api.openai.harness import ScriptedEngine, Server, server_settings

USER: Any = [{"role": "user", "content": "Hi"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'


def collect(chunks: list[ChatCompletionChunk]) -> dict[str, Any]:
    """What a client puts together of one streamed answer."""
    found: dict[str, Any] = {"content": "", "reasoning": "", "calls": {}, "finish": []}
    for chunk in chunks:
        for choice in chunk.choices:
            delta = choice.delta
            found["content"] += delta.content or ""
            found["reasoning"] += getattr(delta, "reasoning_content", None) or ""
            for part in delta.tool_calls or []:
                call = found["calls"].setdefault(part.index, {"id": part.id, "name": "", "arguments": ""})
                assert part.function is not None
                call["name"] += part.function.name or ""
                call["arguments"] += part.function.arguments or ""
            if choice.finish_reason:
                found["finish"].append(choice.finish_reason)
    return found


def test_a_whole_answer(client: OpenAI, engine: ScriptedEngine) -> None:
    answer = client.chat.completions.create(model="scripted", messages=USER)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "scripted"
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello.")
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert choice.message.tool_calls is None
    usage = answer.usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert usage.prompt_tokens == len(engine.works[0].prompt_ids)
    assert usage.completion_tokens == len("Hello.") + 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 0
    assert engine.prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_openai_defaults_and_every_parameter_reach_the_engine(client: OpenAI, engine: ScriptedEngine) -> None:
    client.chat.completions.create(model="scripted", messages=USER)
    params = engine.works[-1].params
    assert params.temperature == 1.0
    assert params.top_p == 1.0
    assert engine.works[-1].max_new_tokens == 4096 - len(engine.works[-1].prompt_ids) - 16
    client.chat.completions.create(
        model="scripted",
        messages=USER,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        stop=["x", "y"],
        max_completion_tokens=5,
        logit_bias={"42": -3},
        presence_penalty=0.25,
        frequency_penalty=-0.25,
        user="me",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        parallel_tool_calls=True,
        extra_body={
            "top_k": 9,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "ignore_eos": True,
            "stop_token_ids": [5],
            "min_tokens": 2,
        },
    )
    params = engine.works[-1].params
    expected = {
        "temperature": 0.5, "top_p": 0.9, "seed": 7, "stop": ("x", "y"), "max_new_tokens": 5,
        "logit_bias": {42: -3.0}, "presence_penalty": 0.25, "frequency_penalty": -0.25, "top_k": 9,
        "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "stop_token_ids": (5,),
        "min_new_tokens": 2,
    }  # fmt: skip
    assert {name: getattr(params, name) for name in expected} == expected
    client.chat.completions.create(model="scripted", messages=USER, extra_body={"top_k": -1, "stop": None})
    assert engine.works[-1].params.top_k == 0


def test_a_streamed_answer(client: OpenAI, engine: ScriptedEngine) -> None:
    chunks = list(
        client.chat.completions.create(
            model="scripted", messages=USER, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert collect(chunks) == {"content": "Hello.", "reasoning": "", "calls": {}, "finish": ["stop"]}
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == len("Hello.") + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])
    without = list(client.chat.completions.create(model="scripted", messages=USER, stream=True))
    assert without[-1].choices[0].finish_reason == "stop"


def test_the_bytes_of_a_stream(scripted: tuple[Server, ScriptedEngine], engine: ScriptedEngine) -> None:
    body = {"messages": USER, "stream": True}
    with scripted[0].client.chat.completions.with_streaming_response.create(
        model="scripted", messages=USER, stream=True
    ) as response:
        text = b"".join(response.iter_bytes()).decode()
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-request-id"]
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert text.count("[DONE]") == 1
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events[:-2])
    assert body["stream"]


def test_the_async_client(scripted: tuple[Server, ScriptedEngine], engine: ScriptedEngine) -> None:
    async def run() -> tuple[str | None, str]:
        async with AsyncOpenAI(base_url=scripted[0].url, api_key="none") as client:
            whole = await client.chat.completions.create(model="scripted", messages=USER)
            stream = await client.chat.completions.create(model="scripted", messages=USER, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            return whole.choices[0].message.content, "".join(pieces)

    assert asyncio.run(run()) == ("Hello.", "Hello.")


@pytest.mark.parametrize("stream", [False, True])
def test_length_and_stop_strings(client: OpenAI, engine: ScriptedEngine, stream: bool) -> None:
    def finish(**options: Any) -> tuple[str, str]:
        if stream:
            found = collect(list(client.chat.completions.create(stream=True, **options)))
            return found["content"], found["finish"][0]
        (choice,) = client.chat.completions.create(**options).choices
        return choice.message.content or "", choice.finish_reason

    assert finish(model="scripted", messages=USER, max_tokens=3) == ("Hel", "length")
    assert finish(model="scripted", messages=USER, stop="lo") == ("Hel", "stop")


def test_several_choices(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.say("one", "two", "three")
    answer = client.chat.completions.create(model="scripted", messages=USER, n=3, seed=10)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert sorted(choice.message.content or "" for choice in answer.choices) == ["one", "three", "two"]
    assert sorted(work.params.seed or 0 for work in engine.works) == [10, 11, 12]
    usage = answer.usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert usage.prompt_tokens == len(engine.works[0].prompt_ids)
    assert usage.completion_tokens == len("onetwothree") + 3
    assert usage.prompt_tokens_details.cached_tokens == 0
    engine.say("one", "two", "three")
    chunks = list(
        client.chat.completions.create(
            model="scripted", messages=USER, n=3, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len("onetwothree") + 3
    by_index = {
        index: collect([c for c in chunks if c.choices and c.choices[0].index == index]) for index in range(3)
    }
    assert sorted(found["content"] for found in by_index.values()) == ["one", "three", "two"]
    assert all(found["finish"] == ["stop"] for found in by_index.values())


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: OpenAI, engine: ScriptedEngine, stream: bool) -> None:
    engine.say("Hé!")
    options: Any = {"model": "scripted", "messages": USER, "logprobs": True, "top_logprobs": 2}
    entries: list[Any] = []
    if stream:
        for chunk in client.chat.completions.create(stream=True, **options):
            logprobs = chunk.choices[0].logprobs
            entries += logprobs.content or [] if logprobs else []
    else:
        found = client.chat.completions.create(**options).choices[0].logprobs
        assert found is not None
        entries += found.content or []
    # A token per byte, and none for the end of the text.
    assert b"".join(bytes(entry.bytes) for entry in entries) == "Hé!".encode()
    assert [entry.token for entry in entries] == ["H", "\\xc3", "\\xa9", "!"]
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 2 for entry in entries)


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call(client: OpenAI, engine: ScriptedEngine, stream: bool) -> None:
    engine.say("Let me see.\n" + CALL)
    options: Any = {"model": "scripted", "messages": USER, "tools": [WEATHER]}
    if stream:
        found = collect(list(client.chat.completions.create(stream=True, **options)))
        (call,) = found["calls"].values()
        assert found["finish"] == ["tool_calls"]
        assert found["content"] == "Let me see."
        assert (call["name"], call["arguments"]) == ("weather", '{"city": "Paris"}')
        assert call["id"].startswith("call_")
    else:
        (choice,) = client.chat.completions.create(**options).choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "Let me see."
        (made,) = choice.message.tool_calls or []
        assert made.type == "function"
        assert (made.function.name, made.function.arguments) == ("weather", '{"city": "Paris"}')
    assert '"description": "The weather at a place."' in engine.prompt


def test_the_client_accumulates_a_streamed_call(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.say(CALL + CALL.replace("Paris", "Rome"))
    with client.chat.completions.stream(model="scripted", messages=USER, tools=[WEATHER]) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in kinds
    calls = message.tool_calls or []
    assert [json.loads(call.function.arguments)["city"] for call in calls] == ["Paris", "Rome"]
    assert len({call.id for call in calls}) == 2


def test_a_conversation_with_a_tool(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.say(CALL, "It rains.")
    first = client.chat.completions.create(model="scripted", messages=USER, tools=[WEATHER])
    message = first.choices[0].message
    (call,) = message.tool_calls or []
    # As a client sends it back: with every key that it got, null or not.
    messages: Any = [
        *USER,
        message.model_dump(),
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    answer = client.chat.completions.create(model="scripted", messages=messages, tools=[WEATHER])
    assert answer.choices[0].message.content == "It rains."
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>' in engine.prompt
    assert "<|im_start|>tool\nrain<|im_end|>" in engine.prompt


def test_a_broken_call_is_content(client: OpenAI, engine: ScriptedEngine) -> None:
    broken = '<tool_call>{"name": "weather", "arguments": {"city": Paris}}</tool_call>'
    engine.say(broken)
    (choice,) = client.chat.completions.create(model="scripted", messages=USER, tools=[WEATHER]).choices
    assert choice.message.tool_calls is None
    assert choice.message.content == broken
    assert choice.finish_reason == "stop"


def test_tool_choice(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.say(CALL)
    options: Any = {"model": "scripted", "messages": USER, "tools": [WEATHER]}
    (choice,) = client.chat.completions.create(tool_choice="none", **options).choices
    assert choice.message.content == CALL
    assert "description" not in engine.prompt
    assert engine.works[-1].params.json_schema is None
    engine.say('[{"name":"weather","arguments":{"city":"Oslo"}}]')
    (choice,) = client.chat.completions.create(tool_choice="required", **options).choices
    (call,) = choice.message.tool_calls or []
    assert call.type == "function" and call.function.arguments == '{"city":"Oslo"}'
    assert choice.message.content is None
    schema = json.loads(engine.works[-1].params.json_schema or "")
    assert (schema["type"], schema["minItems"]) == ("array", 1)
    engine.say('{"city":"Oslo"}')
    named: Any = {"type": "function", "function": {"name": "weather"}}
    (choice,) = client.chat.completions.create(tool_choice=named, **options).choices
    (call,) = choice.message.tool_calls or []
    assert call.type == "function" and call.function.name == "weather"
    assert call.function.arguments == '{"city":"Oslo"}'
    assert json.loads(engine.works[-1].params.json_schema or "") == WEATHER["function"]["parameters"]


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_are_given_apart(client: OpenAI, engine: ScriptedEngine, stream: bool) -> None:
    engine.say("<think>\nhm</think>\n\nYes.")
    options: Any = {"model": "scripted", "messages": USER}

    def parts(**more: Any) -> tuple[str, str]:
        if stream:
            found = collect(list(client.chat.completions.create(stream=True, **options, **more)))
            return found["reasoning"], found["content"]
        message = client.chat.completions.create(**options, **more).choices[0].message
        return getattr(message, "reasoning_content", ""), message.content or ""

    assert parts() == ("hm", "Yes.")
    assert parts(extra_body={"separate_reasoning": False}) == ("", "<think>\nhm</think>\n\nYes.")
    # A template that opens the thought itself.
    engine.say("hm</think>Yes.")
    assert parts(extra_body={"chat_template_kwargs": {"enable_thinking": True}}) == ("hm", "Yes.")
    assert engine.prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert parts(reasoning_effort="none") == ("", "hm</think>Yes.")


def test_response_formats(client: OpenAI, engine: ScriptedEngine) -> None:
    def params(**options: Any) -> Any:
        client.chat.completions.create(model="scripted", messages=USER, **options)
        return engine.works[-1].params

    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert params(response_format={"type": "json_object"}).json_object
    assert json.loads(params(response_format=named).json_schema) == schema
    assert params(response_format={"type": "text"}).grammar is None
    assert json.loads(params(extra_body={"guided_json": schema}).json_schema) == schema
    assert json.loads(params(extra_body={"json_schema": json.dumps(schema)}).json_schema) == schema
    assert params(extra_body={"regex": "a+"}).regex == "a+"
    assert params(extra_body={"guided_choice": ["yes", "n.o"]}).regex == "yes|n\\.o"
    assert params(extra_body={"guided_grammar": 'start: "a"'}).ebnf == 'start: "a"'


def test_developers_speak_as_the_system_where_the_template_knows_no_developer(
    client: OpenAI, engine: ScriptedEngine
) -> None:
    messages: Any = [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, *USER]
    client.chat.completions.create(model="scripted", messages=messages)
    assert engine.prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_a_client_that_leaves_ends_its_request(
    scripted: tuple[Server, ScriptedEngine], engine: ScriptedEngine
) -> None:
    engine.endless = True
    stream = scripted[0].client.chat.completions.create(model="scripted", messages=USER, n=2, stream=True)
    for _ in range(5):
        next(stream)
    stream.close()
    deadline = time.monotonic() + 10
    while scripted[0].service.in_flight and time.monotonic() < deadline:
        time.sleep(0.01)
    assert scripted[0].service.in_flight == 0
    assert len(engine.works) == 2
    pool = scripted[0].service.pool.stats()
    assert (pool.inflight, pool.queued, pool.reserved) == (0, 0, 0)


def test_further_choices_wait_for_the_first_token(
    scripted: tuple[Server, ScriptedEngine], engine: ScriptedEngine
) -> None:
    engine.gate.clear()
    done: list[Any] = []

    def ask() -> None:
        done.append(scripted[0].client.chat.completions.create(model="scripted", messages=USER, n=3))

    thread = threading.Thread(target=ask)
    thread.start()
    deadline = time.monotonic() + 10
    while not engine.works and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(engine.works) == 1
    engine.gate.set()
    thread.join(timeout=10)
    assert len(engine.works) == 3
    assert len(done[0].choices) == 3


@pytest.mark.parametrize("n", [1, 3])
def test_closing_the_steps_aborts_what_runs(model_folder: Path, n: int) -> None:
    settings = server_settings(model_folder)
    tokenizer = load_tokenizer(model_folder, cache_dir=settings.cache_path)
    engine = ScriptedEngine(tokenizer)
    engine.say("x")
    engine.endless = True

    async def ids() -> list[list[int]]:
        return [[1, 2, 3]]

    async def use() -> None:
        pool = EnginePool(lambda index: engine, settings)
        service = Service(settings, tokenizer, pool, "scripted")
        steps = run(service, Plan(ids, 1, SamplingParams(), n, True, "r", ""))
        seen: set[int] = set()
        while len(seen) < n:
            seen.add((await anext(steps)).index)
        # Between two deltas, where nobody waits for the engine.
        await steps.aclose()
        async with asyncio.timeout(10):
            while service.in_flight:
                await asyncio.sleep(0.01)
        assert (pool.stats().inflight, pool.stats().reserved) == (0, 0)
        await service.close()

    asyncio.run(use())
