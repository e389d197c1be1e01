"""One model over several processes, which meet over Gloo: the ids of one, and the end of any of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gguf
import psutil
import pytest
import torch

from mini_sglang import Engine, SamplingParams
from mini_sglang.api.starting import Model
from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.parallel.backend import LeadingBackend
from mini_sglang.backend.parallel.leader import Leader
from mini_sglang.backend.parallel.wire import Spill
from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from mini_sglang.engine.handle import ENGINE_DIED
from mini_sglang.engine.limits import make_work
from mini_sglang.engine.pool import EnginePool
from mini_sglang.engine.worker import EngineThread
from mini_sglang.errors import BackendLostError, ModelLoadError
from tests.backend.harness import greedy, load
from tests.backend.loading import model_files
from tests.engine.test_worker import Receiver
from tests.test_same_answer import EOS, alone, workload
from tests.tiny_folders import tiny_folder

WAIT = 60.0
TINY: dict[str, Any] = {"num_hidden_layers": 2, "intermediate_size": 96, "tie_word_embeddings": True}
SETTINGS: dict[str, object] = {"dtype": "fp32", "device": "cpu", "num_threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases of q, k and v, tied embeddings, a vocabulary of 259."""
    return tiny_folder(tmp_path_factory.mktemp("model"), "qwen2", **TINY)


def settings_for(size: int, **more: object) -> Settings:
    return Settings.resolve({**SETTINGS, "tensor_parallel_size": size, **more}, {})


@contextmanager
def ranks(path: Path, size: int, **more: object) -> Iterator[LeadingBackend]:
    backend = load_backend(path, settings_for(size, **more))
    assert isinstance(backend, LeadingBackend)
    try:
        yield backend
    finally:
        backend.close()
        assert all(gone(pid) for pid in backend.follower_pids)


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[LeadingBackend]:
    with ranks(folder, 2, kv_token_budget=176) as backend:
        yield backend


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, f"waited for {what}"
        time.sleep(0.02)


def answers(engine: EngineCore, requests: list[Any]) -> list[list[int]]:
    ids: dict[str, list[int]] = {str(index): [] for index in range(len(requests))}
    for index, request in enumerate(requests):
        engine.add(engine.make_request(str(index), *request))
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            ids[event.request_id].extend(event.token_ids)
    engine.check()
    return list(ids.values())


def test_batches_prefix_hits_chunks_and_retractions_answer_as_one_process(
    folder: Path, two: LeadingBackend
) -> None:
    requests = workload(4, 24)
    settings = settings_for(2, chunked_prefill=True, prefill_chunk_size=24, max_batch_size=8)
    engine = EngineCore(two, settings, EOS)
    expected = alone(folder, requests, **SETTINGS)
    for _ in ("cold", "warm"):
        assert answers(engine, requests) == expected
    counters = engine.counters
    assert counters.prefix_hit_tokens > 0 and counters.prefill_cache_hit_tokens > 0
    assert engine.scheduler.num_retractions > 0


def test_prompt_logprobs_and_guessed_tokens_too(folder: Path, two: LeadingBackend) -> None:
    """Several products with the head in one step, and rows after guesses."""
    prompt = [7, 8, 9, 10] * 10
    params = SamplingParams(max_new_tokens=24, ignore_eos=True, logprobs=True, prompt_logprobs=True)
    looping = SamplingParams(max_new_tokens=100, ignore_eos=True)
    one = load(folder, **SETTINGS, kv_token_budget=176)
    found: list[list[Any]] = []
    for backend in (one, two):
        engine = EngineCore(backend, settings_for(1, speculation="prompt_lookup"), EOS)
        for index, given in enumerate((params, looping)):
            engine.add(engine.make_request(str(index), prompt, given))
        events = []
        while engine.has_work:
            events += engine.step()
        found.append(events)
        assert engine.stats()["draft_tokens"] > 0
    ids = [[id for event in events for id in event.token_ids] for events in found]
    assert ids[0] == ids[1]
    theirs, ours = ([e.prompt_logprobs for e in events if e.prompt_logprobs] for events in found)
    assert len(ours) == len(theirs) == 1
    for one_token, two_token in zip(theirs[0], ours[0], strict=True):
        assert one_token.token_id == two_token.token_id
        assert one_token.logprob == pytest.approx(two_token.logprob, abs=1e-4)


