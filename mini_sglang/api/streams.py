"""One running request as its caller sees it: an iterator of deltas, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import logging
import queue
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

from mini_sglang.api.mailbox import Inbox
from mini_sglang.errors import EngineError
from mini_sglang.text.stream import TextStream
from mini_sglang.types import Delta, FinishReason, Output, SamplingParams, TokenEvent, TokenLogprob, Usage

if TYPE_CHECKING:
    from mini_sglang.api.mailbox import LoopCalls
    from mini_sglang.engine.worker import EngineThread
    from mini_sglang.text.tokenizer import Tokenizer
    from mini_sglang.types import Adapter

logger = logging.getLogger(__name__)

_SIGNAL_SECONDS = 0.5


class _Answer:
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
        ring: Callable[[], None],
        adapter: Adapter | None = None,
        whole: bool = False,
    ) -> None:
        # Raises on a prompt that cannot run, before there is anything to close.
        inflight = thread.in_flight + 1
        request = thread.core.make_request(request_id, prompt_ids, params, adapter=adapter, inflight=inflight)
        self._thread = thread
        self._tokenizer = tokenizer
        self._params = params
        self.request_id = request_id
        self._text = TextStream(tokenizer, params)
        self._started = time.perf_counter()
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._usage = Usage(0, 0, 0)
        self._capped_by = request.capped_by
        self._finish: FinishReason | None = None
        self._logs = logger.isEnabledFor(logging.INFO)
        # Who wants the whole need not be told of each token, where no text can end it and no log is kept.
        self._patient = not params.stop and not self._logs
        self._inbox = Inbox(ring, whole=whole and self._patient)
        thread.submit(request, self._inbox.put)

    def _take(self, event: TokenEvent) -> Delta:
        """Turn one event into a delta; the last one has ``finish_reason``.

        Raises:
            EngineError: the request failed in the engine.
        """
        text = self._add(event)
        usage = None if self._finish is None else self._usage
        return Delta(text, event.token_ids, event.logprobs, self._finish, usage)

    def _add(self, event: TokenEvent) -> str:
        """Take in one event; gives the text it adds, and sets ``_finish`` and ``_usage`` at the end.

        Raises:
            EngineError: the request failed in the engine.
        """
        if event.error is not None:
            self._finish = FinishReason.ERROR
            raise EngineError(f"request {self.request_id} failed: {event.error}")
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
        if self._finish is not None:
            made = len(self._token_ids)
            self._usage = Usage(event.prompt_tokens, made, event.cached_tokens, self._capped_by)
        if self._logs:
            self._log(event, text)
        return text

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

    def _log(self, event: TokenEvent, text: str) -> None:
        for token_id in event.token_ids:
            logger.info(
                "decode request=%s token=%d text=%r",
                self.request_id,
                token_id,
                self._tokenizer.token_text(token_id),
            )
        if text:
            logger.info("chunk request=%s text=%r", self.request_id, text)
        if self._finish is not None:
            seconds = time.perf_counter() - self._started
            first = (self._inbox.first_token_at or time.perf_counter()) - self._started
            usage = self._usage
            logger.info(
                "done request=%s reason=%s tokens=%d seconds=%.3f tokens/s=%.1f ttft=%.3f prompt=%d "
                "prefix_hit_tokens=%d prefix_miss_tokens=%d prefill_cache=%s",
                self.request_id, self._finish, usage.completion_tokens, seconds,
                usage.completion_tokens / max(seconds, 1e-9), first, usage.prompt_tokens,
                *cache_figures(usage),
            )  # fmt: skip


def cache_figures(usage: Usage) -> tuple[int, int, str]:
    """For the log: a prompt's tokens that the prefix cache had and had not, and "hit" or "miss" of the
    exact-prompt cache, which is asked first and has all of a prompt or nothing."""
    if usage.cached_tokens == usage.prompt_tokens:
        return 0, 0, "hit"
    return usage.cached_tokens, usage.prompt_tokens - usage.cached_tokens, "miss"


class Stream(_Answer, Iterator[Delta]):
    """An answer as it is made. Iterate, or call ``output`` for the rest at once; ``whole`` says that nothing
    else will be done.

    Closing it before its end (``close``, the end of a ``with`` block, or losing the last reference)
    aborts the request.
    """

    def __init__(
        self,
        thread: EngineThread,
        tokenizer: Tokenizer,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        adapter: Adapter | None = None,
        *,
        whole: bool = False,
    ) -> None:
        self._bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        ring = partial(self._bell.put, None)
        super().__init__(thread, tokenizer, request_id, prompt_ids, params, ring, adapter, whole)

    def __next__(self) -> Delta:
        if self._finish is not None:
            raise StopIteration
        return self._take(self._next_event())

    def output(self) -> Output:
        """Wait for the end; the whole answer, deltas taken before included."""
        while self._finish is None:
            self._add(self._next_event(self._patient))
        return self._whole()

    def _next_event(self, patient: bool = False) -> TokenEvent:
        while (event := self._inbox.take(patient=patient)) is None:
            # A signal that comes just before a wait is acted on when it ends.
            with suppress(queue.Empty):
                self._bell.get(timeout=_SIGNAL_SECONDS)
        return event

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
        if hasattr(self, "_inbox"):
            self._end()


class AsyncStream(_Answer):
    """``Stream`` for asyncio: ``async for``, ``await output()``, ``await aclose()``."""

    def __init__(
        self,
        thread: EngineThread,
        tokenizer: Tokenizer,
        request_id: str,
        prompt_ids: list[int],
        params: SamplingParams,
        calls: LoopCalls,
        adapter: Adapter | None = None,
        *,
        whole: bool = False,
    ) -> None:
        self._waiter: asyncio.Future[None] | None = None
        # Raises in the engine's thread where the loop was closed; the request is dropped then.
        ring = partial(calls.put, self._wake)
        super().__init__(thread, tokenizer, request_id, prompt_ids, params, ring, adapter, whole)

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Delta:
        if self._finish is not None:
            raise StopAsyncIteration
        return self._take(await self._next_event())

    async def output(self) -> Output:
        """Wait for the end; the whole answer, deltas taken before included."""
        while self._finish is None:
            self._add(await self._next_event(self._patient))
        return self._whole()

    async def _next_event(self, patient: bool = False) -> TokenEvent:
        try:
            while (event := self._inbox.take(patient=patient)) is None:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
        except asyncio.CancelledError:
            self._end()
            raise
        return event

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def aclose(self) -> None:
        self._end()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
