"""``ENGINE_FAST_DECODE``: transformers' ``generate`` answers within the engine, as our own loop does."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from mini_sglang import Engine
from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.transformers_models.generate import GenerateBackend
from mini_sglang.errors import InvalidValueError
from mini_sglang.types import FinishReason, SamplingParams
from tests.backend.loading.model_files import tiny_model as gguf_model
from tests.backend.loading.model_files import write_gguf
from tests.backend.transformers_models.families import PAGED, save, tiny_model
from tests.backend.transformers_models.request_families import CASES
from tests.backend.transformers_models.test_per_request import (
    generated,
    greedy,
    make_engine,
    prompts,
    run,
    settings_of,
)
from tests.tiny_folders import tiny_folder

FAMILIES = {family.model_type: family for family in PAGED}
FAMILIES |= {case.family.model_type: case.family for case in CASES}
ALL_KINDS = SamplingParams(
    max_new_tokens=12,
    min_new_tokens=3,
    temperature=0.9,
    top_k=40,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.1,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias={7: 2.0},
    logprobs=True,
    top_logprobs=2,
    prompt_logprobs=True,
    seed=5,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The arguments of every call of transformers' ``generate``."""
    from transformers import GenerationMixin

    seen: list[Any] = []
    own = GenerationMixin.generate

    def noted(self: Any, *args: Any, **given: Any) -> Any:
        seen.append(given)
        return own(self, *args, **given)

    monkeypatch.setattr(GenerationMixin, "generate", noted)
    return seen


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "qwen3_next", "mamba", "bloom", "bart", "rwkv"])
def test_answers_together_and_aborted_are_those_of_generate(
    model_type: str, tmp_path: Path, calls: list[Any]
) -> None:
    model = tiny_model(FAMILIES[model_type])
    wanted = prompts()
    expected = [generated(model, prompt) for prompt in wanted]
    calls.clear()
    engine, backend = make_engine(save(model, tmp_path), engine_fast_decode=1)
    assert backend.describe()["implementation"] == "transformers generate"
    assert run(engine, greedy(wanted)) == expected
    assert len(calls) == len(wanted)
    got = run(engine, greedy(wanted), abort={"1": 3, "3": 1})
    assert [ids == end for ids, end in zip(got, expected, strict=True)] == [
        True,
        False,
        True,
        False,
        True,
        True,
    ]
    assert all(ids == end[: len(ids)] for ids, end in zip(got, expected, strict=True))


def test_off_it_is_not_called(tmp_path: Path, calls: list[Any]) -> None:
    engine, _ = make_engine(tiny_folder(tmp_path), engine_fast_decode=0)
    run(engine, greedy(prompts()))
    assert calls == []


def test_every_parameter_means_what_it_means_in_our_own_loop(tmp_path: Path) -> None:
    """A native model: our kernels against generate, and events that agree in all that they carry."""
    folder = tiny_folder(tmp_path, "qwen3")
    events = []
    for fast in (0, 1):
        engine, backend = make_engine(folder, engine_fast_decode=fast)
        assert isinstance(backend, GenerateBackend) is bool(fast)
        seen = []
        for name, prompt in zip("ab", prompts()[2:4], strict=True):
            engine.add(engine.make_request(name, prompt, ALL_KINDS))
        while engine.has_work:
            seen += engine.step()
        events.append(seen)
    assert [(e.request_id, e.token_ids, e.finish, e.prompt_tokens) for e in events[0]] == [
        (e.request_id, e.token_ids, e.finish, e.prompt_tokens) for e in events[1]
    ]
    for own, theirs in zip(*events, strict=True):
        for kind in ("logprobs", "prompt_logprobs"):
            for ours, its in zip(getattr(own, kind), getattr(theirs, kind), strict=True):
                assert ours.token_id == its.token_id
                assert ours.logprob == pytest.approx(its.logprob, abs=1e-3)
                assert [token for token, _ in ours.top] == [token for token, _ in its.top]
    assert len(events[0][0].prompt_logprobs) == len(prompts()[2]) - 1


