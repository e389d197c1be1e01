"""Requests with a grammar in the engine: state, retraction, ends, and compiles that take their time."""

from __future__ import annotations

import queue
import threading
from array import array
from collections.abc import Callable, Sequence

import pytest

from mini_sglang.backend.step import SequenceResult, SequenceStep, TokenGrammar
from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from mini_sglang.engine.limits import make_work
from mini_sglang.engine.worker import EngineThread
from mini_sglang.errors import EngineError, InvalidValueError
from mini_sglang.types import FinishReason, SamplingParams, TokenEvent

from .fake_backend import EOS_IDS, VOCAB, Driver, FakeBackend

EOS = min(EOS_IDS)
WAIT = 60.0


class Rising:
    """Ids that rise, by at most five each, up to ``last``; the end may come from half way on."""

    def __init__(self, last: int, at: int = 1) -> None:
        self.last = last
        self.at = at

    @property
    def done(self) -> bool:
        return self.at >= self.last

    def accept(self, token_id: int) -> str | None:
        if not self.at < token_id <= min(self.at + 5, self.last):
            return f"{token_id} does not follow {self.at}"
        self.at = token_id
        return None

    def fill_mask(self, words: memoryview, end_ids: Sequence[int]) -> str | None:
        allowed = list(range(self.at + 1, min(self.at + 5, self.last) + 1))
        if 2 * self.at >= self.last:
            allowed += end_ids
        for token_id in allowed:
            words[token_id // 32] |= 1 << token_id % 32
        return None if allowed else "nothing may follow"

    def copy(self) -> TokenGrammar:
        return Rising(self.last, self.at)


class Backend(FakeBackend):
    """A fake backend that chooses among what grammars allow."""

    def _write(self, step: SequenceStep, value: int) -> SequenceResult:
        result = super()._write(step, value)
        spec = step.sample
        if spec is None or spec.grammar is None:
            return result
        words = array("q", bytes(8 * -(-VOCAB // 32)))
        sentence = spec.grammar.fill_mask(memoryview(words), spec.end_ids)
        if sentence is not None:
            return SequenceResult(error=sentence)
        allowed = [i for i in range(VOCAB) if words[i // 32] >> i % 32 & 1 and i not in spec.banned_ids]
        assert result.token_id is not None
        result.token_id = allowed[result.token_id % len(allowed)]
        return result


def rising(params: SamplingParams) -> TokenGrammar:
    assert params.regex is not None
    return Rising(int(params.regex))


def grammar(last: int, **more: object) -> SamplingParams:
    return SamplingParams(max_new_tokens=60, regex=str(last), **more)  # type: ignore[arg-type]


def make_core(
    backend: FakeBackend,
    factory: Callable[[SamplingParams], TokenGrammar] | None = rising,
    **settings: object,
) -> EngineCore:
    resolved = Settings.resolve({"max_context_margin": 0, **settings}, {})
    return EngineCore(backend, resolved, EOS_IDS, grammars=factory)


def rises(ids: Sequence[int], last: int) -> bool:
    return all(a < b <= a + 5 for a, b in zip([1, *ids], ids, strict=False)) and max(ids) <= last


def test_a_grammar_ends_its_request_where_nothing_can_follow() -> None:
    driver = Driver(make_core(Backend()))
    answer = driver.run([5, 6, 7], grammar(30, ignore_eos=True))
    assert rises(answer.token_ids, 30) and answer.token_ids[-1] == 30
    assert answer.finish is FinishReason.STOP and answer.matched_token_id is None


def test_the_end_of_text_comes_only_where_the_grammar_accepts() -> None:
    driver = Driver(make_core(Backend()))
    for seed in range(30):
        answer = driver.run([5, 6, seed + 2], grammar(38, temperature=1.0, seed=seed))
        ids = [i for i in answer.token_ids if i not in EOS_IDS]
        assert answer.finish is FinishReason.STOP and rises(ids, 38)
        assert ids[-1] * 2 >= 38
        assert (answer.matched_token_id is not None) == (answer.token_ids[-1] in EOS_IDS)
    late = driver.run([5, 6], grammar(39, min_new_tokens=9))
    assert len(late.token_ids) >= 9 or late.token_ids[-1] == 39


def test_a_length_cuts_and_a_dead_end_is_an_error() -> None:
    driver = Driver(make_core(Backend()))
    short = driver.run([4], SamplingParams(max_new_tokens=2, regex="39"))
    assert short.finish is FinishReason.LENGTH and rises(short.token_ids, 39)
    nothing = driver.run([4], SamplingParams(regex="1", ignore_eos=True))
    assert nothing.finish is FinishReason.ERROR and nothing.error == "nothing may follow"


def test_retracted_requests_go_on_where_their_grammar_was() -> None:
    jobs = [([2 + i % 7, 3, *range(2, 2 + i % 9)], grammar(39, ignore_eos=True, seed=i)) for i in range(24)]
    alone = []
    for prompt, params in jobs:
        alone.append(Driver(make_core(Backend())).run(prompt, params).token_ids)
    driver = Driver(make_core(Backend(num_pages=14), max_batch_size=12))
    for prompt, params in jobs:
        driver.add(prompt, params)
        driver.add(prompt, SamplingParams(max_new_tokens=8, ignore_eos=True))
    driver.drain()
    answers = list(driver.answers.values())
    assert [answer.token_ids for answer in answers[::2]] == alone
    assert all(len(answer.token_ids) == 8 for answer in answers[1::2])
    assert driver.core.scheduler.num_retractions > 0, "the pool was meant to run out"


def test_a_backend_that_breaks_the_grammar_fails_that_request_alone() -> None:
    driver = Driver(make_core(FakeBackend()))  # looks at no grammar
    broken = driver.add([3, 4, 5], grammar(39))
    plain = driver.add([3, 4, 5], SamplingParams(max_new_tokens=6, ignore_eos=True))
    driver.drain()
    assert driver.answers[broken].finish is FinishReason.ERROR
    assert "does not follow" in (driver.answers[broken].error or "")
    assert len(driver.answers[plain].token_ids) == 6


def test_without_a_compiler_a_grammar_is_refused() -> None:
    core = make_core(Backend(), None)
    with pytest.raises(EngineError, match="grammars"):
        core.make_request("a", [2], grammar(9))


def test_work_that_comes_uncompiled_is_compiled_beside_the_queue() -> None:
    core = make_core(Backend())
    driver = Driver(core)
    work = make_work(core.info, Settings.resolve({}, {}), "w", [5, 6, 7], grammar(30, ignore_eos=True))
    driver.answers["w"] = type(driver.run([2], SamplingParams(max_new_tokens=1)))()
    core.add(core.request_of(work))
    driver.drain()
    expected = Driver(make_core(Backend())).run([5, 6, 7], grammar(30, ignore_eos=True))
    assert driver.answers["w"].token_ids == expected.token_ids


class Gate:
    """A compiler that takes until it is told."""

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Event()

    def __call__(self, params: SamplingParams) -> TokenGrammar:
        self.entered.set()
        assert self.open.wait(WAIT)
        if params.regex == "0":
            raise InvalidValueError("regex", "0", "more")
        return rising(params)


class Stream:
    def __init__(self) -> None:
        self.events: queue.Queue[TokenEvent] = queue.Queue()

    def until_end(self) -> tuple[list[int], TokenEvent]:
        ids: list[int] = []
        while True:
            event = self.events.get(timeout=WAIT)
            ids.extend(event.token_ids)
            if event.finish is not None:
                return ids, event


def test_a_slow_compile_stops_nobody_and_can_be_aborted() -> None:
    gate = Gate()
    backend = Backend(num_pages=128, context_length=400, delay=0.002)
    thread = EngineThread(make_core(backend, gate))
    try:
        plain, slow, bad, gone = (Stream() for _ in range(4))
        settings = Settings.resolve({"max_context_margin": 0}, {})

        def submit(name: str, stream: Stream, params: SamplingParams) -> None:
            thread.submit(make_work(thread.core.info, settings, name, [5, 6, 7], params), stream.events.put)

        submit("slow", slow, grammar(30, ignore_eos=True))
        submit("bad", bad, SamplingParams(regex="0"))
        submit("gone", gone, grammar(20))
        assert gate.entered.wait(WAIT)
        submit("plain", plain, SamplingParams(max_new_tokens=50, ignore_eos=True))
        ids, event = plain.until_end()  # from start to end while the compiles stand still
        assert len(ids) == 50 and event.finish is FinishReason.LENGTH
        assert slow.events.empty() and bad.events.empty()
        thread.abort("gone")
        assert gone.until_end()[1].finish is FinishReason.ABORT
        gate.open.set()
        ids, event = slow.until_end()
        assert event.finish is FinishReason.STOP and rises(ids, 30)
        ids, event = bad.until_end()
        assert event.finish is FinishReason.ERROR and "regex" in (event.error or "") and not ids
        assert thread.call(lambda: thread.core.has_work) is False
        thread.call(thread.core.check)
    finally:
        gate.open.set()
        thread.close()


def test_closing_ends_requests_that_are_still_being_compiled() -> None:
    gate = Gate()
    thread = EngineThread(make_core(Backend(), gate))
    stream = Stream()
    work = make_work(thread.core.info, Settings.resolve({}, {}), "a", [5], grammar(9))
    thread.submit(work, stream.events.put)
    assert gate.entered.wait(WAIT)
    thread.close()
    assert stream.until_end()[1].finish is FinishReason.ABORT
    gate.open.set()
