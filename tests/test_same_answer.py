"""Same answer under any load: what a request gets does not depend on who else is there."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mini_sglang.backend.model_backend import load_backend
from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from mini_sglang.types import FinishReason, SamplingParams
from tests.tiny_folders import tiny_folder

EOS = frozenset({2})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), "qwen3")


def core(folder: Path, **settings: object) -> EngineCore:
    resolved = Settings.resolve({"dtype": "fp32", "device": "cpu", **settings})
    return EngineCore(load_backend(folder, resolved), resolved, EOS)


def workload(seed: int) -> list[tuple[list[int], SamplingParams]]:
    """40 requests: a third share a long prefix, a third repeat an earlier prompt, all kinds of sampling."""
    draw = random.Random(seed)
    shared = [draw.randrange(3, 250) for _ in range(70)]
    requests: list[tuple[list[int], SamplingParams]] = []
    for index in range(40):
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
                ),
            )
        )
    return requests


def alone(folder: Path, requests: list[tuple[list[int], SamplingParams]]) -> list[list[int]]:
    engine = core(folder, prefix_cache=False, kv_token_budget=512)
    answers: list[list[int]] = []
    for index, (prompt, params) in enumerate(requests):
        engine.add(engine.make_request(str(index), prompt, params))
        ids: list[int] = []
        while engine.has_work:
            for event in engine.step():
                ids.extend(event.token_ids)
        answers.append(ids)
    return answers


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
def test_forty_requests_together_answer_as_alone(
    folder: Path, page_size: int, prefix_cache: bool, chunked: bool
) -> None:
    requests = workload(seed=page_size)
    expected = alone(folder, requests)
    draw = random.Random(7)
    engine = core(
        folder,
        page_size_tokens=page_size,
        prefix_cache=prefix_cache,
        chunked_prefill=chunked,
        prefill_chunk_size=24,
        kv_token_budget=224,  # the longest request takes 180
        max_batch_size=12,
    )
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
            answers[index].extend(event.token_ids)
            if event.finish is not None:
                ends[index] = event.finish
    assert set(ends) == set(range(40))
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
