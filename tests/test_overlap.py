"""OVERLAP_SCHEDULE on real, tiny models: the answers are those without it, and the lever does something."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mini_sglang import Engine, SamplingParams
from mini_sglang.backend.device_sampling import DeviceSampler
from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.overlap import DeviceSubmitter
from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from mini_sglang.errors import InvalidValueError
from mini_sglang.types import FinishReason
from tests.api.serving import Server, settle
from tests.test_same_answer import EOS, Forty, serve_forty
from tests.test_same_answer import forty as forty
from tests.tiny_folders import tiny_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), "qwen3")


def in_a_thread(folder: Path, **settings: object) -> EngineCore:
    resolved = Settings.resolve({"dtype": "fp32", "device": "cpu", "overlap_schedule": "1", **settings})
    return EngineCore(load_backend(folder, resolved), resolved, EOS)


def as_on_a_device(folder: Path, **settings: object) -> EngineCore:
    """The way of CUDA, on a CPU: ids stay where they are, and are read when they are wanted."""
    resolved = Settings.resolve({"dtype": "fp32", "device": "cpu", **settings})
    backend = load_backend(folder, resolved)
    assert isinstance(backend, ModelBackend)
    backend.sampler = DeviceSampler(backend.vocab_size)
    backend.submitter = DeviceSubmitter(backend)
    return EngineCore(backend, resolved, EOS)


@pytest.mark.parametrize("make", [in_a_thread, as_on_a_device])
@pytest.mark.parametrize(
    ("forty", "prefix_cache", "chunked"),
    [(1, True, True), (16, True, False), (16, False, True)],
    indirect=["forty"],
)
def test_forty_requests_together_answer_as_alone_without_it(
    folder: Path, make: Callable[..., EngineCore], forty: Forty, prefix_cache: bool, chunked: bool
) -> None:
    page_size, requests, expected = forty
    engine = make(
        folder,
        page_size_tokens=page_size,
        prefix_cache=prefix_cache,
        chunked_prefill=chunked,
        prefill_chunk_size=24,
        kv_token_budget=224,  # the longest request takes 180
        max_batch_size=12,
        page_token_budget=512 if prefix_cache else 0,
    )
    answers, ends = serve_forty(engine, requests)
    assert engine.scheduler.num_retractions > 0, "the pool was meant to run out"
    assert engine.counters.overlapped_steps > 0
    for index in range(40):
        ids = answers[index]
        assert ids == expected[index][: len(ids)]
        assert ends[index] is FinishReason.ABORT or ids == expected[index]
    assert engine.cache.num_private == 0
    engine.close()


ASKED = [
    SamplingParams(max_new_tokens=30, ignore_eos=True),
    SamplingParams(max_new_tokens=30, temperature=0.8, top_p=0.9, seed=3, logprobs=True, top_logprobs=2),
    SamplingParams(max_new_tokens=30, temperature=1.0, seed=1, stop=("e",)),
    SamplingParams(max_new_tokens=12, regex="[a-f]{4,20}"),
    SamplingParams(max_new_tokens=20, repetition_penalty=1.3, ignore_eos=True),
    SamplingParams(max_new_tokens=20, prompt_logprobs=True, ignore_eos=True),
    SamplingParams(max_new_tokens=40, speculative="prompt_lookup", ignore_eos=True),
]


def outputs(folder: Path, setting: str) -> tuple[list[Any], dict[str, Any]]:
    with Engine(str(folder), dtype="fp32", kv_token_budget=4096, overlap_schedule=setting) as engine:
        texts = [f"Prompt number {index}, and so on" for index in range(len(ASKED))]
        found = [engine.generate(texts, ASKED)] + [
            [engine.generate(text, params)] for text, params in zip(texts, ASKED, strict=True)
        ]
        return [
            (o.text, o.token_ids, o.finish_reason, o.logprobs, o.prompt_logprobs)
            for many in found
            for o in many
        ], engine.stats()


def test_an_engine_answers_the_same_with_it(folder: Path) -> None:
    off, without = outputs(folder, "0")
    on, stats = outputs(folder, "1")
    assert on == off
    assert without["overlapped_steps"] == 0 and stats["overlapped_steps"] > 20


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_a_server_answers_the_same_with_it_and_says_so(folder: Path, tmp_path: Path, isolation: str) -> None:
    told: list[list[int]] = []
    for setting in ("0", "1"):
        server = Server(folder, tmp_path / setting, ENGINE_ISOLATION=isolation, OVERLAP_SCHEDULE=setting)
        try:
            server.wait_ready()
            for temperature in (0.0, 0.9):
                asked = {
                    "prompt": "Hello there",
                    "max_new_tokens": 24,
                    "ignore_eos": True,
                    "temperature": temperature,
                    "seed": 11,
                    "return_token_ids": True,
                }
                status, _, body = server.request("POST", "/generate", asked)
                assert status == 200, body
                told.append(json.loads(body)["token_ids"])
            settle(lambda server=server: server.metrics()["engines"][0]["running"] == 0, "the counters")
            assert (server.metrics()["engines"][0]["overlapped_steps"] > 20) is (setting == "1")
            status, _, body = server.request("GET", "/metrics")
            assert b"mini_sglang_engine_overlapped_steps_total" in body
            assert server.end() == 0
        finally:
            server.close()
        assert "Traceback" not in server.said
    assert told[:2] == told[2:]


def test_several_ranks_are_told_one_step_at_a_time(folder: Path) -> None:
    settings = {"dtype": "fp32", "device": "cpu", "num_threads": 1, "tensor_parallel_size": 2}
    with pytest.raises(InvalidValueError, match="OVERLAP_SCHEDULE is '1'"):
        load_backend(folder, Settings.resolve({**settings, "overlap_schedule": "1"}, {}))
