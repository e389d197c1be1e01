"""What the official client does beyond one call: parsing, retrying, timing out, speaking to it raw."""

from __future__ import annotations

import asyncio
import json
import re
import string
import time
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from mini_sglang.errors import OverloadedError, UnavailableError
from tests.api.openai.harness import ScriptedEngine, Server, scripted_server
from tests.api.serving import settle

USER: Any = [{"role": "user", "content": "Hi"}]
PAIR = tuple[Server, ScriptedEngine]


class Dog(BaseModel):
    """A dog."""

    name: str
    age: int | None
    mood: Literal["good", "bad"] = "good"


REX = '{"name": "Rex", "age": 3, "mood": "good"}'


def test_chat_parse_gives_the_model(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.say(REX)
    answer = client.chat.completions.parse(model="scripted", messages=USER, response_format=Dog)
    assert answer.choices[0].message.parsed == Dog(name="Rex", age=3)
    sent = json.loads(engine.works[-1].params.json_schema or "")
    assert set(sent["properties"]) == {"name", "age", "mood"} and sent["additionalProperties"] is False
    with client.chat.completions.stream(model="scripted", messages=USER, response_format=Dog) as stream:
        final = [event for event in stream if event.type == "content.done"]
        assert stream.get_final_completion().choices[0].message.parsed == Dog(name="Rex", age=3)
    assert [event.parsed for event in final] == [Dog(name="Rex", age=3)]


def test_parse_tells_of_an_answer_cut_short(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.say(REX)
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="scripted", messages=USER, response_format=Dog, max_tokens=3)


def test_parse_gives_the_arguments_of_a_call(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.say(f'<tool_call>{{"name": "Dog", "arguments": {REX}}}</tool_call>')
    tool = openai.pydantic_function_tool(Dog)
    answer = client.chat.completions.parse(model="scripted", messages=USER, tools=[tool])
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.parsed_arguments == Dog(name="Rex", age=3)


def test_responses_parse_gives_the_model(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.say(REX)
    answer = client.responses.parse(model="scripted", input="Hi", text_format=Dog)
    assert answer.output_parsed == Dog(name="Rex", age=3)
    with client.responses.stream(model="scripted", input="Hi", text_format=Dog) as stream:
        assert stream.get_final_response().output_parsed == Dog(name="Rex", age=3)


def test_a_real_model_answers_what_parse_can_read(tiny: Server) -> None:
    """Random weights write long strings: the schema bounds them."""

    class Answer(BaseModel):
        mood: Literal["good", "bad"]
        sure: bool

    for seed in range(3):
        answer = tiny.client.chat.completions.parse(
            model="tiny", messages=USER, response_format=Answer, seed=seed, max_tokens=400
        )
        assert isinstance(answer.choices[0].message.parsed, Answer)


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_for_want_of_room_is_tried_again_when_it_says(
    scripted: PAIR, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    service = scripted[0].service
    real, times = service.reserve, list[float]()

    def full_at_first(count: int = 1) -> Any:
        times.append(time.monotonic())
        if len(times) == 1:
            raise OverloadedError("The queue is full.", retry_after=1.0)
        if len(times) == 2:
            raise UnavailableError("No engine is alive.", retry_after=1.0)
        return real(count)

    monkeypatch.setattr(service, "reserve", full_at_first)
    with OpenAI(base_url=scripted[0].url, api_key="none", max_retries=2) as client:
        answer: Any = client.chat.completions.create(model="scripted", messages=USER, stream=stream)
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            text = answer.choices[0].message.content
    assert text == "Hello."
    # Each wait is what Retry-After said: the client's own first one would be half of it at most.
    assert len(times) == 3 and times[1] - times[0] >= 0.95 and times[2] - times[1] >= 0.95


def test_what_is_wrong_is_not_tried_again(scripted: PAIR, engine: ScriptedEngine) -> None:
    engine.gate.clear()
    with OpenAI(base_url=scripted[0].url, api_key="none", max_retries=5) as client:
        started = time.monotonic()
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="scripted", messages=USER, temperature=5)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-none")
        assert time.monotonic() - started < 20
    assert engine.works == []


def test_a_client_that_times_out_leaves_nothing_behind(scripted: PAIR, engine: ScriptedEngine) -> None:
    engine.endless = True
    with pytest.raises(openai.APITimeoutError):
        scripted[0].client.with_options(timeout=0.3).chat.completions.create(model="scripted", messages=USER)
    settle(lambda: scripted[0].service.in_flight == 0, "the request's end")


def test_keys(model_folder: Path) -> None:
    with scripted_server(model_folder, api_key="secret") as (server, engine):
        engine.say("Hello.")
        for call in (
            lambda: server.client.models.list(),
            lambda: server.client.chat.completions.create(model="scripted", messages=USER),
            lambda: server.client.chat.completions.create(model="scripted", messages=USER, stream=True),
            lambda: server.client.responses.create(model="scripted", input="Hi"),
        ):
            with pytest.raises(openai.AuthenticationError, match="not a valid one"):
                call()
        with OpenAI(base_url=server.url, api_key="secret") as client:
            assert [model.id for model in client.models.list()] == ["scripted"]
            answer = client.chat.completions.create(model="scripted", messages=USER)
            assert answer.choices[0].message.content == "Hello."


def test_raw_responses_and_request_ids(client: OpenAI, engine: ScriptedEngine) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="scripted", messages=USER, extra_headers={"x-request-id": "mine-1"}
    )
    assert raw.request_id == "mine-1" and raw.parse().choices[0].message.content == "Hello."
    answer = client.chat.completions.create(model="scripted", messages=USER)
    assert answer._request_id
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="scripted", messages=USER, top_p=0, extra_headers={"x-request-id": "mine-2"}
        )
    assert refused.value.request_id == "mine-2"


def test_the_async_client_does_the_same(scripted: PAIR, engine: ScriptedEngine) -> None:
    engine.say(REX)

    async def run() -> None:
        async with AsyncOpenAI(base_url=scripted[0].url, api_key="none", max_retries=0) as client:
            parsed = await client.chat.completions.parse(model="scripted", messages=USER, response_format=Dog)
            assert parsed.choices[0].message.parsed == Dog(name="Rex", age=3)
            async with client.responses.stream(model="scripted", input="Hi", text_format=Dog) as events:
                assert (await events.get_final_response()).output_parsed == Dog(name="Rex", age=3)
            pieces = await client.completions.create(
                model="scripted", prompt="Hi", stream=True, max_tokens=100
            )
            assert "".join([piece.choices[0].text async for piece in pieces]) == REX
            many = await asyncio.gather(
                *(client.chat.completions.create(model="scripted", messages=USER) for _ in range(8))
            )
            assert [one.choices[0].message.content for one in many] == [REX] * 8
            assert [model.id async for model in client.models.list()] == ["scripted"]
            engine.endless = True
            with pytest.raises(openai.APITimeoutError):
                await client.with_options(timeout=0.3).responses.create(model="scripted", input="Hi")

    asyncio.run(run())
    settle(lambda: scripted[0].service.in_flight == 0, "the request's end")


def test_structured_outputs(client: OpenAI, engine: ScriptedEngine) -> None:
    def params(**outputs: Any) -> Any:
        body = {"structured_outputs": outputs}
        client.chat.completions.create(model="scripted", messages=USER, extra_body=body)
        return engine.works[-1].params

    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
    assert json.loads(params(json=schema).json_schema) == schema
    assert json.loads(params(json=json.dumps(schema), regex=None).json_schema) == schema
    assert json.loads(params(json={}).json_schema) == {}
    assert params(regex="a+").regex == "a+"
    assert params(grammar='start: "a"').ebnf == 'start: "a"'
    assert params(choice=["yes", "n.o"]).regex == "yes|n\\.o"
    assert params(json_object=True, regex=None).json_object
    body: Any = {"structured_outputs": {"choice": ["a"]}}
    client.completions.create(model="scripted", prompt="Hi", extra_body=body)
    assert engine.works[-1].params.regex == "a"
    client.responses.create(model="scripted", input="Hi", extra_body=body)
    assert engine.works[-1].params.regex == "a"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
        ({"structured_outputs": "json"}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
        ({"structured_outputs": {"regex": 5}}, "regex"),
        ({"structured_outputs": {"choice": []}}, "choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a"}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, None),
    ],
)
def test_structured_outputs_that_are_none(
    client: OpenAI, engine: ScriptedEngine, body: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="scripted", messages=USER, extra_body=body)
    assert param is None or refused.value.param == param
    assert engine.works == []


