"""The Responses API as the official client sees it."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import OpenAI

from mini_sglang.api.openai.store import ResponseStore
from tests.api.openai.harness import ScriptedEngine

TOOL: Any = {
    "type": "function",
    "name": "weather",
    "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'


def test_a_whole_response(client: OpenAI, engine: ScriptedEngine) -> None:
    response = client.responses.create(
        model="scripted", input="Hi", instructions="Be brief.", metadata={"a": "b"}, temperature=0.5
    )
    assert response.output_text == "Hello."
    assert (response.object, response.status, response.model) == ("response", "completed", "scripted")
    assert response.metadata == {"a": "b"}
    assert (response.temperature, response.instructions) == (0.5, "Be brief.")
    usage = response.usage
    assert usage is not None
    assert usage.output_tokens == 7
    assert usage.input_tokens == len(engine.works[0].prompt_ids)
    assert usage.input_tokens_details.cached_tokens == 0
    assert engine.prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>")


def test_the_events_of_a_response(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.say("<think>hm</think>Yes.\n" + CALL)
    events = list(client.responses.create(model="scripted", input="Hi", tools=[TOOL], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    order = [kind for at, kind in enumerate(kinds) if at == 0 or kinds[at - 1] != kind]
    assert order == [
        "response.created", "response.in_progress",
        "response.output_item.added", "response.content_part.added", "response.reasoning_text.delta",
        "response.reasoning_text.done", "response.content_part.done", "response.output_item.done",
        "response.output_item.added", "response.content_part.added", "response.output_text.delta",
        "response.output_text.done", "response.content_part.done", "response.output_item.done",
        "response.output_item.added", "response.function_call_arguments.delta",
        "response.function_call_arguments.done", "response.output_item.done", "response.completed",
    ]  # fmt: skip
    last: Any = events[-1]
    thought, message, call = last.response.output
    assert thought.content[0].text == "hm"
    assert message.content[0].text == "Yes."
    assert (call.name, call.arguments, call.status) == ("weather", '{"city": "Paris"}', "completed")
    assert last.response.usage.output_tokens_details.reasoning_tokens > 0


def test_the_client_accumulates_a_stream(client: OpenAI, engine: ScriptedEngine) -> None:
    with client.responses.stream(model="scripted", input="Hi") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == "Hello."
    engine.say(CALL)
    with client.responses.stream(model="scripted", input="Hi", tools=[TOOL]) as stream:
        (call,) = stream.get_final_response().output
    assert call.type == "function_call" and call.parsed_arguments == {"city": "Paris"}
    engine.say("")
    with client.responses.stream(model="scripted", input="Hi") as stream:
        assert stream.get_final_response().output_text == ""


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_goes_on(client: OpenAI, engine: ScriptedEngine, stream: bool) -> None:
    engine.say(CALL, "It rains.")
    if stream:
        events: Any = client.responses.create(model="scripted", input="Weather?", tools=[TOOL], stream=True)
        first = list(events)[-1].response
    else:
        first = client.responses.create(model="scripted", input="Weather?", tools=[TOOL])
    (call,) = first.output
    assert call.type == "function_call"
    second = client.responses.create(
        model="scripted",
        previous_response_id=first.id,
        tools=[TOOL],
        input=[{"type": "function_call_output", "call_id": call.call_id, "output": "rain"}],
    )
    assert second.output_text == "It rains."
    assert second.previous_response_id == first.id
    assert "<|im_start|>user\nWeather?<|im_end|>" in engine.prompt
    assert CALL in engine.prompt
    assert "<|im_start|>tool\nrain<|im_end|>" in engine.prompt
    # The same without the server's memory, from what the client was given.
    remembered = engine.prompt
    items: Any = [{"role": "user", "content": "Weather?"}, *(item.model_dump() for item in first.output)]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "rain"})
    client.responses.create(model="scripted", input=items, tools=[TOOL])
    assert engine.prompt == remembered
    assert client.responses.retrieve(first.id).output == first.output
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as gone:
        client.responses.create(model="scripted", input="x", previous_response_id=first.id)
    assert gone.value.code == "previous_response_not_found"


def test_what_is_not_stored_is_not_there(client: OpenAI, engine: ScriptedEngine) -> None:
    response = client.responses.create(model="scripted", input="Hi", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_cut_short(client: OpenAI, engine: ScriptedEngine, stream: bool) -> None:
    options: Any = {"model": "scripted", "input": "Hi", "max_output_tokens": 3}
    if stream:
        last = list(client.responses.create(stream=True, **options))[-1]
        assert last.type == "response.incomplete"
        response = last.response
    else:
        response = client.responses.create(**options)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output_text == "Hel"


def test_a_response_that_fails(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.error = "the engine fell over"
    try:
        events = list(client.responses.create(model="scripted", input="Hi", stream=True))
    except openai.InternalServerError:
        return  # it fell over before the first event went out
    last: Any = events[-1]
    assert last.type == "response.failed"
    assert "fell over" in last.response.error.message


def test_logprobs_and_formats(client: OpenAI, engine: ScriptedEngine) -> None:
    options: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    response: Any = client.responses.create(model="scripted", input="Hi", **options)
    entries = response.output[0].content[0].logprobs
    assert "".join(entry.token for entry in entries) == "Hello."
    events: Any = client.responses.create(model="scripted", input="Hi", stream=True, **options)
    streamed = [entry for e in events if e.type == "response.output_text.delta" for entry in e.logprobs]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]
    schema: Any = {"type": "object", "properties": {}}
    format: Any = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    client.responses.create(model="scripted", input="Hi", text=format)
    assert engine.works[-1].params.json_schema is not None


def test_the_store_is_bounded_and_keeps_tenants_apart() -> None:
    store = ResponseStore(2, max_bytes=500)
    for name in ("a", "b"):
        store.put("t", {"id": name}, [{"role": "user", "content": name}])
    assert store.get("t", "a") == ({"id": "a"}, [{"role": "user", "content": "a"}])
    store.put("t", {"id": "c"}, [])
    assert store.get("t", "b") is None and store.get("t", "a") is not None
    assert store.get("other", "a") is None
    store.put("t", {"id": "huge"}, [{"content": "x" * 600}])
    assert store.get("t", "huge") is None
    store.put("t", {"id": "big"}, [{"content": "x" * 400}])
    store.put("t", {"id": "big"}, [{"content": "y" * 400}])
    assert store.get("t", "c") is None and store.get("t", "big") is not None
    store.put("t", {"id": "large"}, [{"content": "z" * 400}])
    assert store.get("t", "big") is None and store.get("t", "large") is not None
    store.put("t", {"id": "big"}, [])
    assert store.delete("t", "big") and not store.delete("t", "big")
    assert store._bytes == sum(map(len, store._entries.values()))
    off = ResponseStore(0)
    off.put("t", {"id": "a"}, [])
    assert off.get("t", "a") is None
