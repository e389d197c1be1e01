"""Copies of KV pages, within the pool and to host memory and back; implements ``PageStore``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from mini_sglang.backend.device import free_memory
from mini_sglang.backend.huge_pages import empty_in_huge_pages
from mini_sglang.backend.kv.pool import KVPool
from mini_sglang.errors import InvalidValueError

Run = tuple[int, int, int]  # first source, first target, how many


class PoolStore:
    """The page store of a ``KVPool``, whose rows it copies as bytes, of whatever type they are.

    On a CUDA device copies to and from the host run on a stream of their own, from and to pinned memory, and
    steps wait for them there, not here. Elsewhere a copy is done on return, but for one in the background,
    which has a thread.

    Args:
        identity: see ``PageStore.identity``; called when it is asked for.
        sharing: stores that open as much of the host's memory as this one.
    """

    def __init__(self, kv: KVPool, identity: Callable[[], dict[str, str]], sharing: int = 1) -> None:
        layers = kv.data.shape[0]
        # [layers, pages, bytes of a page in a layer]
        self._pool = kv.data.view(torch.uint8).view(layers, kv.num_pages + kv.spare_pages, -1)
        self._host: Tensor | None = None
        self._page_size = kv.page_size
        self._identity = identity
        self._sharing = sharing
        self._thread: ThreadPoolExecutor | None = None
        on_cuda = kv.data.device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None
        if on_cuda:
            self._stream = torch.cuda.Stream(kv.data.device)  # type: ignore[no-untyped-call]

    @property
    def page_bytes(self) -> int:
        return self._pool.shape[0] * self._pool.shape[2]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        for run in _runs(sources, targets):
            _copy(self._pool, self._pool, run)

    def open_host(self, num_slots: int) -> None:
        layers, _, width = self._pool.shape
        pinned = self._stream is not None
        allowed = free_memory(torch.device("cpu")) // (self.page_bytes * self._sharing)
        if num_slots <= allowed:
            try:
                shape = (layers, num_slots, width)
                self._host = (
                    torch.empty(shape, dtype=torch.uint8, pin_memory=True)
                    if pinned
                    else empty_in_huge_pages(shape, torch.uint8)
                )
                return
            except (RuntimeError, MemoryError):
                allowed = num_slots - 1
        gib = num_slots * self.page_bytes / 2**30
        raise InvalidValueError(
            "PAGE_TOKEN_BUDGET",
            num_slots * self._page_size,
            f"at most {allowed * self._page_size}: so many tokens take {gib:.1f} GiB of host memory",
        )

    def spill(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        assert self._host is not None
        self._move(self._pool, self._host, _runs(pages, slots))

    def restore(self, slots: Sequence[int], pages: Sequence[int], *, background: bool) -> Copy:
        assert self._host is not None
        runs = _runs(slots, pages)
        if self._stream is not None:
            return Copy(event=self._move(self._host, self._pool, runs, join=not background))
        if not background:
            self._move(self._host, self._pool, runs)
            return Copy()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="mini-sglang-pages")
        return Copy(future=self._thread.submit(self._move, self._host, self._pool, runs))

    def read(self, pages: Sequence[int], slots: Sequence[int]) -> Iterator[bytes]:
        if self._stream is not None:
            self._stream.synchronize()
        for tensor, places in ((self._pool, pages), (self._host, slots)):
            for place in places:
                assert tensor is not None
                yield tensor[:, place].contiguous().cpu().numpy().tobytes()

    def write(self, page: int, data: bytes) -> None:
        _fill(self._pool, page, data)

    def write_host(self, slot: int, data: bytes) -> None:
        assert self._host is not None
        if self._stream is not None:
            self._stream.synchronize()
        _fill(self._host, slot, data)

    def identity(self) -> dict[str, str]:
        return self._identity()

    def _move(
        self, source: Tensor, target: Tensor, runs: Sequence[Run], *, join: bool = True
    ) -> torch.cuda.Event | None:
        """Copy between pool and host; with ``join`` steps from now on wait for it."""
        if self._stream is None:
            for run in runs:
                _copy(source, target, run)
            return None
        steps = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(steps)
        with torch.cuda.stream(self._stream):
            for layer in range(source.shape[0]):
                for first, to, count in runs:
                    # Of one layer, so that both sides are in one piece and the copy need not wait.
                    target[layer, to : to + count].copy_(
                        source[layer, first : first + count], non_blocking=True
                    )
            event: torch.cuda.Event = self._stream.record_event()
        if join:
            steps.wait_event(event)
        return event


class Copy:
    """A ``Transfer``: a thread's, a stream's, or one that is over."""

    def __init__(
        self, future: Future[torch.cuda.Event | None] | None = None, event: torch.cuda.Event | None = None
    ) -> None:
        self._future = future
        self._event = event

    @property
    def done(self) -> bool:
        if self._future is not None:
            return self._future.done()
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        if self._future is not None:
            self._future.result()
        if self._event is not None:
            # The device's next steps wait; this thread goes on.
            torch.cuda.current_stream().wait_event(self._event)


def _fill(tensor: Tensor, place: int, data: bytes) -> None:
    rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(tensor.shape[0], tensor.shape[2])
    tensor[:, place].copy_(rows)


def _runs(sources: Sequence[int], targets: Sequence[int]) -> list[Run]:
    """Copies of pages that lie side by side at both ends as one."""
    runs: list[Run] = []
    for source, target in sorted(zip(sources, targets, strict=True)):
        if runs:
            first, to, count = runs[-1]
            if source == first + count and target == to + count:
                runs[-1] = (first, to, count + 1)
                continue
        runs.append((source, target, 1))
    return runs


def _copy(source: Tensor, target: Tensor, run: Run) -> None:
    first, to, count = run
    here, there = source[:, first : first + count], target[:, to : to + count]
    if source.device.type == target.device.type == "cpu":
        # By numpy, in the calling thread alone: torch's threads belong to the step.
        there.numpy()[...] = here.numpy()
    else:
        there.copy_(here)
