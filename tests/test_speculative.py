"""Speculative decoding over real models: the same answers to the bit, in fewer steps."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mini_sglang import Engine, InvalidValueError, SamplingParams
from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.step import SampleSpec, SequenceResult, SequenceStep
from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from mini_sglang.engine.kv_cache import KVCacheManager
from mini_sglang.engine.request import Request
from mini_sglang.engine.speculation import TREE, Speculation
from tests.api.serving import serving
from tests.engine.test_speculation import Steady, rig
from tests.test_same_answer import EOS, FAST, Case, alone
from tests.test_same_answer import blocks as blocks
from tests.test_same_answer import folder as folder
from tests.test_same_answer import model as model
from tests.tiny_folders import tiny_folder


def core(path: Path, **settings: object) -> EngineCore:
    resolved = Settings.resolve({"dtype": "fp32", "device": "cpu", **settings})
    made = EngineCore(load_backend(path, resolved), resolved, EOS)
    made.speculator.costs = Steady()
    return made


def run(engine: EngineCore, requests: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in requests]
    for index, request in enumerate(requests):
        engine.add(engine.make_request(str(index), *request))
    while engine.has_work:
        for event in engine.step():
            answers[int(event.request_id)].extend(event.token_ids)
        engine.check()
    return answers


class Free(Steady):
    """Steps that cost next to nothing for another row, so that everything is guessed."""

    def step(self, rows: int) -> float:
        return 1.0 + 1e-6 * rows


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_answers_are_those_without_drafts(model: Case, batch: int, page_size: int) -> None:
    """Of every type of weights and KV; cold, warm, retracted; two of three with guesses, some wrong."""
    path, settings, requests, expected = model
    some = {1: slice(0, 64, 4), 4: slice(32), 64: slice(64)}[batch]
    chosen = [
        (prompt, replace(params, speculative="off" if index % 3 == 2 else None))
        for index, (prompt, params) in enumerate(requests)
    ][some]
    wanted = expected[some]

    class Told(Speculation):
        def find(self, request: Request, cache: KVCacheManager, room: int) -> tuple[str, list[int]]:
            draw = random.Random(len(request.tokens))
            guess = wanted[int(request.request_id)][request.num_output :][:room]
            return TREE, [id if draw.random() < 0.8 else draw.randrange(3, 90) for id in guess]

    for budget in (8192, 176):
        engine = core(
            path,
            speculation="prompt_lookup",
            page_size_tokens=page_size,
            kv_token_budget=budget,
            max_batch_size=batch,
            **settings,
        )
        rig(engine, Told).speculator.costs = Free()
        for _ in ("cold", "warm"):
            assert run(engine, chosen) == wanted
        stats = engine.stats()
        assert stats["draft_tokens"] > stats["draft_tokens_accepted"] > 25
        assert batch == 1 or budget > 176 or stats["retractions"] > 0


def test_an_answer_that_was_given_before_is_foretold_by_the_tree(folder: Path) -> None:
    requests = [
        (list(range(40 + index, 60)), SamplingParams(max_new_tokens=150, ignore_eos=True))
        for index in range(4)
    ]
    expected = alone(folder, requests, kv_token_budget=1024)
    engine = core(folder, speculation="prompt_lookup")
    for times in (1, 2):
        assert [run(engine, [request])[0] for request in requests] == expected
        assert engine.stats()["steps"] <= 600 + (times - 1) * 100


def test_a_text_that_repeats_itself_takes_fewer_steps(starter_gguf: Path) -> None:
    text = "The mill at Gifhorn was built in 1911 by Johann Brandt and washed away by the flood of 1926."
    prompt = [{"role": "user", "content": f"Repeat this text word by word: {text} {text}"}]
    with Engine(str(starter_gguf), kv_token_budget=2048, prefix_cache=False) as engine:
        engine._thread.core.speculator.costs = Steady()
        plain = engine.generate(prompt, SamplingParams(max_new_tokens=60))
        before = engine.stats()
        drafted = engine.generate(prompt, SamplingParams(max_new_tokens=60, speculative="prompt_lookup"))
        after = engine.stats()
    assert drafted == plain
    assert after["steps"] - before["steps"] < len(plain.token_ids) / 2
    assert after["draft_tokens_accepted"] > 0.5 * after["draft_tokens"]


@pytest.mark.parametrize("settings", [{"dtype": "fp32"}, *([{"dtype": "bf16"}, {"kv_dtype": "int8"}] * FAST)])
@pytest.mark.parametrize("window", [None, 600])
def test_a_row_of_drafts_is_a_decode_to_the_bit(
    tmp_path: Path, settings: dict[str, object], window: int | None
) -> None:
    """Tokens and logprobs of drafts, right and wrong, beside a decode, over several spans of positions."""
    path = tiny_folder(tmp_path, "mistral", max_position_embeddings=2048, sliding_window=window)
    resolved = Settings.resolve({"device": "cpu", "kv_token_budget": 4096, "num_threads": 2, **settings}, {})
    backend = load_backend(path, resolved)
    draw = random.Random(2)
    params = SamplingParams(logprobs=True, top_logprobs=5, temperature=0.7)
    pages, others = array("i", range(80)), array("i", range(80, 160))

    def samples(first: int, count: int) -> list[SampleSpec]:
        return [SampleSpec(params, 11, first + place) for place in range(count)]

    def told(result: SequenceResult) -> tuple[Any, Any]:
        return result.token_id, result.logprob

    for length in (30, 507, 1020):
        prompt = [draw.randrange(3, 250) for _ in range(length)]
        drafts = [draw.randrange(3, 250) for _ in range(15)]
        backend.run([SequenceStep(prompt, 0, pages), SequenceStep(prompt[:40], 0, others)])
        one_by_one = []
        for place, token in enumerate([5, *drafts]):
            step = SequenceStep([token], length + place, pages, samples(place, 1)[0])
            one_by_one.append(told(backend.run([step])[0]))
        for count in (1, 3, 15):
            first, *rest = samples(0, count + 1)
            step = SequenceStep([5, *drafts[:count]], length, pages, first, draft_samples=rest)
            beside = SequenceStep([7], min(40, length), others, samples(0, 1)[0])
            _, result = backend.run([beside, step])
            assert [told(result), *map(told, result.drafted)] == one_by_one[: count + 1]
    with pytest.raises(InvalidValueError, match="draft_samples"):
        backend.run([SequenceStep([5], 3, pages, samples(0, 1)[0], draft_samples=samples(1, 1))])


GRAMMARS: list[dict[str, object]] = [
    {"regex": r"(ab){1,30}c"},
    {"json_schema": {"type": "array", "items": {"enum": ["aa", "bb"]}, "minItems": 4, "maxItems": 9}},
    {"regex": r"[a-d]{40}", "temperature": 1.2},
    {"ebnf": 'start: ("ab" | "c"){1,25} "."', "repetition_penalty": 1.1},
]


def test_grammars_are_followed_with_drafts(tmp_path: Path) -> None:
    path = tiny_folder(tmp_path)
    with Engine(str(path), dtype="fp32") as engine:
        for index, form in enumerate(GRAMMARS):
            plain = SamplingParams(**{"max_new_tokens": 90, "seed": index, **form})  # type: ignore[arg-type]
            expected = engine.generate("abababab", plain)
            before = engine.stats()
            found = engine.generate("abababab", replace(plain, speculative="on"))
            after = engine.stats()
            assert replace(found, usage=expected.usage) == expected
            assert after["draft_tokens"] > before["draft_tokens"]
        assert engine.stats()["draft_tokens_accepted"] > 30


def test_stop_strings_and_streams_with_several_tokens_an_event(tmp_path: Path) -> None:
    path = tiny_folder(tmp_path)
    with Engine(str(path), dtype="fp32", speculation="prompt_lookup") as engine:
        plain = SamplingParams(max_new_tokens=120, ignore_eos=True, speculative="off", logprobs=True)
        whole = engine.generate("hello hello hello", plain)
        middle = whole.text[60:64]
        for params in (plain, replace(plain, stop=(middle,))):
            expected = engine.generate("hello hello hello", params)
            with engine.stream("hello hello hello", replace(params, speculative="on")) as stream:
                deltas = list(stream)
            assert "".join(delta.text for delta in deltas) == expected.text
            assert deltas[-1].finish_reason == expected.finish_reason
            ids = [token for delta in deltas for token in delta.token_ids]
            logprobs = [one for delta in deltas for one in delta.logprobs]
            assert ids[: len(expected.token_ids)] == list(expected.token_ids)
            assert logprobs[: len(expected.logprobs)] == list(expected.logprobs)
            assert len(ids) == len(logprobs)
        assert max(len(delta.token_ids) for delta in deltas) > 1


def test_a_draft_model_equal_to_the_large_one_saves_steps_and_another_is_switched_off(tmp_path: Path) -> None:
    large = tiny_folder(tmp_path / "large")
    other = tiny_folder(tmp_path / "other", seed=9)
    requests = [
        (
            [40 + index, 50, 60],
            SamplingParams(max_new_tokens=60, ignore_eos=True, temperature=index % 2, seed=3),
        )
        for index in range(4)
    ]
    expected = alone(large, requests)
    for small, good in ((large, True), (other, False)):
        with Engine(
            str(large), dtype="fp32", speculation="draft_model", draft_model_name=str(small)
        ) as engine:
            engine._thread.core.speculator.costs = Steady()
            before = engine.stats()
            for (prompt, params), ids in zip(requests, expected, strict=True):
                assert list(engine.generate(prompt, params).token_ids) == ids
            after = engine.stats()
        steps = after["steps"] - before["steps"]
        rate = after["draft_tokens_accepted"] / after["draft_tokens"]
        if good:
            assert rate > 0.9 and steps < 80
        else:
            assert rate < 0.5 and after["speculation_switched_off"] >= 1


def test_a_draft_model_that_cannot_be_used_is_refused(tmp_path: Path, starter_gguf: Path) -> None:
    large = tiny_folder(tmp_path / "large")
    with pytest.raises(InvalidValueError, match=r"DRAFT_MODEL_NAME.*vocabulary.*token"):
        Engine(str(large), draft_model_name=str(starter_gguf))
    with pytest.raises(InvalidValueError, match=r"DRAFT_MODEL_NAME.*SPECULATIVE"):
        Engine(str(large), speculation="draft_model")


@pytest.mark.parametrize("isolation", ["thread", "process"])
def test_a_server_takes_the_field_and_counts(tmp_path: Path, isolation: str) -> None:
    path = tiny_folder(tmp_path)
    with serving(path, engine_isolation=isolation, draft_model_name=str(path), dtype="fp32") as client:
        body = {"prompt": "hello hello", "max_new_tokens": 80, "ignore_eos": True, "return_token_ids": True}
        plain = client.ask(**body)
        drafted = 'mini_sglang_engine_draft_tokens_total{engine="0"}'

        def metrics() -> dict[str, float]:
            lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
            return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

        assert metrics()[drafted] == 0
        counts = [0.0]
        for asked in (True, "prompt_lookup", "draft_model"):
            assert client.ask(**body, speculative=asked)["token_ids"] == plain["token_ids"]
            client.ask(prompt="x", max_new_tokens=1)  # counters come a moment after an answer
            counts.append(metrics()[drafted])
        assert counts[-1] > 0 and counts == sorted(counts)
        rate = metrics()['mini_sglang_engine_draft_acceptance_rate{engine="0"}']
        found = client.get("/metrics", headers={"accept": "application/json"})
        assert 0 < rate <= 1 and found.status_code == 200
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 30, "temperature": 0}
        answers = [
            client.ask("/v1/chat/completions", **chat, **more)["choices"][0]["message"]
            for more in ({}, {"speculative": True}, {"speculative": "prompt_lookup"}, {"speculative": None})
        ]
        assert all(answer == answers[0] for answer in answers)
        for path_, wrong in (("/generate", body), ("/v1/chat/completions", chat)):
            response = client.post(path_, json={**wrong, "speculative": "perhaps"})
            assert response.status_code == 400 and "speculative" in response.text
