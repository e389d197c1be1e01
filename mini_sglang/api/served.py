"""One request as the HTTP floor sees it: token events from an engine's thread, deltas on the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import TYPE_CHECKING

from mini_sglang.api.errors import DeadlineError
from mini_sglang.api.streams import cache_figures
from mini_sglang.backend.step import OUT_OF_MEMORY
from mini_sglang.engine.handle import NOT_STARTED, TIMEOUT, UNAVAILABLE
from mini_sglang.errors import EngineError, OverloadedError, UnavailableError
from mini_sglang.text.stream import TextStream
from mini_sglang.types import Adapter, Delta, FinishReason, Output, TokenEvent, TokenLogprob, Usage

if TYPE_CHECKING:
    from mini_sglang.api.service import Service
    from mini_sglang.engine.handle import Work

logger = logging.getLogger(__name__)


class ServedStream:
    """An async iterator of ``Delta`` with one terminal delta, or one error.

    Events are turned into text as they come, so that a stop string ends the request however slowly
    this is read; what was not read yet is handed over as one delta. At most ``max_new_tokens`` tokens
    can wait here.

    Attributes:
        request_id: the engines' id of it, unique.
        max_new_tokens: what context and load left of the number asked for.
        capped_by: which of them made it less (``Usage.capped_by``).
        prompt_tokens: length of the prompt.
        matched_stop, prompt_logprobs: as in ``Output``; known at the end, and with the first delta.
    """

    def __init__(self, service: Service, work: Work, started: float) -> None:
        self._service = service
        self.request_id = work.request_id
        self.max_new_tokens = work.max_new_tokens
        self.capped_by = work.capped_by
        self.prompt_tokens = len(work.prompt_ids)
        self._lora = Adapter.name_in(work.lora)
        self.prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self.matched_stop: str | int | None = None
        self._text = TextStream(service.tokenizer, work.params)
        # What came and was not taken yet.
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._fresh = False
        self._num_tokens = 0
        self._finish: FinishReason | None = None
        self._error: Exception | None = None
        self._over = False
        self._confirmed = False
        self._usage: Usage | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.started = started
        self._first_at: float | None = None
        self._last_at = started
        self._logs = logger.isEnabledFor(logging.INFO)

    def start(self, timeout: float) -> None:
        """Begin to count against the deadline, ``timeout`` seconds after ``started``."""
        if self._finish is None:
            left = max(0.0, self.started + timeout - time.perf_counter())
            self._timer = asyncio.get_running_loop().call_later(left, self._expire, timeout)

    def sink(self, event: TokenEvent) -> None:
        """For the pool, from any thread; raises where the loop is closed."""
        self._service.loop_calls.put(partial(self.receive, event))

    def receive(self, event: TokenEvent) -> None:
        """One event, on the loop."""
        if event.finish is not None and not self._confirmed:
            self._confirmed = True
            self._service.forget(self)
        if self._finish is not None:
            return
        if event.error is not None or event.finish is FinishReason.ERROR:
            self._end(FinishReason.ERROR, event, _error_of(event))
            return
        if event.token_ids:
            self._note_time(len(event.token_ids))
            self._ids.extend(event.token_ids)
            self._logprobs.extend(event.logprobs)
            self._num_tokens += len(event.token_ids)
        if event.prompt_logprobs:
            self.prompt_logprobs = event.prompt_logprobs
        text = self._text.push(event)
        if text:
            self._texts.append(text)
        if self._logs:
            self._log_chunk(event, text)
        self._fresh = True
        if self._text.stopped and event.finish is not FinishReason.ABORT:
            if event.finish is None:
                self._service.pool.abort(self.request_id, FinishReason.STOP)
            self._end(FinishReason.STOP, event)
        elif event.finish is not None:
            self._end(event.finish, event)
        else:
            self._wake()

    def fail(self, error: Exception) -> None:
        """End it from our side, with ``error`` for whoever reads it."""
        if self._finish is None:
            self._service.pool.abort(self.request_id)
            self._end(FinishReason.ERROR, None, error)

    def __aiter__(self) -> ServedStream:
        return self

    async def __anext__(self) -> Delta:
        """The next delta.

        Raises:
            EngineError: the request failed in its engine.
            DeadlineError, OverloadedError, UnavailableError: it took too long, waited too long in the
                queue, or the server is ending.
        """
        if self._over:
            raise StopAsyncIteration
        if not self._fresh:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                self._abort()
                raise
            finally:
                self._waiter = None
        return self._take()

    async def output(self) -> Output:
        """Wait for the end; all that was not taken before as one. Raises as iterating does."""
        # Kept here and not by ``_take``: a stream's reader has what it took, and logprobs are large.
        texts: list[str] = []
        ids: list[int] = []
        logprobs: list[TokenLogprob] = []
        async for delta in self:
            texts.append(delta.text)
            ids.extend(delta.token_ids)
            logprobs.extend(delta.logprobs)
        assert self._finish is not None and self._usage is not None
        return Output(
            text="".join(texts),
            token_ids=tuple(ids),
            finish_reason=self._finish,
            usage=self._usage,
            logprobs=tuple(logprobs),
            prompt_logprobs=self.prompt_logprobs,
            matched_stop=self.matched_stop,
        )

    async def aclose(self) -> None:
        """Abort it if it still runs. Safe to call at any time."""
        self._abort()

    async def __aenter__(self) -> ServedStream:
        return self

    async def __aexit__(self, *error: object) -> None:
        self._abort()

    def _take(self) -> Delta:
        error = self._error
        if error is not None and not self._ids and not self._texts:
            self._over = True
            raise error
        text, ids, logprobs = "".join(self._texts), tuple(self._ids), tuple(self._logprobs)
        self._texts, self._ids, self._logprobs = [], [], []
        # With an error to come there is still something to take.
        self._fresh = error is not None
        if error is not None or self._finish is None:
            return Delta(text, ids, logprobs)
        self._over = True
        return Delta(text, ids, logprobs, self._finish, self._usage)

    def _abort(self) -> None:
        if self._finish is None:
            self._service.pool.abort(self.request_id)
            self._end(FinishReason.ABORT, None)

    def _expire(self, timeout: float) -> None:
        self.fail(DeadlineError(f"The request took longer than {timeout:g} seconds (REQUEST_TIMEOUT)."))

    def _end(self, finish: FinishReason, event: TokenEvent | None, error: Exception | None = None) -> None:
        """The one place where it ends for its reader; the engine's own end may come later."""
        self._finish = finish
        self._error = error
        self._fresh = True
        self.matched_stop = self._text.matched_stop
        cached = event.cached_tokens if event is not None else 0
        self._usage = Usage(self.prompt_tokens, self._num_tokens, cached, self.capped_by)
        if self._timer is not None:
            self._timer.cancel()
        self._report()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _note_time(self, tokens: int) -> None:
        now = time.perf_counter()
        if self._first_at is None:
            self._first_at = now
            self._service.metrics.ttft.observe(now - self.started)
        else:
            self._service.metrics.itl.observe((now - self._last_at) / tokens, tokens)
        self._last_at = now

    def _report(self) -> None:
        assert self._finish is not None and self._usage is not None
        seconds = time.perf_counter() - self.started
        usage, finish = self._usage, self._finish
        outcome = "timeout" if isinstance(self._error, DeadlineError) else str(finish)
        self._service.metrics.request(outcome, seconds, usage, self._lora)
        if self._logs:
            first = "-" if self._first_at is None else f"{self._first_at - self.started:.3f}"
            logger.info(
                "served request=%s reason=%s prompt=%d cached=%d tokens=%d seconds=%.3f ttft=%s "
                "tokens/s=%.1f prefix_hit_tokens=%d prefix_miss_tokens=%d prefill_cache=%s",
                self.request_id, outcome, usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens,
                seconds, first, usage.completion_tokens / max(seconds, 1e-9), *cache_figures(usage),
            )  # fmt: skip

    def _log_chunk(self, event: TokenEvent, text: str) -> None:
        for token_id in event.token_ids:
            token = self._service.tokenizer.token_text(token_id)
            logger.info("decode request=%s token=%d text=%r", self.request_id, token_id, token)
        if text:
            logger.info("chunk request=%s text=%r", self.request_id, text)


def _error_of(event: TokenEvent) -> Exception:
    message = event.error or "the request failed in its engine"
    if event.error_kind == TIMEOUT:
        return OverloadedError(message, retry_after=1.0)
    if event.error_kind in (UNAVAILABLE, NOT_STARTED, OUT_OF_MEMORY):
        return UnavailableError(message, retry_after=1.0)
    return EngineError(f"The request failed: {message}")
