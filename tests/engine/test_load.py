"""The engine under random load: every answer is the one the request gets alone, no page is lost."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mini_sglang.engine.engine import EngineCore
from mini_sglang.engine.request import Phase, Request
from mini_sglang.errors import ContextLengthError
from mini_sglang.types import FinishReason, SamplingParams

from .fake_backend import Answer, Driver, FakeBackend, examples, make_core, reference, turns

CONTEXT = 72
CODES = 32 * 5 * 3 * 3 * 3 * 4 * 3 * 4 * 3 * 4


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """Hundreds of failures on purpose would bury the report of a real one."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def check_locks(core: EngineCore) -> None:
    """Each node of the tree is locked once per running request, or page coming back, at or below it."""
    expected: Counter[int] = Counter()
    for arrival in core.cache.host.arrivals if core.cache.host else ():
        for node in core.cache._tree.path(arrival.node):
            expected[id(node)] += 1
    for node in core.cache.limbo.nodes():
        for above in core.cache._tree.path(node):
            expected[id(above)] += 1
    for request in core.scheduler.running:
        node = request.node
        pages: list[int] = []
        while node is not None and node.parent is not None:
            expected[id(node)] += 1
            pages[:0] = node.pages
            node = node.parent
        assert pages == list(request.pages[: request.num_tree_pages])
    for node in core.cache._tree._nodes():
        assert node.locks == expected[id(node)], "a lock was lost or forgotten"


def sampling_params(code: int) -> SamplingParams:
    """Sampling parameters from the digits of ``code``; 0 is the plainest."""

    def digit(base: int) -> int:
        nonlocal code
        code, value = divmod(code, base)
        return value

    max_new = 1 + digit(32)
    prompt_logprobs = digit(5) == 4
    return SamplingParams(
        max_new_tokens=max_new,
        temperature=0.8 if digit(3) == 2 else 0.0,
        seed=digit(3),
        ignore_eos=digit(3) > 0,
        stop_token_ids=((), (), (5, 9), (0, 7))[digit(4)],
        min_new_tokens=max_new // 2 if digit(3) == 2 else 0,
        presence_penalty=0.5 if digit(4) == 3 else 0.0,
        logprobs=digit(3) == 2,
        prompt_logprobs=prompt_logprobs,
        top_logprobs=2 if prompt_logprobs else 0,
        priority=(0, 0, 7, -100)[digit(4)],
    )


arrivals = st.tuples(
    st.integers(0, 9),  # which stem
    st.integers(0, 44),  # how much of it
    st.sampled_from([None, -1, 0, 1]),  # end at a page border, or a token to either side
    st.lists(st.integers(2, 4), max_size=3),  # tokens after it
    st.integers(0, CODES - 1),  # sampling parameters
    st.sampled_from(["", "", "", "", "", "", "prefill only", "tenant"]),
)

engine_settings = st.fixed_dictionaries(
    {
        "prefix_cache": st.sampled_from([True, True, True, True, False]),
        "prefix_cache_size": st.sampled_from([0, 0, 0, 1, 3]),
        "prefix_cache_max_tokens": st.sampled_from([4096, 4096, 20, 5]),
        "prefix_cache_token_budget": st.sampled_from([65536, 65536, 24, 0]),
        "prefix_cache_policy": st.sampled_from(["lru", "lfu"]),
        "chunked_prefill": st.booleans(),
        "prefill_chunk_size": st.sampled_from([1, 3, 8]),
        "max_batch_size": st.sampled_from([8, 8, 3, 1]),
        "max_prefill_tokens": st.sampled_from([4096, 64, 16, 4]),
        "priority_aging_seconds": st.sampled_from([5.0, 1e-4, 0.0]),
        "prefill_cache_size": st.sampled_from([8, 8, 2, 0]),
        "page_token_budget": st.sampled_from([0, 0, 24, 200]),
    }
).map(lambda settings: settings if settings["prefix_cache"] else {**settings, "page_token_budget": 0})


