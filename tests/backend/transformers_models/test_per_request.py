"""Models with one cache per request: the ids are those of transformers' ``generate``, whoever else runs."""

from __future__ import annotations

import random
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.step import SampleSpec, SequenceStep
from mini_sglang.backend.transformers_models.per_request import RequestBackend
from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from mini_sglang.errors import InvalidValueError
from mini_sglang.types import FinishReason, SamplingParams
from tests.backend.transformers_models.families import VOCAB_SIZE, save, tiny_model
from tests.backend.transformers_models.request_families import CASES, Case

NEW_TOKENS = 14
BY_TYPE = {case.family.model_type: case for case in CASES}


def prompts() -> list[list[int]]:
    draw = random.Random(3)
    made = [[draw.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (1, 8, 21, 33, 5)]
    return [*made, [*made[3][:26], 7, 9]]


@torch.inference_mode()
def generated(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    model.generation_config.forced_eos_token_id = None
    ids = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return ids[0, len(prompt) :].tolist()


def settings_of(**given: object) -> Settings:
    values = {"dtype": "fp32", "device": "cpu", "context_length": 128, "max_batch_size": 8, **given}
    return Settings.resolve(values, env={})


def make_engine(folder: Path, **given: object) -> tuple[EngineCore, Any]:
    settings = settings_of(**given)
    backend = load_backend(folder, settings)
    return EngineCore(backend, settings, frozenset({2}), backend.describe()), backend


def run(
    engine: EngineCore, wanted: list[tuple[list[int], SamplingParams]], abort: dict[str, int] | None = None
) -> list[list[int]]:
    """Answers to requests that run together; ``abort`` ends some after so many tokens."""
    for index, (prompt, params) in enumerate(wanted):
        engine.add(engine.make_request(str(index), prompt, params))
    ids: dict[str, list[int]] = {str(index): [] for index in range(len(wanted))}
    ends: dict[str, FinishReason] = {}
    while engine.has_work:
        events = engine.step()
        engine.check()
        for name, count in (abort or {}).items():
            if name not in ends and len(ids[name]) >= count and (event := engine.abort(name)) is not None:
                events.append(event)
        for event in events:
            assert event.error is None and event.request_id not in ends
            ids[event.request_id].extend(event.token_ids)
            if event.finish is not None:
                ends[event.request_id] = event.finish
    assert len(ends) == len(wanted)
    assert all(ends[name] is FinishReason.ABORT for name in abort or {})
    return list(ids.values())


def greedy(wanted: list[list[int]]) -> list[tuple[list[int], SamplingParams]]:
    return [(prompt, SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)) for prompt in wanted]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.family.model_type)
def test_together_aborted_chunked_and_retracted_as_transformers_generates(case: Case, tmp_path: Path) -> None:
    model = tiny_model(case.family)
    wanted = prompts()
    expected = [generated(model, prompt) for prompt in wanted]
    retracts = case.grows and case.replays
    # Portions that all the sequences together need more of than there are.
    budget = {"kv_token_budget": 64, "page_size_tokens": 4} if retracts else {"kv_token_budget": 128 * 3}
    engine, backend = make_engine(save(model, tmp_path), chunked_prefill=True, prefill_chunk_size=7, **budget)
    assert isinstance(backend, RequestBackend)
    about = backend.describe()
    assert about["implementation"] == "transformers per request"
    assert about["chunked_prefill"] == "on" or not case.chunks
    assert (about["batched_decode"] == "on") is case.together
    assert (about["kv_bytes_per_token"] != 0) is case.grows
    forwards = spy(backend)
    assert run(engine, greedy(wanted)) == expected
    assert (engine.scheduler.num_retractions > 0) is retracts
    assert any(len(starts) > 1 for starts, _ in forwards) is case.together
    assert any(starts[0] and count > 1 for starts, count in forwards) is case.chunks
    # Again, in another order and with two that leave in the middle.
    got = run(engine, greedy(wanted[::-1]), abort={"1": 3, "2": 1})[::-1]
    assert [ids == end for ids, end in zip(got, expected, strict=True)] == [
        True,
        True,
        True,
        False,
        False,
        True,
    ]
    assert all(ids == end[: len(ids)] for ids, end in zip(got, expected, strict=True))
    assert engine.stats()["prefix_reuse"] == 0 and engine.cache.num_private == 0


def spy(backend: RequestBackend) -> list[tuple[list[int], int]]:
    """(starts, tokens each) of the forwards from now on."""
    seen: list[tuple[list[int], int]] = []
    forward = backend._runner.forward

    def noted(ids: Any, starts: Any, *rest: Any) -> Any:
        seen.append((list(starts), len(ids[0])))
        return forward(ids, starts, *rest)

    backend._runner.forward = noted  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("model_type", ["mamba2", "qwen3_next", "bart"])
def test_sampled_answers_do_not_depend_on_who_else_is_there(model_type: str, tmp_path: Path) -> None:
    folder = save(tiny_model(BY_TYPE[model_type].family), tmp_path)
    draw = random.Random(1)
    wanted = [
        (
            prompt,
            SamplingParams(
                max_new_tokens=draw.randrange(4, 20),
                temperature=draw.choice([0.7, 1.2]),
                top_p=draw.choice([1.0, 0.9]),
                repetition_penalty=draw.choice([1.0, 1.2]),
                logprobs=True,
                prompt_logprobs=index == 2,
                seed=index,
            ),
        )
        for index, prompt in enumerate(prompts() * 2)
    ]
    engine, _ = make_engine(folder)
    alone = [run(engine, [request])[0] for request in wanted]
    assert run(engine, wanted) == alone
    assert any(alone[index] != alone[index + 6] for index in range(6)), "the seeds were meant to matter"