def test_a_real_model_chooses_among_texts_of_any_kind(tiny: Server) -> None:
    texts = ["It's 5 o'clock - or so", "naïve 😀", "a\nb", string.punctuation, "<|im_end|>"]
    found = set()
    for seed in range(12):
        answer = tiny.client.chat.completions.create(
            model="tiny",
            messages=USER,
            seed=seed,
            max_tokens=60,
            extra_body={"structured_outputs": {"choice": texts}},
        )
        assert answer.choices[0].finish_reason == "stop"
        found.add(answer.choices[0].message.content)
    assert found <= set(texts) and len(found) > 1
    answer = tiny.client.chat.completions.create(
        model="tiny", messages=USER, extra_body={"structured_outputs": {"regex": "[a-c]{3}x"}}
    )
    assert re.fullmatch("[a-c]{3}x", answer.choices[0].message.content or "")


def test_an_answer_goes_on_with_the_last_message(client: OpenAI, engine: ScriptedEngine) -> None:
    def prompt(content: str, **fields: Any) -> str:
        messages = [*USER, {"role": "assistant", "content": content}]
        body = {"continue_final_message": True, **fields}
        client.chat.completions.create(model="scripted", messages=messages, extra_body=body)
        return engine.prompt

    start = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    for content in ("Once upon", "It ends in white space  ", "Hi<|im_end|>\n", ""):
        assert prompt(content) == start + content
        assert prompt(content, add_generation_prompt=False) == start + content
    # What looks like the end of the turn is text: its own tokens, not the control token.
    prompt("Hi<|im_end|>")
    ids = engine.works[-1].prompt_ids
    assert ids.count(2) == 1  # the end of the user's turn
    for fields in ({"continue_final_message": False}, {"continue_final_message": None}):
        assert prompt("Yes.", **fields) == f"{start}Yes.<|im_end|>\n<|im_start|>assistant\n"