def test_text_usage_stops_and_grammar_through_the_public_engine(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    kinds = [
        SamplingParams(max_new_tokens=12, ignore_eos=True),
        SamplingParams(max_new_tokens=12, temperature=1.0, seed=2),
        SamplingParams(max_new_tokens=30, regex="[a-c]{4}"),
    ]
    outputs = []
    for fast in (0, 1):
        with Engine(folder, dtype="fp32", device="cpu", engine_fast_decode=fast) as engine:
            outputs.append([engine.generate("Hello there", params) for params in kinds])
            text = outputs[-1][0].text
            stop = next(text[at : at + 2] for at in range(1, len(text)) if text[at : at + 2].strip())
            stopped = SamplingParams(max_new_tokens=12, ignore_eos=True, stop=(stop,))
            outputs[-1].append(engine.generate("Hello there", stopped))
            assert "".join(delta.text for delta in engine.stream("Hello there", kinds[0])) == text
    for own, theirs in zip(*outputs, strict=True):
        assert (own.text, own.finish_reason) == (theirs.text, theirs.finish_reason)
        assert own.usage.prompt_tokens == theirs.usage.prompt_tokens
        assert own.usage.completion_tokens == theirs.usage.completion_tokens
    assert outputs[1][3].finish_reason is FinishReason.STOP


def test_what_the_generation_config_says_does_not_touch_the_answer(tmp_path: Path) -> None:
    model = tiny_model(FAMILIES["gpt2"])
    expected = [generated(model, prompt) for prompt in prompts()]
    model.generation_config.update(
        do_sample=True, temperature=2.0, repetition_penalty=3.0, max_new_tokens=2, eos_token_id=expected[2][1]
    )
    engine, _ = make_engine(save(model, tmp_path), engine_fast_decode=1)
    assert run(engine, greedy(prompts())) == expected


def test_a_generate_that_fails_ends_its_request_and_no_other(tmp_path: Path) -> None:
    engine, backend = make_engine(tiny_folder(tmp_path), engine_fast_decode=1)
    expected = run(engine, greedy(prompts()))
    for index, (prompt, params) in enumerate(greedy(prompts())[:2]):
        engine.add(engine.make_request(str(index), prompt, params))
    engine.step()
    choose = backend._sampler.sample
    backend._sampler.sample = lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))
    events = engine.step()
    assert [event.finish for event in events] == [FinishReason.ERROR] * 2
    assert all("out of memory" in str(event.error) for event in events)
    backend._sampler.sample = choose
    assert run(engine, greedy(prompts())) == expected


def test_no_thread_outlives_the_backend(tmp_path: Path) -> None:
    def waiting() -> int:
        return sum(thread.name == "mini-sglang-generate" for thread in threading.enumerate())

    engine, backend = make_engine(tiny_folder(tmp_path), engine_fast_decode=1)
    before = waiting()
    engine.add(engine.make_request("a", [3, 4, 5], SamplingParams(max_new_tokens=50, ignore_eos=True)))
    engine.step()
    engine.abort("a")
    assert waiting() == before + 1
    del engine, backend
    gc.collect()
    deadline = time.monotonic() + 20
    while waiting() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert waiting() <= before


def test_a_cache_of_fixed_shape_is_made_by_generate(tmp_path: Path, calls: list[Any]) -> None:
    folder = tiny_folder(tmp_path)
    expected = run(make_engine(folder)[0], greedy(prompts()))
    engine, backend = make_engine(folder, engine_fast_decode=1, force_legacy_cache=1)
    assert backend._model.generation_config.cache_implementation == "static"
    assert run(engine, greedy(prompts())) == expected


def test_a_gguf_file_is_refused(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf", gguf_model("llama-tied"), "llama", gguf.GGMLQuantizationType.F32
    )
    with pytest.raises(InvalidValueError, match="GGUF") as caught:
        load_backend(path, settings_of(engine_fast_decode=1))
    assert caught.value.field == "ENGINE_FAST_DECODE"


def test_a_state_in_the_modules_is_refused(tmp_path: Path) -> None:
    folder = save(tiny_model(FAMILIES["recurrent_gemma"]), tmp_path)
    with pytest.raises(InvalidValueError, match="keeps a sequence's state in its modules"):
        load_backend(folder, settings_of(engine_fast_decode=1))


def test_compiled_decodes_answer_alike(tmp_path: Path) -> None:
    model = tiny_model(FAMILIES["phi3"], num_hidden_layers=1)
    wanted = prompts()[1:3]
    expected = [generated(model, prompt) for prompt in wanted]
    engine, backend = make_engine(
        save(model, tmp_path), engine_fast_decode=1, force_legacy_cache=1, compile_model=1
    )
    before = int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert backend.describe()["compile"] == "default"
    assert run(engine, greedy(wanted)) == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