def test_prompt_logprobs_are_those_of_a_whole_forward(tmp_path: Path) -> None:
    model = tiny_model(BY_TYPE["qwen3_next"].family)
    engine, _ = make_engine(save(model, tmp_path), chunked_prefill=True, prefill_chunk_size=7)
    prompt = prompts()[2]
    params = SamplingParams(max_new_tokens=2, prompt_logprobs=True, top_logprobs=3)
    engine.add(engine.make_request("a", prompt, params))
    events = []
    while engine.has_work:
        events += engine.step()
    with torch.inference_mode():
        logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    got = events[0].prompt_logprobs
    assert [entry.token_id for entry in got] == prompt[1:]
    for row, entry in enumerate(got):
        assert entry.logprob == pytest.approx(logprobs[row, prompt[row + 1]].item(), abs=1e-4)
        assert [token for token, _ in entry.top] == logprobs[row].topk(3).indices.tolist()


def test_prefixes_are_refused_and_reuse_is_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, backend = make_engine(save(tiny_model(BY_TYPE["mamba2"].family), tmp_path), prefix_cache=True)
    assert "one cache per request and no reuse of prefixes: it has layers of the kind linear" in caplog.text
    assert str(backend.describe()["prefix_reuse"]).startswith("off")
    with pytest.raises(InvalidValueError, match="one cache per request, which shares no prefix"):
        engine.make_prefix_request("p", [3, 4, 5])
    for _ in range(2):
        run(engine, greedy([prompts()[3]]))
    assert engine.counters.prefix_hit_tokens == 0 and engine.cache.num_cached == 0


@pytest.mark.parametrize("model_type", ["mamba2", "bloom"])
def test_a_step_that_no_sequence_can_have_is_refused(model_type: str, tmp_path: Path) -> None:
    folder = save(tiny_model(BY_TYPE[model_type].family), tmp_path)
    _, backend = make_engine(folder, kv_token_budget=256)

    def step(tokens: list[int], start: int, page: int) -> SequenceStep:
        return SequenceStep(tokens, start, array("i", [page]), SampleSpec(SamplingParams(), 0, 0))

    backend.run([step([3, 4, 5], 0, 1)])
    for bad, field in (
        ([step([3], 2, 1)], "start"),
        ([step([3], 1, 0)], "start"),
        ([step([3], 0, 9)], "page"),
        ([step([VOCAB_SIZE], 0, 0)], "token id"),
        ([step([], 0, 0)], "token_ids"),
        ([step([3] * 129, 0, 0)], "positions"),
        ([step([3], 3, 1), step([3], 0, 1)], "pages"),
    ):
        with pytest.raises(InvalidValueError) as caught:
            backend.run(bad)
        assert caught.value.field == field
    # Nothing has run: the sequence goes on from where it was.
    assert backend.run([step([6], 3, 1)])[0].error is None


def test_a_forward_that_fails_ends_its_requests_and_no_others(tmp_path: Path) -> None:
    model = tiny_model(BY_TYPE["qwen3_next"].family)
    engine, backend = make_engine(save(model, tmp_path))
    wanted = prompts()
    engine.add(engine.make_request("a", wanted[2], SamplingParams(max_new_tokens=5)))
    engine.step()
    forward = backend._runner.forward

    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    backend._runner.forward = broken
    (event,) = engine.step()
    assert event.finish is FinishReason.ERROR and "out of memory" in str(event.error)
    backend._runner.forward = forward
    assert run(engine, greedy([wanted[3]])) == [generated(model, wanted[3])]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"kv_token_budget": 100}, "KV_TOKEN_BUDGET"),
        ({"kv_token_budget": (1 << 31) - 1}, "KV_TOKEN_BUDGET"),
        ({"attn_impl": "paged"}, "ATTN_IMPL"),
        ({"attn_impl": "triton"}, "ATTN_IMPL"),
        ({"attn_impl": "flashinfer"}, "ATTN_IMPL"),
        ({"attn_impl": "flash_attention_2"}, "ATTN_IMPL"),
        ({"quantization": "int8"}, "QUANTIZATION"),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_refused(
    settings: dict[str, object], field: str, tmp_path: Path
) -> None:
    folder = save(tiny_model(BY_TYPE["bloom"].family), tmp_path)
    with pytest.raises(InvalidValueError) as caught:
        load_backend(folder, settings_of(**settings))
    assert caught.value.field == field


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("model_type", ["mamba", "qwen3_next"])
def test_half_precision_runs_on_a_cpu(model_type: str, dtype: str, tmp_path: Path) -> None:
    folder = save(tiny_model(BY_TYPE[model_type].family), tmp_path)
    engine, backend = make_engine(folder, dtype=dtype)
    assert backend.describe()["dtype"] == {"bf16": "bfloat16", "fp16": "float16"}[dtype]
    assert [len(ids) for ids in run(engine, greedy(prompts()))] == [NEW_TOKENS] * 6