def test_a_thought_that_is_gone_on_with_stays_one(client: OpenAI, engine: ScriptedEngine) -> None:
    engine.say(" and so</think> Yes.")

    def answer(content: str) -> tuple[str | None, str | None]:
        messages = [*USER, {"role": "assistant", "content": content}]
        body = {"continue_final_message": True}
        made: Any = client.chat.completions.create(model="scripted", messages=messages, extra_body=body)
        message = made.choices[0].message
        return getattr(message, "reasoning_content", None), message.content

    assert answer("<think>Well") == (" and so", "Yes.")
    assert answer("<think>") == ("and so", "Yes.")
    assert answer("<think>Well.</think>Then") == (None, " and so</think> Yes.")


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": USER},
        {"messages": [*USER, {"role": "assistant", "content": "a"}], "add_generation_prompt": True},
        {
            "messages": [
                *USER,
                {
                    "role": "assistant",
                    "content": "a",
                    "tool_calls": [
                        {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                    ],
                },
            ]
        },
    ],
    ids=["user", "both", "calls"],
)
def test_messages_that_cannot_be_gone_on_with(
    client: OpenAI, engine: ScriptedEngine, fields: dict[str, Any]
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.post(
            "/chat/completions", body={"continue_final_message": True, **fields}, cast_to=dict[str, Any]
        )
    assert refused.value.param == "continue_final_message"
    assert engine.works == []
