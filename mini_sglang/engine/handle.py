"""What an engine is to those above it, wherever it runs: in a thread here or in a child process.

A ``Work`` is checked before it is sent (``limits.make_work``) against the ``EngineInfo`` the engine gave
when it was ready, so that nothing that cannot run crosses to another process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from mini_sglang.types import Adapter, FinishReason, SamplingParams, TokenEvent

logger = logging.getLogger(__name__)

Sink = Callable[[TokenEvent], None]
"""Receives a request's events in order, in a thread of the engine's; quick, and does not raise."""

# Values of ``TokenEvent.error_kind``, where a request ends for a reason outside itself.
ENGINE_DIED = "engine_died"  # under this request: it ran there
NOT_STARTED = "not_started"  # the engine ended before it ran any of this request
TIMEOUT = "timeout"  # it waited QUEUE_TIMEOUT seconds for room
UNAVAILABLE = "unavailable"  # the server ends, or no engine is left
# ``backend.step.OUT_OF_MEMORY`` is one more: the device had no room for a step of it alone.


@dataclass(frozen=True, slots=True)
class Work:
    """One request as an engine needs it.

    Attributes:
        params: the caller's; its ``max_new_tokens`` is before the caps.
        max_new_tokens: after the caps of context and pool; 0 with ``prefill_only``.
        prefill_only: end when the prompt's KV is in the prefix cache, without a token.
        namespace: prefixes are shared only within one.
        seed: the caller's, or drawn where there is none.
        lora: ``Adapter.key`` of the adapter it runs with; empty is none. It is in ``namespace`` too.
        capped_by: why ``max_new_tokens`` is less than was asked for: "load", "context" or None.
        waited: seconds it waited before it was sent.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    max_new_tokens: int
    prefill_only: bool = False
    namespace: str = ""
    seed: int = 0
    lora: str = ""
    capped_by: str | None = None
    waited: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine says of itself when it is ready; it does not change.

    Attributes:
        description: for a reader: model, device, type, KV tokens, ….
        max_sequence_tokens: longest prompt and answer together: the context window, or the KV pool
            where that is smaller.
        page_size: tokens per KV page.
        kv_tokens: tokens the KV pool holds.
        shares_prefixes: whether prompts can start from what others have computed.
    """

    description: dict[str, str | int]
    eos_ids: tuple[int, ...]
    vocab_size: int
    context_length: int
    max_sequence_tokens: int
    page_size: int
    kv_tokens: int
    shares_prefixes: bool = True


class EngineHandle(Protocol):
    """An engine that may still be loading. Every method may be called from any thread.

    States: "starting", then "ready", then "dead" (``failure`` says why) or "closed". A request that was
    accepted gets exactly one event with ``finish``, also where the engine dies under it.
    """

    @property
    def info(self) -> EngineInfo:
        """Raises ``EngineError`` until the engine was ready once."""

    @property
    def state(self) -> str: ...

    @property
    def failure(self) -> str | None:
        """Why the engine is dead, as a sentence."""

    def watch(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` after each change of ``state`` from now on, in the engine's thread."""

    def submit(self, work: Work, sink: Sink) -> None:
        """Queue a request.

        Raises:
            EngineError: the engine is not ready, or no longer.
        """

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request; its terminal event says ``reason``. Does nothing where it has ended."""

    def stats(self) -> dict[str, int]:
        """Counters and gauges as last known; empty before the engine is ready. Never waits."""

    def load_adapter(self, adapter: Adapter, *, at_once: bool = False) -> Future[None]:
        """Load an adapter; the future fails with the reason where it cannot be.

        Args:
            at_once: before whatever is sent after it, though steps wait; else between two steps.
        """

    def unload_adapter(self, key: str) -> None:
        """Take no more requests with the adapter; it is freed when those that run have ended."""

    def kill(self, why: str) -> None:
        """Have the engine die at once, for the reason ``why``, and in a step too where it is a process."""

    def close(self) -> None:
        """Abort what runs, deliver the terminal events, free the engine. Safe to call twice."""


def call_sink(sink: Sink, event: TokenEvent) -> bool:
    """Hand over an event; False where the sink raised, so that its request is to be dropped."""
    try:
        sink(event)
    except Exception:
        logger.exception("the receiver of request %s failed; the request is dropped", event.request_id)
        return False
    return True


def call_watchers(watchers: Sequence[Callable[[], None]], who: str) -> None:
    """Tell those that ``EngineHandle.watch`` was given; one that raises keeps it from no other."""
    for callback in list(watchers):
        try:
            callback()
        except Exception:
            logger.exception("a watcher of %s failed", who)
