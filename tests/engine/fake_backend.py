"""A backend without torch whose KV pool remembers, per slot, everything the slot depends on.

Each written slot holds the rolling hash of the whole sequence up to it. A page that is shared wrongly,
overwritten, stale or never computed breaks the chain of hashes and fails the step that reads it.
"""

from __future__ import annotations

import os
import struct
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from hypothesis import settings as hypothesis_settings

from mini_sglang.backend.step import SampleSpec, SequenceResult, SequenceStep
from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from mini_sglang.types import FinishReason, SamplingParams, TokenEvent, TokenLogprob

VOCAB = 40
EOS_IDS = frozenset({0, 1})
EMPTY = 1  # the hash of no tokens
POISON = -1  # what a failed step leaves in the slots it was writing


class KVCorruption(BaseException):
    """The page table led to something else than this sequence's KV.

    Not an ``Exception``: the engine must not take it for a failure of the device and go on.
    """


def mix(value: int, token: int, position: int) -> int:
    """The hash of a sequence from that of all but its last token."""
    value = (value * 6364136223846793005 + (token + 1) * 1442695040888963407 + position) & (2**64 - 1)
    return value ^ (value >> 29)


def hash_of(tokens: Sequence[int]) -> int:
    value = EMPTY
    for position, token in enumerate(tokens):
        value = mix(value, token, position)
    return value


def next_token(value: int, spec: SampleSpec) -> int:
    """A deterministic choice after the sequence of hash ``value``; seed and index count when sampling."""
    if not spec.params.greedy:
        value = mix(mix(value, spec.seed & 0xFFFF, 1), spec.index, 2)
    token = value % VOCAB
    while token in spec.banned_ids:
        token = (token + 1) % VOCAB
    return token


def target_logprob(value: int, target: int, top: int) -> TokenLogprob:
    """The invented logprob of ``target`` after the sequence of hash ``value``."""
    return TokenLogprob(target, -(value % 1000) / 100, tuple((i, -float(i)) for i in range(top)))


