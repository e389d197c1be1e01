"""One running request as its caller sees it: an iterator of deltas, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING

from mini_sglang.errors import EngineError
from mini_sglang.text.stream import TextStream
from mini_sglang.types import Delta, FinishReason, Output, SamplingParams, TokenEvent, TokenLogprob, Usage

if TYPE_CHECKING:
    from mini_sglang.engine.handle import Sink
    from mini_sglang.engine.worker import EngineThread
    from mini_sglang.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


class _Answer(ABC):
    """The caller's end of a request: turns token events into deltas and keeps the whole.

    A stop string is found here, above the engine, which is then told to end the request; what it
    sends after that is dropped, so the caller too sees one end.
    """

    def __init__(
        self,
        thread: EngineThread,
        tokenizer: Tokenizer,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
    ) -> None:
        # Raises on a prompt that cannot run, before there is anything to close.
        request = thread.core.make_request(request_id, prompt_ids, params)
        self._thread = thread
        self._tokenizer = tokenizer
        self._params = params
        self.request_id = request_id
        self._text = TextStream(tokenizer, params)
        self._started = time.perf_counter()
        self._first_token_at: float | None = None
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._usage = Usage(0, 0, 0)
        self._finish: FinishReason | None = None
        self._logs = logger.isEnabledFor(logging.INFO)
        thread.submit(request, self._open_mailbox())

    @abstractmethod
    def _open_mailbox(self) -> Sink:
        """Make the queue that the request's events wait in; returns what puts them there."""

    def _take(self, event: TokenEvent) -> Delta:
        """Turn one event into a delta; the last one has ``finish_reason``.

        Raises:
            EngineError: the request failed in the engine.
        """
        if event.error is not None:
            self._finish = FinishReason.ERROR
            raise EngineError(f"request {self.request_id} failed: {event.error}")
        if event.token_ids and self._first_token_at is None:
            self._first_token_at = time.perf_counter()
        self._token_ids.extend(event.token_ids)
        self._logprobs.extend(event.logprobs)
        if event.prompt_logprobs:
            self._prompt_logprobs = event.prompt_logprobs
        text = self._text.push(event)
        if self._text.matched_stop is not None and event.finish is not FinishReason.ABORT:
            self._finish = FinishReason.STOP
            if event.finish is None:
                self._thread.abort(self.request_id, FinishReason.STOP)
        else:
            self._finish = event.finish
        self._texts.append(text)
        usage = None
        if self._finish is not None:
            usage = Usage(event.prompt_tokens, len(self._token_ids), event.cached_tokens)
            self._usage = usage
        delta = Delta(text, event.token_ids, event.logprobs, self._finish, usage)
        if self._logs:
            self._log(delta)
        return delta

    def _whole(self) -> Output:
        assert self._finish is not None
        return Output(
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            finish_reason=self._finish,
            usage=self._usage,
            logprobs=tuple(self._logprobs),
            prompt_logprobs=self._prompt_logprobs,
            matched_stop=self._text.matched_stop,
        )

    def _end(self) -> None:
        """Abort the request if it still runs. Safe to call at any time."""
        if self._finish is None:
            self._finish = FinishReason.ABORT
            self._thread.abort(self.request_id)

    def _log(self, delta: Delta) -> None:
        for token_id in delta.token_ids:
            logger.info(
                "decode request=%s token=%d text=%r",
                self.request_id,
                token_id,
                self._tokenizer.token_text(token_id),
            )
        if delta.text:
            logger.info("chunk request=%s text=%r", self.request_id, delta.text)
        if delta.usage is not None:
            seconds = time.perf_counter() - self._started
            first = (self._first_token_at or time.perf_counter()) - self._started
            usage = delta.usage
            logger.info(
                "done request=%s reason=%s tokens=%d seconds=%.3f tokens/s=%.1f ttft=%.3f prompt=%d "
                "prefix_hit_tokens=%d prefix_miss_tokens=%d",
                self.request_id, delta.finish_reason, usage.completion_tokens, seconds,
                usage.completion_tokens / max(seconds, 1e-9), first, usage.prompt_tokens,
                usage.cached_tokens, usage.prompt_tokens - usage.cached_tokens,
            )  # fmt: skip


class Stream(_Answer, Iterator[Delta]):
    """An answer as it is made. Iterate, or call ``output`` for the rest at once.

    Closing it before its end (``close``, the end of a ``with`` block, or losing the last reference)
    aborts the request.
    """

    def _open_mailbox(self) -> Sink:
        self._events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        return self._events.put

    def __next__(self) -> Delta:
        if self._finish is not None:
            raise StopIteration
        return self._take(self._events.get())

    def output(self) -> Output:
        """Wait for the end; the whole answer, deltas taken before included."""
        for _ in self:
            pass
        return self._whole()

    def close(self) -> None:
        self._end()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def __del__(self) -> None:
        # Not set where the constructor refused the prompt.
        if getattr(self, "_events", None) is not None:
            self._end()


class AsyncStream(_Answer):
    """``Stream`` for asyncio: ``async for``, ``await output()``, ``await aclose()``."""

    def _open_mailbox(self) -> Sink:
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        loop, events = asyncio.get_running_loop(), self._events

        def put(event: TokenEvent) -> None:
            # Raises in the engine's thread where the loop was closed; the request is dropped then.
            loop.call_soon_threadsafe(events.put_nowait, event)

        return put

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Delta:
        if self._finish is not None:
            raise StopAsyncIteration
        try:
            return self._take(await self._events.get())
        except asyncio.CancelledError:
            self._end()
            raise

    async def output(self) -> Output:
        """Wait for the end; the whole answer, deltas taken before included."""
        async for _ in self:
            pass
        return self._whole()

    async def aclose(self) -> None:
        self._end()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
