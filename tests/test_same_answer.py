"""Same answer under any load: what a request gets does not depend on who else is there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest

from mini_sglang.backend.loader import load_backend
from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from mini_sglang.types import FinishReason, SamplingParams
from tests.backend.kernels.twins import VARIANTS
from tests.backend.loading.model_files import tiny_model, write_gguf
from tests.tiny_folders import tiny_folder

EOS = frozenset({2})
# Of 16 bits, and beyond one span of positions, only the compiled kernels promise it.
FAST = VARIANTS[-1] != "generic"
MODELS: dict[str, dict[str, object]] = {"float32": {}, "blocks": {"gguf_dequantize": 0}}
if FAST:
    MODELS["bfloat16"] = {"dtype": "bf16"}
    MODELS["blocks, KV in 8 bits"] = {"gguf_dequantize": 0, "kv_dtype": "int8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), "qwen3")


def core(folder: Path, **settings: object) -> EngineCore:
    resolved = Settings.resolve({"dtype": "fp32", "device": "cpu", **settings})
    return EngineCore(load_backend(folder, resolved), resolved, EOS)


def workload(seed: int, count: int = 40) -> list[tuple[list[int], SamplingParams]]:
    """Requests: a third share a long prefix, a third repeat an earlier prompt, all kinds of sampling."""
    draw = random.Random(seed)
    shared = [draw.randrange(3, 250) for _ in range(70)]
    requests: list[tuple[list[int], SamplingParams]] = []
    for index in range(count):
        tail = [draw.randrange(3, 250) for _ in range(draw.randrange(1, 60))]
        prompt = shared + tail if index % 3 == 0 else tail
        if requests and index % 3 == 1:
            prompt = draw.choice(requests)[0]
        requests.append(
            (
                prompt,
                SamplingParams(
                    max_new_tokens=draw.randrange(1, 50),
                    temperature=draw.choice([0.0, 0.7, 1.3]),
                    top_k=draw.choice([0, 20]),
                    top_p=draw.choice([1.0, 0.9]),
                    repetition_penalty=draw.choice([1.0, 1.2]),
                    presence_penalty=draw.choice([0.0, 0.5]),
                    seed=draw.randrange(1 << 40),
                    ignore_eos=draw.random() < 0.5,
                    priority=draw.choice([0, 0, -50, 50]),
                ),
            )
        )
    return requests


def alone(
    folder: Path, requests: list[tuple[list[int], SamplingParams]], **settings: object
) -> list[list[int]]:
    engine = core(folder, **{"prefix_cache": False, "kv_token_budget": 512, **settings})
    answers: list[list[int]] = []
    for index, (prompt, params) in enumerate(requests):
        engine.add(engine.make_request(str(index), prompt, params))
        ids: list[int] = []
        while engine.has_work:
            for event in engine.step():
                ids.extend(event.token_ids)
        answers.append(ids)
    return answers


def serve_forty(
    engine: EngineCore, requests: Sequence[tuple[list[int], SamplingParams]]
) -> tuple[dict[int, list[int]], dict[int, FinishReason]]:
    """Serve requests that arrive at random, of which some are aborted; gives ids and ends."""
    draw = random.Random(7)
    waiting = list(range(40))
    draw.shuffle(waiting)
    to_abort = set(draw.sample(range(40), 8))
    answers: dict[int, list[int]] = {index: [] for index in range(40)}
    ends: dict[int, FinishReason] = {}
    while waiting or engine.has_work:
        for _ in range(draw.choice([0, 0, 1, 4])):
            if waiting:
                index = waiting.pop()
                engine.add(engine.make_request(str(index), *requests[index]))
        events = engine.step()
        engine.check()
        for index in to_abort - set(ends):
            if draw.random() < 0.05:
                aborted = engine.abort(str(index))
                events += [] if aborted is None else [aborted]
        for event in events:
            index = int(event.request_id)
            assert index not in ends, "an event after the last one"
            assert event.error is None, event.error
            answers[index].extend(event.token_ids)
            if event.finish is not None:
                ends[index] = event.finish
    assert set(ends) == set(range(40))
    return answers, ends


Forty = tuple[int, list[tuple[list[int], SamplingParams]], list[list[int]]]


@pytest.fixture(scope="module", params=[1, 16])
def forty(request: pytest.FixtureRequest, folder: Path) -> Forty:
    """A size of pages, forty requests, and what each of them gets alone."""
    requests = workload(seed=request.param)
    return request.param, requests, alone(folder, requests)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
def test_forty_requests_together_answer_as_alone(
    folder: Path, forty: Forty, prefix_cache: bool, chunked: bool
) -> None:
    page_size, requests, expected = forty
    engine = core(
        folder,
        page_size_tokens=page_size,
        prefix_cache=prefix_cache,
        chunked_prefill=chunked,
        prefill_chunk_size=24,
        kv_token_budget=224,  # the longest request takes 180
        max_batch_size=12,
    )
    answers, ends = serve_forty(engine, requests)
    assert engine.scheduler.num_retractions > 0, "the pool was meant to run out"
    if prefix_cache:
        assert engine.counters.prefix_hit_tokens > 0
    finished = [index for index in ends if ends[index] is not FinishReason.ABORT]
    assert len(finished) >= 32
    for index in range(40):
        ids = answers[index]
        assert ids == expected[index][: len(ids)]
        assert index not in finished or ids == expected[index]
    assert engine.cache.num_private == 0


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blocks") / "tiny.gguf"
    return write_gguf(path, tiny_model("llama-tied"), "llama", gguf.GGMLQuantizationType.Q4_1)


def cached(engine: EngineCore) -> int:
    """Prompt tokens that any cache has given so far."""
    return engine.counters.prefix_hit_tokens + engine.counters.prefill_cache_hit_tokens


Case = tuple[Path, dict[str, object], list[Any], list[list[int]]]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, folder: Path, blocks: Path) -> Case:
    """A model, its settings, 64 requests, and what each of them gets alone."""
    path = blocks if "blocks" in request.param else folder
    settings = MODELS[request.param]
    requests = [
        ([id % 90 + 3 for id in prompt], replace(params, max_new_tokens=min(params.max_new_tokens, 20)))
        for prompt, params in workload(3, 64)
    ]
    return path, settings, requests, alone(path, requests, **settings)


@pytest.mark.parametrize(("page_size", "chunked"), [(1, True), (16, False), (16, True)])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_cold_warm_and_retracted_in_batches_of_every_size(
    model: Case, batch: int, page_size: int, chunked: bool
) -> None:
    path, settings, requests, expected = model
    few = batch == 1
    chosen = list({1: range(0, 64, 8), 8: range(32), 64: range(64)}[batch])
    for budget in (8192, 176):
        engine = core(
            path,
            page_size_tokens=page_size,
            chunked_prefill=chunked,
            prefill_chunk_size=32,
            kv_token_budget=budget,
            max_batch_size=batch,
            prefill_cache_size=0 if chunked and page_size > 1 else 8,
            **settings,
        )
        for warm in (False, True):
            hits = cached(engine)
            answers: dict[str, list[int]] = {str(index): [] for index in chosen}
            for index in chosen:
                engine.add(engine.make_request(str(index), *requests[index]))
            while engine.has_work:
                for event in engine.step():
                    answers[event.request_id].extend(event.token_ids)
            assert [answers[str(index)] for index in chosen] == [expected[index] for index in chosen]
            assert not warm or cached(engine) > hits
        engine.check()
        assert few or budget > 176 or engine.scheduler.num_retractions > 0


@pytest.mark.parametrize("settings", [{"dtype": "fp32"}, *([{"dtype": "bf16"}, {"kv_dtype": "int8"}] * FAST)])
@pytest.mark.parametrize("window", [None, 600])
def test_contexts_of_several_spans_answer_as_alone(
    tmp_path: Path, settings: dict[str, object], window: int | None
) -> None:
    """Decodes whose spans are shared out over threads, chunks that cross a span, a cached prefix of more."""
    folder = tiny_folder(tmp_path, "mistral", max_position_embeddings=2048, sliding_window=window)
    settings = {"kv_token_budget": 8192, "num_threads": 2, **settings}
    draw = random.Random(5)
    shared = [draw.randrange(3, 250) for _ in range(1020)]
    requests = [
        (
            (shared if index % 2 else []) + [draw.randrange(3, 250) for _ in range(length)],
            SamplingParams(max_new_tokens=12, temperature=0.8, seed=index, ignore_eos=True),
        )
        for index, length in enumerate((505, 30, 1015, 1, 20, 200))
    ]
    expected = alone(folder, requests, **settings)
    for chunk in (48, 700):
        engine = core(folder, chunked_prefill=True, prefill_chunk_size=chunk, **settings)
        for _ in ("cold", "warm"):
            answers: dict[str, list[int]] = {str(index): [] for index in range(len(requests))}
            for index, request in enumerate(requests):
                engine.add(engine.make_request(str(index), *request))
            while engine.has_work:
                for event in engine.step():
                    answers[event.request_id].extend(event.token_ids)
            assert [*answers.values()] == expected
        assert engine.counters.prefix_hit_tokens > 1000