@dataclass
class FakeBackend:
    """See the module. Options:

    Attributes:
        fail_at: calls of ``run`` (counted from 0) that raise after scribbling over their new slots.
        nan_at: calls of ``run`` whose row (the value, modulo the rows) comes back with an error; of a row
            with drafts what follows the last of them does.
        delay: seconds each call takes.
        checked: verify; off to measure the engine alone.
        tokens_of: gives the true tokens of the sequence that owns a page table.
    """

    num_pages: int = 64
    page_size: int = 4
    context_length: int = 128
    vocab_size: int = VOCAB
    fail_at: set[int] = field(default_factory=set)
    nan_at: dict[int, int] = field(default_factory=dict)
    delay: float = 0.0
    checked: bool = True
    copies_pages: bool = True
    tokens_of: Callable[[array[int]], Sequence[int]] | None = None
    calls: int = 0
    tokens_run: int = 0
    tokens_sampled: int = 0
    rows: list[tuple[int, int]] = field(default_factory=list)
    """(start, tokens, without the drafts) of each row of the latest call."""
    shares_prefixes: bool = True
    chunks_prompts: bool = True

    def __post_init__(self) -> None:
        self.slots: list[tuple[int, int, int]] = [(POISON, -1, -1)] * (self.num_pages * self.page_size)
        self.logits: dict[int, int] = {}
        self._store = FakeStore(self)

    @property
    def store(self) -> FakeStore | None:
        """Copies pages of ``slots``."""
        return self._store if self.copies_pages else None

    def run(self, steps: Sequence[SequenceStep]) -> list[SequenceResult]:
        call, self.calls = self.calls, self.calls + 1
        self.rows = [(step.start, len(step.token_ids) - len(step.draft_samples)) for step in steps]
        self.tokens_run += sum(len(step.token_ids) for step in steps)
        self.tokens_sampled += sum(step.sample is not None for step in steps)
        if self.delay:
            time.sleep(self.delay)
        if not self.checked:
            token = 2 + call % (VOCAB - 2)
            return [
                SequenceResult(
                    token if step.sample else None,
                    drafted=[SequenceResult(token) for _ in step.draft_samples],
                )
                for step in steps
            ]
        if not steps:
            raise KVCorruption("an empty call")
        # All reads come before all writes, so that a row which reads what another one writes is caught too.
        before = [self._read(step) for step in steps]
        written: set[int] = set()
        for step in steps:
            new = {self._slot(step, p) for p in range(step.start, step.start + len(step.token_ids))}
            if written & new:
                raise KVCorruption("two rows write one slot")
            written |= new
        for step in steps:
            if {self._slot(step, p) for p in range(step.start)} & written:
                raise KVCorruption("a row writes a slot that another one reads")
        if call in self.fail_at:
            for slot in written:
                self.slots[slot] = (POISON, -1, -1)
            raise RuntimeError(f"device failure at call {call}")
        for step, value in zip(steps, before, strict=True):
            if step.from_logits is not None and self.logits[step.from_logits] != value:
                raise KVCorruption("the logits of another prompt")
        results = [self._write(step, value) for step, value in zip(steps, before, strict=True)]
        if call in self.nan_at:
            row = self.nan_at[call] % len(steps)
            step, bad = steps[row], SequenceResult(error="logits are not finite")
            drafted = list(results[row].drafted)
            end = step.start + len(step.token_ids)
            for p in range(end - 1 if drafted else step.start, end):
                self.slots[self._slot(step, p)] = (POISON, -1, -1)
            if drafted:
                results[row].drafted = [*drafted[:-1], bad]
            else:
                results[row] = bad
        return results

    def _slot(self, step: SequenceStep, position: int) -> int:
        return step.pages[position // self.page_size] * self.page_size + position % self.page_size

    def _read(self, step: SequenceStep) -> int:
        """The hash of all that comes before the step, read through its page table."""
        end = step.start + len(step.token_ids)
        if bool(step.token_ids) == (step.from_logits is not None) or end > self.context_length:
            raise KVCorruption(f"{len(step.token_ids)} tokens at {step.start}, context {self.context_length}")
        if len(step.pages) * self.page_size < end or len(set(step.pages)) != len(step.pages):
            raise KVCorruption(f"page table {list(step.pages)} for {end} positions")
        value, seen = EMPTY, []
        for position in range(step.start):
            stored, token, at = self.slots[self._slot(step, position)]
            value = mix(value, token, position)
            if (stored, at) != (value, position):
                raise KVCorruption(f"position {position} of {step.start}")
            seen.append(token)
        seen.extend(step.token_ids)
        known = len(seen) - len(step.draft_samples)
        if self.tokens_of is not None and list(self.tokens_of(step.pages)[:known]) != seen[:known]:
            raise KVCorruption("the KV of another sequence")
        if step.draft_samples and (known == step.start or step.sample is None or step.prompt_targets):
            raise KVCorruption("drafts without a token before them, in a step that they have no place in")
        for drafts, spec in enumerate((step.sample, *step.draft_samples)):
            if spec is None or not spec.params.penalised:
                continue
            told = [*spec.prompt_ids, *spec.output_ids]
            if told != seen[: known + drafts] or len(spec.output_ids) != spec.index:
                raise KVCorruption("prompt_ids and output_ids are not what ran")
        return value

    def _write(self, step: SequenceStep, value: int) -> SequenceResult:
        targets = step.prompt_targets
        if targets and len(step.token_ids) - len(targets) not in (0, 1):
            raise KVCorruption(f"{len(targets)} prompt targets for {len(step.token_ids)} rows")
        result = SequenceResult()
        samples = [] if step.sample is None else [step.sample, *step.draft_samples]
        values = [value] if step.from_logits is not None else []
        for row, token in enumerate(step.token_ids):
            position = step.start + row
            value = mix(value, token, position)
            values.append(value)
            self.slots[self._slot(step, position)] = (value, token, position)
            if row < len(targets):
                result.prompt_logprobs.append(target_logprob(value, targets[row], step.prompt_top))
        if samples:
            first, *rest = map(self._choose, values[-len(samples) :], samples)
            result.token_id, result.logprob, result.drafted = first.token_id, first.logprob, rest
            if step.keep_logits is not None:
                self.logits[step.keep_logits] = value
        return result

    @staticmethod
    def _choose(value: int, spec: SampleSpec) -> SequenceResult:
        token = next_token(value, spec)
        logprob = target_logprob(value, token, spec.params.top_logprobs) if spec.params.logprobs else None
        return SequenceResult(token, logprob)


class FakeTransfer:
    """A copy that the test decides the end of."""

    def __init__(self, copy: Callable[[], None], over: bool) -> None:
        self._copy: Callable[[], None] | None = copy
        if over:
            self.wait()

    @property
    def done(self) -> bool:
        return self._copy is None

    def wait(self) -> None:
        if self._copy is not None:
            self._copy()
        self._copy = None


class FakeStore:
    """``PageStore`` over the slots of a ``FakeBackend``; background copies wait in ``under_way``."""

    def __init__(self, backend: FakeBackend) -> None:
        self._backend = backend
        self._layout = struct.Struct("<" + "Qqq" * backend.page_size)
        self.page_bytes = self._layout.size
        self.host: list[list[tuple[int, int, int]] | None] = []
        self.under_way: list[FakeTransfer] = []
        self.copies = 0

    def page(self, page: int) -> list[tuple[int, int, int]]:
        size = self._backend.page_size
        return self._backend.slots[page * size : (page + 1) * size]

    def _set(self, page: int, content: list[tuple[int, int, int]] | None) -> None:
        assert content is not None, "a slot of the host that nothing was written to"
        size = self._backend.page_size
        self._backend.slots[page * size : (page + 1) * size] = content

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self.copies += len(sources)
        for source, target in zip(sources, targets, strict=True):
            self._set(target, self.page(source))

    def open_host(self, num_slots: int) -> None:
        self.host = [None] * num_slots

    def spill(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        assert len(set(slots)) == len(slots)
        for page, slot in zip(pages, slots, strict=True):
            self.host[slot] = self.page(page)

    def restore(self, slots: Sequence[int], pages: Sequence[int], *, background: bool) -> FakeTransfer:
        slots, pages = list(slots), list(pages)
        for page in pages:  # until it is over they hold anything
            self._set(page, [(POISON, -1, -1)] * self._backend.page_size)

        def copy() -> None:
            for slot, page in zip(slots, pages, strict=True):
                self._set(page, self.host[slot])

        transfer = FakeTransfer(copy, not background)
        if background:
            self.under_way.append(transfer)
        return transfer

    def finish(self) -> None:
        """End the copies in the background."""
        for transfer in self.under_way:
            transfer.wait()
        self.under_way.clear()

    def read(self, pages: Sequence[int], slots: Sequence[int]) -> Iterator[bytes]:
        for content in (*map(self.page, pages), *(self.host[slot] for slot in slots)):
            assert content is not None
            yield self._layout.pack(*(number for slot in content for number in slot))

    def write(self, page: int, data: bytes) -> None:
        numbers = iter(self._layout.unpack(data))
        self._set(page, list(zip(numbers, numbers, numbers, strict=True)))

    def write_host(self, slot: int, data: bytes) -> None:
        numbers = iter(self._layout.unpack(data))
        self.host[slot] = list(zip(numbers, numbers, numbers, strict=True))

    def identity(self) -> dict[str, str]:
        return {"model": "fake", "layout": f"{self._backend.page_size} tokens a page"}


@dataclass
class Answer:
    """What a request gives: its tokens, why it ended, and the events it took."""

    token_ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None
    matched_token_id: int | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None

    def add(self, event: TokenEvent) -> None:
        """Take in an event; a second terminal one, or anything after the first, is an error."""
        assert self.finish is None, f"{event} after the end ({self.finish})"
        self.token_ids.extend(event.token_ids)
        self.logprobs.extend(event.logprobs)
        self.prompt_logprobs.extend(event.prompt_logprobs)
        self.finish, self.error = event.finish, event.error
        self.matched_token_id = event.matched_token_id
        self.prompt_tokens, self.cached_tokens = event.prompt_tokens, event.cached_tokens


def reference(
    prompt: Sequence[int], params: SamplingParams, *, max_new_tokens: int | None = None, seed: int = 0
) -> Answer:
    """The answer a request gets alone, without an engine. ``max_new_tokens``: after the caps."""
    limit = params.max_new_tokens if max_new_tokens is None else max_new_tokens
    eos_ids = frozenset() if params.ignore_eos else EOS_IDS
    ending = eos_ids | set(params.stop_token_ids)
    answer = Answer(prompt_tokens=len(prompt))
    tokens = list(prompt)
    if params.prompt_logprobs:
        answer.prompt_logprobs = [
            target_logprob(hash_of(prompt[:n]), prompt[n], params.top_logprobs) for n in range(1, len(prompt))
        ]
    value = hash_of(tokens)
    while answer.finish is None:
        index = len(answer.token_ids)
        banned = tuple(ending) if index < params.min_new_tokens else ()
        token = next_token(value, SampleSpec(params, seed, index, banned_ids=banned))
        answer.token_ids.append(token)
        if params.logprobs:
            answer.logprobs.append(target_logprob(value, token, params.top_logprobs))
        value = mix(value, token, len(tokens))
        tokens.append(token)
        if token in ending:
            answer.finish, answer.matched_token_id = FinishReason.STOP, token
        elif len(answer.token_ids) >= limit:
            answer.finish = FinishReason.LENGTH
    return answer


def make_core(
    backend: FakeBackend, *, draft_backend: FakeBackend | None = None, **overrides: object
) -> EngineCore:
    """An engine over ``backend`` whose every step is checked against the true tokens."""
    overrides.setdefault("max_context_margin", 0)
    core = EngineCore(backend, Settings.resolve(overrides, {}), EOS_IDS, draft_backend=draft_backend)

    def tokens_of(pages: array[int]) -> Sequence[int]:
        return next(r.tokens for r in core.scheduler.running if r.pages is pages)

    backend.tokens_of = tokens_of
    return core


def turns(limit: int = 5000) -> Iterator[int]:
    """Count up for the condition of a loop: ``for _ in turns()`` with a ``break`` cannot hang a test."""
    yield from range(limit)
    raise AssertionError(f"still not there after {limit} steps")


class Driver:
    """Runs requests on a core and gathers their answers."""

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.answers: dict[str, Answer] = {}

    def add(self, prompt: Sequence[int], params: SamplingParams | None = None, **options: object) -> str:
        name = f"r{len(self.answers)}"
        request = self.core.make_request(name, prompt, params or SamplingParams(), **options)  # type: ignore[arg-type]
        self.core.add(request)
        self.answers[name] = Answer()
        return name

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            for event in self.core.step():
                self.answers[event.request_id].add(event)
            self.core.check()

    def abort(self, name: str) -> None:
        event = self.core.abort(name)
        if event is not None:
            self.answers[name].add(event)
        self.core.check()

    def drain(self) -> None:
        """Step until nothing is left."""
        for _ in turns():
            if not self.core.has_work:
                break
            self.step()
        assert all(answer.finish is not None for answer in self.answers.values())

    def run(self, prompt: Sequence[int], params: SamplingParams | None = None, **options: object) -> Answer:
        """One request from start to end."""
        name = self.add(prompt, params, **options)
        self.drain()
        return self.answers[name]


def examples(count: int, steps: int = 50) -> hypothesis_settings:
    """Settings of a property test; EXAMPLES_SCALE=20 looks harder, and at other cases each time."""
    scale = int(os.environ.get("EXAMPLES_SCALE", "1"))
    return hypothesis_settings(
        max_examples=count * scale,
        stateful_step_count=steps,
        deadline=None,
        derandomize=scale == 1,
        database=None,
    )
