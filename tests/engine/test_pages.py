"""The free list against a set."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from mini_sglang.engine.pages import PageAllocator

from .fake_backend import examples


class PageMachine(RuleBasedStateMachine):
    @initialize(num_pages=st.integers(0, 12))
    def start(self, num_pages: int) -> None:
        self.total = num_pages
        self.pages = PageAllocator(num_pages)
        self.held: set[int] = set()

    @rule(count=st.integers(0, 14))
    def allocate(self, count: int) -> None:
        if count > self.total - len(self.held):
            with pytest.raises(MemoryError, match=f"{count} KV pages wanted"):
                self.pages.allocate(count)
            return
        taken = self.pages.allocate(count)
        assert len(taken) == len(set(taken)) == count
        assert not self.held & set(taken), "a page was handed out twice"
        assert set(taken) <= set(range(self.total))
        self.held |= set(taken)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        given_back = data.draw(st.sets(st.sampled_from(sorted(self.held)))) if self.held else set()
        self.pages.free(sorted(given_back))
        self.held -= given_back

    @rule(data=st.data())
    def free_twice(self, data: st.DataObject) -> None:
        free = sorted(set(range(self.total)) - self.held)
        if free:
            page = data.draw(st.sampled_from(free))
            with pytest.raises(ValueError, match=f"page {page} was freed twice"):
                self.pages.free([page])

    @invariant()
    def counts(self) -> None:
        assert self.pages.num_free == self.total - len(self.held)
        assert self.pages.free_pages() == set(range(self.total)) - self.held


TestPages = PageMachine.TestCase
TestPages.settings = examples(60, 30)


def test_fresh_pages_ascend() -> None:
    pages = PageAllocator(6)
    assert [*pages.allocate(2), *pages.allocate(3)] == [0, 1, 2, 3, 4]
