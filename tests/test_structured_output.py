"""Answers of a given form through the public engine: tiny random models and the starter model."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema_rs
import pytest

from mini_sglang import Engine, FinishReason, InvalidValueError, Output, SamplingParams
from mini_sglang.cli.args import chosen_params, command_parser
from tests.tiny_folders import tiny_folder

# A token is a byte here, so that indentation alone could use up an answer's tokens.
SCHEMA = {
    "x-guidance": {"whitespace_pattern": " "},
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "size": {"enum": ["S", "M", "L"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "size", "count"],
    "additionalProperties": False,
}
FORMS: list[dict[str, object]] = [
    {"json_schema": SCHEMA},
    {"regex": r"\d{3}-[a-f]{2,6}"},
    {"ebnf": 'start: ("ab" | "c"){1,5} "."'},
    {},
]


def holds(form: dict[str, object], output: Output) -> bool:
    if "json_schema" in form:
        return jsonschema_rs.is_valid(SCHEMA, json.loads(output.text))
    if "regex" in form:
        return re.fullmatch(str(form["regex"]), output.text) is not None
    return re.fullmatch(r"(ab|c){1,5}\.", output.text) is not None if form else True


def jobs(count: int) -> list[tuple[str, dict[str, object], SamplingParams]]:
    draw = random.Random(11)
    made = []
    for index in range(count):
        form = FORMS[index % len(FORMS)]
        params = SamplingParams(
            max_new_tokens=24 if not form else 160,
            temperature=draw.choice([0.0, 0.8, 1.5]),
            top_k=draw.choice([0, 5]),
            top_p=draw.choice([1.0, 0.8]),
            seed=index,
            min_new_tokens=draw.choice([0, 3]),
            repetition_penalty=draw.choice([1.0, 1.3]),
            logit_bias=draw.choice([{}, {40: 100.0, 70: 50.0}]),
            logprobs=index % 3 == 0,
            **form,  # type: ignore[arg-type]
        )
        made.append(("x" * (index % 7) + f"Prompt {index % 5}", form, params))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine(str(folder), dtype="fp32", kv_token_budget=8192, max_batch_size=32) as engine:
        yield engine


@pytest.fixture(scope="module")
def together(engine: Engine) -> list[Output]:
    requests = jobs(32)
    return engine.generate([prompt for prompt, _, _ in requests], [params for _, _, params in requests])


def test_random_models_answer_in_the_form_asked_for(together: list[Output]) -> None:
    for (_, form, params), output in zip(jobs(32), together, strict=True):
        assert holds(form, output), (form, output.text)
        if form:
            assert output.finish_reason is FinishReason.STOP
        if params.logprobs:
            assert len(output.logprobs) == len(output.token_ids)


def test_the_answer_alone_is_the_answer_in_a_batch(engine: Engine, together: list[Output]) -> None:
    for (prompt, _, params), output in list(zip(jobs(32), together, strict=True))[::3]:
        alone = engine.generate(prompt, params)
        assert (alone.token_ids, alone.text) == (output.token_ids, output.text)


def test_answers_after_retraction_are_the_same(folder: Path, together: list[Output]) -> None:
    requests = jobs(32)
    with Engine(str(folder), dtype="fp32", kv_token_budget=192, max_batch_size=24) as small:
        # How many are there at once depends on the time that their grammars take to compile.
        for _ in range(30):
            outputs = small.generate(
                [prompt for prompt, _, _ in requests], [params for _, _, params in requests]
            )
            assert [output.token_ids for output in outputs] == [output.token_ids for output in together]
            if small.stats()["retractions"] > 0:
                break
        else:
            pytest.fail("the pool was meant to run out")


def test_bad_grammars_are_refused_before_anything_runs(engine: Engine) -> None:
    before = engine.stats()["requests"]
    for form in ({"regex": "(a"}, {"json_schema": {"type": "thing"}}, {"ebnf": "start: nowhere"}):
        with pytest.raises(InvalidValueError) as caught:
            engine.generate(["fine", "x"], [SamplingParams(), SamplingParams(**form)])
        assert caught.value.field == next(iter(form))
    assert engine.stats()["running"] == 0 and engine.stats()["requests"] <= before + 3


def test_streams_and_asyncio(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=160, json_schema=json.dumps(SCHEMA), temperature=1.0, seed=5)
    with engine.stream("a", params) as stream:
        text = "".join(delta.text for delta in stream)
    assert jsonschema_rs.is_valid(SCHEMA, json.loads(text))

    async def ask() -> Output:
        output: Output = await engine.agenerate("a", params)
        return output

    assert asyncio.run(ask()).text == text


def test_ignoring_the_end_still_ends_where_the_grammar_does(engine: Engine) -> None:
    params = SamplingParams(max_new_tokens=100, regex="ab{2}c", ignore_eos=True, min_new_tokens=50)
    output = engine.generate("x", params)
    assert output.text == "abbc" and output.finish_reason is FinishReason.STOP


def test_parameters_are_checked_and_normalised() -> None:
    text = '{ "type": "object",\n "properties": {"b": {}, "a": {}} }'
    params = SamplingParams(json_schema=json.loads(text))
    assert params.json_schema == '{"type":"object","properties":{"b":{},"a":{}}}'
    assert params == SamplingParams(json_schema=text)
    assert params.grammar == ("json_schema", params.json_schema) and SamplingParams().grammar is None
    assert SamplingParams(json_object=True).grammar == ("json_object", '{"type":"object"}')
    loop: dict[str, object] = {}
    loop["items"] = loop
    bad: list[dict[str, object]] = [
        {"json_schema": "{"}, {"json_schema": "[1]"}, {"json_schema": 5}, {"json_schema": loop},
        {"json_schema": {"const": float("nan")}}, {"json_schema": '{"const": NaN}'},
        {"json_schema": "\ud800"}, {"json_schema": {"const": "\ud800"}}, {"json_schema": {"a": object()}},
        {"json_schema": '{"a":' * 99 + "1" + "}" * 99}, {"json_schema": {"enum": ["x" * 300_000]}},
        {"regex": ""}, {"regex": 3}, {"regex": "x" * 10_000}, {"regex": "\udfff"}, {"ebnf": "x" * 100_000},
        {"json_object": 1}, {"json_object": True, "regex": "a"}, {"regex": "a", "ebnf": "b"},
    ]  # fmt: skip
    for form in bad:
        with pytest.raises(InvalidValueError) as caught:
            SamplingParams(**form)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 700


def test_the_command_line_takes_grammars() -> None:
    parser = command_parser()
    schema = ["generate", "--json-schema", '{"type": "object"}', "hello"]
    assert chosen_params(parser.parse(schema), {}).json_schema == '{"type":"object"}'
    assert chosen_params(parser.parse(["generate", "--regex", "123", "hello"]), {}).regex == "123"
    assert chosen_params(parser.parse(["generate", "--ebnf", "start: A", "hello"]), {}).ebnf == "start: A"
    assert chosen_params(parser.parse(["generate", "--json-object", "hello"]), {}).json_object is True


def test_the_starter_model_answers_in_json(starter_gguf: Path) -> None:
    schema = {
        "type": "object",
        "properties": {
            "country": {"type": "string", "maxLength": 20},
            "capital": {"enum": ["Paris", "Rome"]},
        },
        "required": ["country", "capital"],
        "additionalProperties": False,
    }
    questions = ["Describe France.", "Describe Italy.", "Which country is Rome the capital of?"]
    prompts = [[{"role": "user", "content": question}] for question in questions]
    with Engine(str(starter_gguf), dtype="fp32", kv_token_budget=2048) as engine:
        outputs = engine.generate(prompts, SamplingParams(max_new_tokens=48, json_schema=json.dumps(schema)))
        date = engine.generate(
            "The war ended on ", SamplingParams(max_new_tokens=16, regex=r"\d{4}-\d\d-\d\d")
        )
    for output in outputs:
        value = json.loads(output.text)
        assert jsonschema_rs.is_valid(schema, value) and output.finish_reason is FinishReason.STOP
    first = json.loads(outputs[0].text)
    assert first["country"].lower() == "france" and first["capital"] == "Paris"
    assert re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", date.text)
