"""A ``FakeBackend`` whose submitted steps read and write late, when it suits them worst.

A step runs at some moment between ``submit`` and ``wait``, after those submitted before it. Until it was
waited for, the slots it reads must not be written, and those it writes must not be touched, by anybody else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from mini_sglang.backend.step import SequenceResult, SequenceStep
from mini_sglang.engine.engine import EngineCore
from mini_sglang.engine.request import Phase, Request

from .fake_backend import POISON, VOCAB, FakeBackend, FakeStore, FakeTransfer, KVCorruption, make_core


@dataclass(eq=False)
class LateFlight:
    """A submitted step."""

    backend: LateBackend
    steps: list[SequenceStep]
    owners: list[Request | None]
    before: LateFlight | None
    pages: set[int]
    blind: bool  # whether it was submitted before that one was waited for
    run: bool = False
    results: list[SequenceResult] = field(default_factory=list)
    error: Exception | None = None
    revised: set[int] = field(default_factory=set)

    def execute(self) -> None:
        if self.run:
            return
        if self.before is not None:
            self.before.execute()
        self.run = True
        lost = self.before.lost if self.before is not None and self.blind else set()
        try:
            self.results = self.backend.run_now(self._filled(), self.owners, lost)
        except Exception as error:
            self.error = error

    @property
    def lost(self) -> set[Request]:
        """Whose KV is not what it should be after this step."""
        return {
            owner
            for place, owner in enumerate(self.owners)
            if owner is not None and (self.error is not None or self.results[place].error is not None)
        }

    def _filled(self) -> list[SequenceStep]:
        filled: list[SequenceStep] = []
        for step in self.steps:
            if step.follows is None:
                filled.append(step)
                continue
            assert self.before is not None
            if self.before.error is not None:
                raise RuntimeError("the step before failed")
            if len(step.token_ids) != 1:
                raise KVCorruption("more than one token after one that is not known")
            token = self.before.results[step.follows].token_id
            token = 0 if token is None else token
            token += step.follows in self.before.revised
            filled.append(replace(step, token_ids=[token % VOCAB], follows=None))
        return filled

    def wait(self) -> list[SequenceResult]:
        self.execute()
        if self in self.backend.under_way:
            self.backend.under_way.remove(self)
        if self.error is not None:
            raise self.error
        for place in self.revised:
            self.results[place].revised = self.results[place].token_id is not None
        return self.results


@dataclass
class LateBackend(FakeBackend):
    """Is its own ``Submitter``.

    Attributes:
        chance: decides when steps run, and what goes wrong.
        revises: how often a step takes a token that then turns out to be another.
        refuses: how often ``submit`` raises.
        owners_of: the running requests that a step may be of, which are one but for equal prompts.
    """

    chance: random.Random = field(default_factory=lambda: random.Random(0))
    revises: float = 0.1
    refuses: float = 0.02
    owners_of: Callable[[SequenceStep], list[Request]] = lambda step: []
    under_way: list[LateFlight] = field(default_factory=list)
    submitted: int = 0
    ahead: int = 0
    closed: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._store = LateStore(self)
        self._last: LateFlight | None = None

    @property
    def submitter(self) -> LateBackend:
        return self

    def close(self) -> None:
        self.closed = True

    def submit(self, steps: Sequence[SequenceStep]) -> LateFlight:
        steps = list(steps)
        self.progress()
        if len(self.under_way) > 1:
            raise KVCorruption("three steps under way")
        if self.chance.random() < self.refuses:
            raise RuntimeError("submit refused")
        owners: list[Request | None] = []
        for step in steps:
            owners.append(next((owner for owner in self.owners_of(step) if owner not in owners), None))
        self._check_apart(steps, owners)
        before = self._last
        for step in steps:
            if step.follows is None:
                continue
            if before is None:
                raise KVCorruption("a step follows none")
            if before in self.under_way and self.chance.random() < self.revises:
                before.revised.add(step.follows)
        pages = {page for step in steps for page in step.pages}
        self._last = LateFlight(self, steps, owners, before, pages, before in self.under_way)
        self.ahead += bool(self.under_way)
        self.under_way.append(self._last)
        self.submitted += 1
        self.rows = [(step.start, len(step.token_ids)) for step in steps]
        self.progress()
        return self._last

    def run(self, steps: Sequence[SequenceStep]) -> list[SequenceResult]:
        if self.under_way:
            raise KVCorruption("run while a step is under way")
        return super().run(steps)

    def run_now(
        self, steps: list[SequenceStep], owners: list[Request | None], lost: set[Request]
    ) -> list[SequenceResult]:
        """As ``run``; those of ``lost`` requests compute nothing of use."""
        rows, self.tokens_of = self.rows, None
        results = [SequenceResult(1) for _ in steps]
        sound: list[int] = []
        for place, (step, owner) in enumerate(zip(steps, owners, strict=True)):
            if owner is not None and owner in lost:
                for slot in self._writes(step):
                    self.slots[slot] = (POISON, -1, -1)
                continue
            sound.append(place)
            if owner is not None and owner.phase is not Phase.FINISHED:
                self._check_tokens(step, owner)
        try:
            if sound:
                for place, result in zip(sound, super().run([steps[place] for place in sound]), strict=True):
                    results[place] = result
        finally:
            self.rows = rows
        return results

    def _check_tokens(self, step: SequenceStep, owner: Request) -> None:
        """That what it reads is its own sequence, as far as that is known."""
        for position in range(min(step.start, len(owner.tokens))):
            if self.slots[self._slot(step, position)][1] != owner.tokens[position]:
                raise KVCorruption("the KV of another sequence")

    def progress(self) -> None:
        """Run some of what is under way, or nothing."""
        for flight in self.under_way:
            if self.chance.random() < 0.6:
                return
            flight.execute()

    def touch(self, pages: Sequence[int]) -> None:
        """Somebody else writes pages."""
        self.progress()
        for flight in self.under_way:
            if flight.pages & set(pages):
                raise KVCorruption("a page of a step under way was written")

    def check_free(self, free: frozenset[int]) -> None:
        """No page of a step under way is free."""
        for flight in self.under_way:
            if flight.pages & free:
                raise KVCorruption("a page of a step under way is free")

    def _check_apart(self, steps: Sequence[SequenceStep], owners: Sequence[Request | None]) -> None:
        for flight in self.under_way:
            for old, old_owner in zip(flight.steps, flight.owners, strict=True):
                old_writes = self._writes(old)
                old_reads = {self._slot(old, p) for p in range(old.start)}
                for step, owner in zip(steps, owners, strict=True):
                    if owner is not None and owner is old_owner:
                        continue
                    writes = self._writes(step)
                    reads = {self._slot(step, p) for p in range(step.start)}
                    if writes & (old_writes | old_reads) or reads & old_writes:
                        raise KVCorruption("a page was handed on while a step under way uses it")

    def _writes(self, step: SequenceStep) -> set[int]:
        return {self._slot(step, p) for p in range(step.start, step.start + len(step.token_ids))}


class LateStore(FakeStore):
    """``FakeStore`` that sees to it that nothing under way is written."""

    def __init__(self, backend: LateBackend) -> None:
        super().__init__(backend)
        self._late = backend

    def _set(self, page: int, content: list[tuple[int, int, int]] | None) -> None:
        self._late.touch([page])
        super()._set(page, content)

    def spill(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        self._late.progress()
        super().spill(pages, slots)

    def restore(self, slots: Sequence[int], pages: Sequence[int], *, background: bool) -> FakeTransfer:
        self._late.touch(pages)
        return super().restore(slots, pages, background=background)


def make_late_core(backend: LateBackend, **overrides: object) -> EngineCore:
    """An engine over ``backend``."""
    core = make_core(backend, **overrides)
    backend.tokens_of = None

    def owners_of(step: SequenceStep) -> list[Request]:
        return [r for r in core.scheduler.running if r.pages == step.pages and r.num_computed <= step.start]

    backend.owners_of = owners_of
    return core