class EngineMachine(RuleBasedStateMachine):
    patience = 1  # steps for each that is needed

    @initialize(
        settings=engine_settings,
        page_size=st.sampled_from([1, 4, 16]),
        pool_tokens=st.sampled_from([48, 64, 96, 160]),
        background=st.booleans(),
    )
    def start(self, settings: dict[str, Any], page_size: int, pool_tokens: int, background: bool) -> None:
        self.settings = settings
        self.backend = self.make_backend(pool_tokens // page_size, page_size)
        if background:
            self.backend._store.page_bytes = 64 << 20
        self.core = self.make_core(settings)
        self.answers: dict[str, Answer] = {}
        self.requests: dict[str, Request] = {}
        self.aborted: set[str] = set()
        # Prompts that later prompts begin with: two that share their first 20 tokens, then whole answers.
        base = [2 + i % 7 for i in range(CONTEXT)]
        self.stems = [base, base[:20] + base[30:]]

    def make_backend(self, num_pages: int, page_size: int) -> FakeBackend:
        return FakeBackend(num_pages, page_size, CONTEXT)

    def make_core(self, settings: dict[str, Any]) -> EngineCore:
        return make_core(self.backend, **settings)

    @rule(burst=st.lists(arrivals, min_size=1, max_size=6))
    def add(self, burst: list[tuple[int, int, int | None, list[int], int, str]]) -> None:
        for stem, cut, border, tail, code, kind in burst:
            if border is not None:
                cut = max(0, cut - cut % self.backend.page_size + border)
            prompt = self.stems[stem % len(self.stems)][:cut] + tail
            if prompt:
                self.add_one(prompt, sampling_params(code), kind)

    def add_one(self, prompt: list[int], params: SamplingParams, kind: str) -> None:
        name = f"r{len(self.answers)}"
        prefill_only = kind == "prefill only"
        namespace = kind if kind == "tenant" else ""
        if prefill_only:
            params = SamplingParams()
        if len(prompt) > self.core.max_sequence_tokens - (not prefill_only):
            with pytest.raises(ContextLengthError):
                self.core.make_request(name, prompt, params, prefill_only=prefill_only)
            return
        request = self.core.make_request(name, prompt, params, prefill_only=prefill_only, namespace=namespace)
        self.core.add(request)
        self.answers[name] = Answer()
        self.requests[name] = request

    @rule(times=st.integers(1, 8))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.one_step()

    @rule(pick=st.integers(0, 1000))
    def abort(self, pick: int) -> None:
        """Any request, whatever its phase: an end comes once, and not to one that has ended."""
        name = f"r{pick % (len(self.answers) + 1)}"
        event = self.core.abort(name)
        if name not in self.answers or self.answers[name].finish is not None:
            assert event is None
            return
        assert event is not None and event.finish is FinishReason.ABORT
        self.aborted.add(name)
        self.answers[name].add(event)

    @precondition(lambda self: self.core.has_work)
    @rule(row=st.integers(0, 3), whole=st.booleans())
    def fail(self, row: int, whole: bool) -> None:
        """The next step raises, or one row of it is not finite."""
        if whole:
            self.backend.fail_at.add(self.backend.calls)
        else:
            self.backend.nan_at[self.backend.calls] = row

    @rule()
    def clear_cache(self) -> None:
        cache, size = self.core.cache, self.backend.page_size
        cache.settle()
        before = cache.num_free + (0 if cache.host is None else -cache.host.tier.num_used)
        dropped = cache.clear()
        assert cache.num_free - before == dropped // size
        assert cache.host is None or cache.host.tier.num_used == 0
        assert self.core.cache.num_available == self.core.cache.num_free

    @rule()
    def copies_end(self) -> None:
        self.backend._store.finish()

    @precondition(lambda self: self.core.has_work)
    @rule()
    def finish(self) -> None:
        self.drain()

    def drain(self) -> None:
        live = [r for name, r in self.requests.items() if self.answers[name].finish is None]
        # The oldest request computes a token or more at every step, so this many steps end them all.
        bound = sum(r.num_prompt + r.max_new_tokens + 1 for r in live) + len(live)
        bound = bound * self.patience + self.patience - 1
        if len({r.params.priority for r in live}) > 1:
            # One that waits may come before those that run, and set them back once it runs.
            bound *= len(live) + 1
        for _ in range(bound):
            if not self.core.has_work:
                break
            self.one_step()
        assert not self.core.has_work, "requests were starved"
        self.check_idle()

    def one_step(self) -> None:
        had_work, calls = self.core.has_work, self.backend.calls
        decoding = [r for r in self.core.scheduler.running if r.num_remaining == 1]
        starts = {id(r): r.num_computed for r in decoding}
        retractions = self.core.scheduler.num_retractions
        events = self.core.step()
        assert self.backend.calls == calls + had_work, "a step without a batch"
        for event in events:
            answer = self.answers[event.request_id]
            answer.add(event)
            if event.finish is FinishReason.ERROR:
                assert calls in self.backend.fail_at or calls in self.backend.nan_at
        if not had_work:
            return
        if calls not in self.backend.fail_at and self.core.scheduler.num_retractions == retractions:
            for request in decoding:
                progressed = request.phase is Phase.FINISHED or request.num_computed > starts[id(request)]
                assert progressed, "a decode was left out of a step"
        self.check_rows()
        self.core.check()

    def check_rows(self) -> None:
        rows, settings = self.backend.rows, self.settings
        assert len(rows) <= settings["max_batch_size"]
        prefills = [count for _, count in rows if count > 1]
        if settings["chunked_prefill"]:
            assert sum(prefills) <= settings["prefill_chunk_size"]
        else:
            assert sum(prefills) <= settings["max_prefill_tokens"] or len(prefills) == 1

    def check_idle(self) -> None:
        cache = self.core.cache
        assert cache.num_private == 0 and not self.core.scheduler.running and not self.core.scheduler.waiting
        cache.settle()
        cache._trim()
        assert cache.num_available == cache.num_pages, "a lock was left behind"
        cached = cache._tree.num_pages * cache.page_size
        assert cached <= self.settings["prefix_cache_token_budget"]
        assert (
            not self.settings["prefix_cache_size"] or cache.num_prefixes <= self.settings["prefix_cache_size"]
        )
        if not self.settings["prefix_cache"]:
            assert cache.num_cached == 0

    @invariant()
    def pages_and_answers(self) -> None:
        if not hasattr(self, "core"):
            return
        self.core.check()
        check_locks(self.core)
        stats = self.core.stats()
        live = [name for name, answer in self.answers.items() if answer.finish is None]
        assert stats["running"] + stats["waiting"] == len(live)
        assert stats["requests"] == len(self.answers)
        ended = stats["finished"] + stats["aborted"] + stats["failed"]
        assert ended == len(self.answers) - len(live)
        for name in [name for name in self.requests if self.answers[name].finish is not None]:
            self.check_answer(name, self.requests.pop(name))

    def check_answer(self, name: str, request: Request) -> None:
        answer, prompt = self.answers[name], request.tokens[: request.num_prompt]
        assert len(request.pages) == 0 and request.node is None
        if request.prefill_only:
            assert not answer.token_ids
            return
        alone = reference(
            prompt, request.params, max_new_tokens=request.max_new_tokens, seed=request.params.seed or 0
        )
        if answer.finish in (FinishReason.ABORT, FinishReason.ERROR):
            assert answer.token_ids == alone.token_ids[: len(answer.token_ids)]
            assert answer.logprobs == alone.logprobs[: len(answer.logprobs)]
            return
        assert replace(answer, cached_tokens=0) == alone
        cached = answer.cached_tokens
        whole = cached == len(prompt) and self.settings["prefill_cache_size"]
        assert whole or (cached < len(prompt) and cached % self.backend.page_size == 0)
        if not self.settings["prefix_cache"] or request.params.prompt_logprobs:
            assert cached == 0
        self.stems = [*self.stems[:2], *self.stems[2:][-7:], request.tokens]

    def teardown(self) -> None:
        if hasattr(self, "core") and self.core.has_work:
            self.drain()
            self.pages_and_answers()


TestEngine = EngineMachine.TestCase
TestEngine.settings = examples(60, 40)


@given(
    st.integers(0, 1 << 32), engine_settings, st.sampled_from([1, 4, 16]), st.sampled_from([64, 96, 200, 480])
)
@examples(40)
def test_forty_requests_at_random(
    seed: int, settings: dict[str, Any], page_size: int, pool_tokens: int
) -> None:
    """Random arrivals, lengths, seeds and aborts in a small pool: nobody's answer depends on the others."""
    backend = FakeBackend(pool_tokens // page_size, page_size, CONTEXT)
    forty_at_random(Driver(make_core(backend, **settings)), random.Random(seed), lambda: None)


def forty_at_random(driver: Driver, chance: random.Random, after_step: Callable[[], None]) -> None:
    """Serve them, and compare each answer with what it would be alone."""
    stems = [[2 + chance.randrange(8) for _ in range(CONTEXT)] for _ in range(3)]
    wanted: dict[str, Answer] = {}
    room = driver.core.max_sequence_tokens - 1
    for _ in turns():
        if len(wanted) == 40 and not driver.core.has_work:
            break
        while len(wanted) < 40 and chance.random() < 0.3:
            prompt = [*chance.choice(stems)[: chance.randrange(60)], 2 + chance.randrange(3)]
            prompt = prompt[:room]
            params = sampling_params(chance.randrange(CODES))
            name = driver.add(prompt, params)
            new = min(params.max_new_tokens, driver.core.max_sequence_tokens - len(prompt))
            wanted[name] = reference(prompt, params, max_new_tokens=new, seed=params.seed or 0)
        if wanted and chance.random() < 0.02:
            driver.abort(chance.choice(list(wanted)))
        driver.step()
        after_step()
    driver.core.cache.settle()
    check_locks(driver.core)
    assert driver.core.cache.num_available == driver.core.cache.num_pages
    for name, alone in wanted.items():
        answer = driver.answers[name]
        if answer.finish is FinishReason.ABORT:
            assert answer.token_ids == alone.token_ids[: len(answer.token_ids)]
        else:
            assert replace(answer, cached_tokens=0) == alone
