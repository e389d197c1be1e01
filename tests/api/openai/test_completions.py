"""The older completions, and the list of models, as the official client sees them."""

from __future__ import annotations

from typing import Any

import pytest
from openai import NotFoundError, OpenAI

from mini_sglang.text.tokenizer import Tokenizer
from tests.api.openai.harness import ScriptedEngine, Server


def test_a_whole_completion(client: OpenAI, engine: ScriptedEngine) -> None:
    answer = client.completions.create(model="scripted", prompt="Hi")
    assert (answer.object, answer.model) == ("text_completion", "scripted")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Hello.", "stop")
    assert answer.choices[0].logprobs is None
    assert engine.prompt == "Hi"
    assert engine.works[-1].max_new_tokens == 16
    assert answer.usage is not None and answer.usage.total_tokens == 2 + 7
    client.completions.create(model="scripted", prompt=[10, 11, 12], max_tokens=3)
    assert engine.works[-1].prompt_ids == (10, 11, 12)


def test_a_streamed_completion(client: OpenAI, engine: ScriptedEngine) -> None:
    chunks = list(
        client.completions.create(
            model="scripted", prompt="Hi", stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "Hello."
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        "stop"
    ]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 7


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_and_choices(client: OpenAI, engine: ScriptedEngine, stream: bool) -> None:
    prompts = ["Hi", "Hello"]
    options: Any = {"model": "scripted", "prompt": prompts, "n": 2, "echo": True}
    if stream:
        texts = dict.fromkeys(range(4), "")
        for chunk in client.completions.create(stream=True, **options):
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        answer = client.completions.create(**options)
        texts = {choice.index: choice.text for choice in answer.choices}
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len("HiHello")
        assert answer.usage.completion_tokens == 4 * 7
    assert texts == {0: "HiHello.", 1: "HiHello.", 2: "HelloHello.", 3: "HelloHello."}
    assert sorted(len(work.prompt_ids) for work in engine.works) == [2, 2, 5, 5]


def test_logprobs_of_a_real_model(tiny: Server) -> None:
    create: Any = tiny.client.completions.create
    answer = create(model="tiny", prompt="Hé?", max_tokens=4, temperature=0, logprobs=2, echo=True)
    (choice,) = answer.choices
    found = choice.logprobs
    made = answer.usage.completion_tokens
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 4 + made
    assert found.tokens[:4] == ["H", "\\xc3", "\\xa9", "?"]
    assert found.text_offset[:5] == [0, 1, 1, 2, 3]
    assert found.token_logprobs[0] is None
    assert all(value <= 0 for value in found.token_logprobs[1:])
    # The token that was chosen greedily is the most probable one.
    for value, top in zip(found.token_logprobs[4:], found.top_logprobs[4:], strict=True):
        assert value == max(top.values())
    scored = create(model="tiny", prompt="Hé?", max_tokens=0, temperature=0, logprobs=2, echo=True)
    assert scored.choices[0].text == "Hé?"
    assert scored.usage.completion_tokens == 0
    assert scored.choices[0].logprobs.token_logprobs == found.token_logprobs[:4]


def test_several_choices_share_the_prompt(tiny: Server) -> None:
    prompt = "the same words again and again, " * 8 + "now"
    answer = tiny.client.completions.create(
        model="tiny", prompt=prompt, n=4, max_tokens=3, temperature=1, seed=5
    )
    stats = tiny.service.pool.stats().engines[0].counters
    pages = len(prompt) // 16 * 16
    assert stats["prefix_hit_tokens"] + stats["prefill_cache_hit_tokens"] >= 3 * (pages - 16)
    assert answer.usage is not None and answer.usage.prompt_tokens == len(prompt)
    # Each choice is what its own seed gives alone.
    for choice in answer.choices:
        alone = tiny.client.completions.create(
            model="tiny", prompt=prompt, max_tokens=3, temperature=1, seed=5 + choice.index
        )
        assert alone.choices[0].text == choice.text
        details = alone.usage.prompt_tokens_details if alone.usage else None
        assert details is not None and details.cached_tokens == len(prompt)
    salted = tiny.client.completions.create(
        model="tiny", prompt=prompt, max_tokens=1, extra_body={"cache_salt": "mine"}
    )
    details = salted.usage.prompt_tokens_details if salted.usage else None
    assert details is not None and details.cached_tokens == 0


def test_streamed_and_whole_chats_of_a_real_model_are_the_same(tiny: Server) -> None:
    options: Any = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 24,
        "seed": 3,
        "extra_body": {"ignore_eos": True},
    }
    whole = tiny.client.chat.completions.create(**options)
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in tiny.client.chat.completions.create(stream=True, **options)
    ]
    assert "".join(pieces) == whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == 24


def test_forced_calls_and_schemas_hold_with_a_real_model(tiny: Server) -> None:
    import json

    city = {"type": "string", "enum": ["Paris", "Rome"]}
    parameters: dict[str, Any] = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    parameters["additionalProperties"] = False
    with_ref = {**parameters, "properties": {"city": {"$ref": "#/$defs/place"}}, "$defs": {"place": city}}
    tools: Any = [
        {"type": "function", "function": {"name": "weather", "parameters": parameters}},
        {"type": "function", "function": {"name": "time", "parameters": with_ref}},
    ]
    messages: Any = [{"role": "user", "content": "Hi"}]
    named: Any = {"type": "function", "function": {"name": "time"}}
    create: Any = tiny.client.chat.completions.create
    for choice in ("required", named):
        for seed in range(3):
            answer = create(
                model="tiny", messages=messages, tools=tools, tool_choice=choice, seed=seed, max_tokens=400,
                parallel_tool_calls=False,
            )  # fmt: skip
            assert answer.choices[0].finish_reason == "tool_calls"
            (call,) = answer.choices[0].message.tool_calls
            assert call.function.name in ("weather", "time")
            assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": parameters, "strict": True}}
    answer = create(model="tiny", messages=messages, response_format=format, max_tokens=200)
    assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome")


def test_models(client: OpenAI, scripted: tuple[Server, ScriptedEngine], model_folder: Any) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("scripted", "model", "mini-sglang")
    assert client.models.retrieve("scripted") == model
    assert client.models.retrieve(model_folder.name) == model
    with pytest.raises(NotFoundError):
        client.models.retrieve("other/model")


def test_bytes_of_tokens(scripted: tuple[Server, ScriptedEngine]) -> None:
    from mini_sglang.api.openai.logprobs import token_bytes

    tokenizer: Tokenizer = scripted[0].service.tokenizer
    for text in ("é", "日本", "\\x41", "a b\n", "\ufffd"):
        ids = tokenizer.encode(text, add_special=False)
        assert b"".join(token_bytes(tokenizer, token_id) for token_id in ids) == text.encode()