def test_each_process_holds_a_part_of_the_weights_and_of_the_kv(folder: Path, two: LeadingBackend) -> None:
    one = load(folder, **SETTINGS, kv_token_budget=176)
    about, whole = two.describe(), one.describe()
    assert about["tensor_parallel_size"] == 2
    assert about["weight_bytes"] == pytest.approx(whole["weight_bytes"] / 2, rel=0.06)
    assert about["kv_bytes_per_token"] * 2 == whole["kv_bytes_per_token"]
    assert about["kv_tokens"] == whole["kv_tokens"] and about["vocab_size"] == whole["vocab_size"]


def test_four_ranks_of_a_gguf_with_two_kv_heads(tmp_path: Path) -> None:
    model = model_files.tiny_model("llama-tied")
    config = model.config
    config.intermediate_size, config.hidden_size, config.head_dim = 128, 128, 32
    model = type(model)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path = model_files.write_gguf(tmp_path / "m.gguf", model, "llama", gguf.GGMLQuantizationType.Q8_0)
    prompts = [[5, 6, 7], [8] * 20]
    blocks = {**SETTINGS, "gguf_dequantize": "0", "kv_token_budget": 1024}
    with ranks(path, 4, **blocks) as backend:
        assert greedy(backend, prompts, 10) == greedy(load(path, **blocks), prompts, 10)


