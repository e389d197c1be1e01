"""The backends of a group's ranks: one leads, the others do the same steps on their parts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from mini_sglang.backend.batch import Batch
from mini_sglang.backend.kv.store import Copy, PoolStore
from mini_sglang.backend.model_backend import LOGPROB_ROWS, ModelBackend
from mini_sglang.backend.parallel.followers import Followers
from mini_sglang.backend.parallel.group import Group
from mini_sglang.backend.parallel.wire import (
    Command,
    CopyPages,
    OpenHost,
    Restore,
    Run,
    Spill,
    rows_of,
)
from mini_sglang.backend.step import SequenceResult, SequenceStep
from mini_sglang.errors import BackendLostError

logger = logging.getLogger(__name__)

# How long the reason of a failed step may take to arrive from the rank that has it.
_REASON_SECONDS = 3.0


class LeadingBackend(ModelBackend):
    """Rank 0: tells the others what to run, runs it with them, and chooses the tokens.

    What goes wrong within a step leaves the ranks at different places, so it ends all of them
    (``BackendLostError``).
    """

    def __init__(self, followers: Followers, group: Group, *parts: Any, **more: Any) -> None:
        super().__init__(*parts, **more)
        self._followers = followers
        self._group = group
        self._lost: str | None = None
        self.store = LeadingStore(self.store, self.kv, self._tell, group.size)

    @property
    def follower_pids(self) -> list[int]:
        """The process ids of the other ranks, in order."""
        return self._followers.pids

    def check(self) -> None:
        """See ``Backend``: raises ``BackendLostError`` where a rank is gone."""
        failure = self._lost or self._followers.failure
        if failure is not None:
            self.close()
            raise BackendLostError(failure)

    def close(self) -> None:
        """End the other ranks. Safe to call twice."""
        self._lost = self._lost or self._followers.failure or "the ranks are closed"
        self._followers.close()
        self._group.close()

    def describe(self) -> dict[str, str | int]:
        return {**super().describe(), "tensor_parallel_size": self._group.size}

    def _run(self, steps: Sequence[SequenceStep], batch: Batch) -> list[SequenceResult]:
        self.check()
        self._tell(Run(rows_of(steps)))
        try:
            return super()._run(steps, batch)
        except Exception as error:
            logger.debug("a step failed on rank 0", exc_info=True)
            said = self._followers.why(_REASON_SECONDS) or f"rank 0 failed in a step: {error!r:.200}"
            self._lost = said
            self.close()
            raise BackendLostError(said) from error

    def _tell(self, command: Command) -> None:
        try:
            self._followers.send(command)
        except BackendLostError as error:
            self._lost = str(error)
            self.close()
            raise


class LeadingStore(PoolStore):
    """Rank 0's pages; the others do the same to theirs, in the order of the steps around it."""

    def __init__(self, own: PoolStore, kv: Any, tell: Callable[[Command], None], ranks: int) -> None:
        super().__init__(kv, own.identity, sharing=ranks if kv.data.device.type == "cpu" else 1)
        self._tell = tell

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self._tell(CopyPages(list(sources), list(targets)))
        super().copy(sources, targets)

    def open_host(self, num_slots: int) -> None:
        super().open_host(num_slots)
        self._tell(OpenHost(num_slots))

    def spill(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        self._tell(Spill(list(pages), list(slots)))
        super().spill(pages, slots)

    def restore(self, slots: Sequence[int], pages: Sequence[int], *, background: bool) -> Copy:
        self._tell(Restore(list(slots), list(pages)))
        return super().restore(slots, pages, background=background)


class FollowingBackend(ModelBackend):
    """Another rank: it does what it is told, and chooses no token."""

    def obey(self, command: Command) -> None:
        """Do one command. Raises what the device raises, and where another rank is gone."""
        match command:
            case Run(steps):
                self.run([rows.step() for rows in steps])
            case CopyPages(sources, targets):
                self.store.copy(sources, targets)
            case OpenHost(num_slots):
                self.store.open_host(num_slots)
            case Spill(pages, slots):
                self.store.spill(pages, slots)
            case Restore(slots, pages):
                self.store.restore(slots, pages, background=False)
            case _:
                raise TypeError(f"a {type(command).__name__} is no command of a running rank")

    def _results(self, steps: Sequence[SequenceStep], batch: Batch, hidden: Tensor) -> list[SequenceResult]:
        """This rank's part of every product that ``ModelBackend._results`` asks for, in the same order."""
        if batch.samples:
            self.decoder.logits(self._sampled_rows(batch, hidden))
        for _, first, stop in batch.prompts:
            for start in range(first, stop, LOGPROB_ROWS):
                self.decoder.logits(hidden[start : min(start + LOGPROB_ROWS, stop)])
        return []