def test_the_engine_with_every_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host tier's pages and the exact prompts' last ones are those of all ranks."""
    texts = [f"{letter * 100} and so on" for letter in "abcd"]
    params = SamplingParams(max_new_tokens=8, ignore_eos=True)
    caches = {"kv_token_budget": 256, "page_token_budget": 4096, "prefill_cache_size": 1}
    with Engine(str(folder), **SETTINGS, tensor_parallel_size=1) as engine:
        expected = [engine.generate(text, params).token_ids for text in texts]
    before = set(psutil.Process().children())
    with Engine(str(folder), **SETTINGS, **caches, tensor_parallel_size=2) as engine:
        (follower,) = set(psutil.Process().children()) - before
        for _ in ("cold", "from the host's memory"):
            assert [engine.generate(text, params).token_ids for text in texts] == expected
        # Its last page is not whole: a copy of it is what comes back.
        assert engine.generate(texts[-1], params).token_ids == expected[-1]
        stats = engine.stats()
        assert stats["host_restored_tokens"] > 0 and stats["prefill_cache_hits"] > 0
    assert gone(follower.pid)


def test_a_killed_rank_ends_an_idle_engine_and_a_busy_one_is_told_why(folder: Path) -> None:
    settings = settings_for(2, kv_token_budget=512)
    with ranks(folder, 2, kv_token_budget=512) as backend:
        engine = EngineThread(EngineCore(backend, settings, EOS))
        os.kill(backend.follower_pids[0], signal.SIGKILL)
        until(lambda: engine.state == "dead", "the end of the engine")
        assert engine.failure == "the engine died: rank 1 of 2 died (killed by signal 9)"
    with ranks(folder, 2, kv_token_budget=512) as backend:
        core = EngineCore(backend, settings, EOS)
        core.add(core.make_request("r", [5, 6, 7], SamplingParams(max_new_tokens=400, ignore_eos=True)))
        core.step()
        os.kill(backend.follower_pids[0], signal.SIGKILL)
        with pytest.raises(BackendLostError, match=r"rank 1 of 2 died \(killed by signal 9\)"):
            while core.has_work:
                core.step()
        with pytest.raises(BackendLostError):
            core.step()


def test_a_rank_that_fails_in_a_step_ends_all_and_says_why(folder: Path) -> None:
    with ranks(folder, 2, kv_token_budget=512) as backend:
        core = EngineCore(backend, settings_for(2), EOS)
        core.add(core.make_request("r", [5, 6, 7], SamplingParams(max_new_tokens=400, ignore_eos=True)))
        core.step()
        backend._tell(Spill([0], [0]))  # to a host tier that it was never told to open
        with pytest.raises(BackendLostError, match=r"rank 1 of 2 failed: AssertionError"):
            while core.has_work:
                core.step()


def test_a_stopped_rank_is_given_up(folder: Path) -> None:
    with ranks(folder, 2, kv_token_budget=512, step_timeout=2) as backend:
        core = EngineCore(backend, settings_for(2), EOS)
        core.add(core.make_request("r", [5, 6, 7], SamplingParams(max_new_tokens=400, ignore_eos=True)))
        core.step()
        os.kill(backend.follower_pids[0], signal.SIGSTOP)
        with pytest.raises(BackendLostError, match="rank 1 of 2 "):
            while core.has_work:
                core.step()


def test_what_a_rank_cannot_load_is_said_by_the_engine(tmp_path: Path) -> None:
    leader = Leader(tmp_path / "none.gguf", settings_for(2), 2, torch.device("cpu"), 1)
    with pytest.raises(ModelLoadError, match=r"The file .*none\.gguf cannot be read"), leader.loading():
        leader.group.least(0)


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[EnginePool]:
    settings = settings_for(2, model=str(folder), kv_token_budget=512)
    pool = Model(settings, print).start_pool()
    try:
        pool.wait_ready(WAIT)
        yield pool
    finally:
        pool.close()


def children(pool: EnginePool) -> tuple[int, int]:
    """The process ids of the engine, which is rank 0, and of rank 1."""
    (engine,) = running(psutil.Process(), "process_main")
    (follower,) = running(engine, "follower_main")
    return engine.pid, follower.pid


def running(parent: psutil.Process, module: str) -> list[psutil.Process]:
    """The children that run ``module``. One that another test left to be waited for runs nothing."""
    found = []
    for child in parent.children():
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if module in " ".join(child.cmdline()):
                found.append(child)
    return found


def ask(pool: EnginePool, name: str, max_new_tokens: int = 12) -> Receiver:
    receiver = Receiver()
    params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
    work = make_work(pool.info, settings_for(2, max_context_margin=0), name, [5, 6, 7], params)
    pool.submit(work, receiver, pool.reserve())
    return receiver


@pytest.mark.parametrize("victim", ["rank 1", "rank 0"])
def test_an_engine_whose_rank_was_killed_is_made_again_as_a_whole(pool: EnginePool, victim: str) -> None:
    until(lambda: pool.ready, "an engine")
    answer = ask(pool, "before").wait().token_ids
    restarts = pool.stats().restarts
    engine, follower = children(pool)
    asked = ask(pool, "running", 400)
    until(asked.first.is_set, "its first token")
    os.kill(follower if victim == "rank 1" else engine, signal.SIGKILL)
    last = asked.wait()
    assert asked.last_kind == ENGINE_DIED
    if victim == "rank 1":
        assert last.error == "the engine died: rank 1 of 2 died (killed by signal 9)"
    until(lambda: gone(engine) and gone(follower), "both processes to end")
    until(lambda: pool.stats().restarts > restarts and pool.ready, "the engine to come back")
    assert ask(pool, "after").wait().token_ids == answer
    assert set(children(pool)).isdisjoint((engine, follower))


def test_no_process_outlives_the_pool(pool: EnginePool) -> None:
    until(lambda: pool.ready, "an engine")
    engine, follower = children(pool)
    pool.close()
    assert gone(engine)
    until(lambda: gone(follower), "rank 1 to end")


def test_a_followers_log_names_its_rank(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with ranks(folder, 2, log_level="info"):
        pass
    assert any("[rank 1]" in line and "Loaded" in line for line in capfd.readouterr().err.splitlines())
