"""An engine that must show it can make a token: a model may load, and a step return, and yet be of no use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from mini_sglang.backend.step import OUT_OF_MEMORY
from mini_sglang.config import Settings
from mini_sglang.engine.handle import EngineHandle, EngineInfo, Sink, Work, call_watchers
from mini_sglang.engine.limits import make_work
from mini_sglang.types import Adapter, FinishReason, SamplingParams, TokenEvent

CANARY = "(canary)"
"""The id of the request for a token, which no client can give, and its part of the prefix cache."""

# A canary fails with its batch where another request's step fails, so one alone says little.
_TRIES = 3


class CanaryEngine:
    """An ``EngineHandle`` over another one, which it asks for a token when that is newly ready.

    Until the token is there the state is "starting"; an engine that cannot make it is killed. It is asked
    again after a request failed there, and killed where it fails three times more: a device can be left in a
    state in which every step fails, and nothing but a new process helps.

    Args:
        engine: newly made.
        prompt_ids: what is asked.
        settings: of the engine.
    """

    def __init__(self, engine: EngineHandle, prompt_ids: Sequence[int], settings: Settings) -> None:
        self._engine = engine
        self._prompt_ids = tuple(prompt_ids)
        self._settings = settings
        self._lock = threading.Lock()
        self._asking = self._answered = False
        self._failures = 0
        self._watchers: list[Callable[[], None]] = []
        engine.watch(self._on_change)
        self._on_change()  # it may have been ready before it was watched

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def state(self) -> str:
        state = self._engine.state
        return "starting" if state == "ready" and not self._answered else state

    @property
    def failure(self) -> str | None:
        return self._engine.failure

    def watch(self, callback: Callable[[], None]) -> None:
        self._watchers.append(callback)

    def submit(self, work: Work, sink: Sink) -> None:
        def hear(event: TokenEvent) -> None:
            if event.finish is FinishReason.ERROR and event.error_kind in (None, OUT_OF_MEMORY):
                self._ask()
            sink(event)

        self._engine.submit(work, hear)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        self._engine.abort(request_id, reason)

    def stats(self) -> dict[str, int]:
        return self._engine.stats()

    def load_adapter(self, adapter: Adapter, *, at_once: bool = False) -> Future[None]:
        return self._engine.load_adapter(adapter, at_once=at_once)

    def unload_adapter(self, key: str) -> None:
        self._engine.unload_adapter(key)

    def kill(self, why: str) -> None:
        self._engine.kill(why)

    def close(self) -> None:
        self._engine.close()

    def _on_change(self) -> None:
        if self._engine.state == "ready" and not self._answered:
            self._ask()
        else:
            call_watchers(self._watchers, "a canary")

    def _ask(self) -> None:
        with self._lock:
            if self._asking:
                return
            self._asking = True
        try:
            params = SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True)
            info = self._engine.info
            work = make_work(info, self._settings, CANARY, self._prompt_ids, params, namespace=CANARY)
            self._engine.submit(work, self._hear)
        except Exception as error:
            self._fail(str(error))

    def _hear(self, event: TokenEvent) -> None:
        if event.finish is None:
            return
        if event.token_ids:
            first, self._answered = not self._answered, True
            self._failures = 0
            self._asking = False
            if first:
                call_watchers(self._watchers, "a canary")
        elif event.error_kind in (None, OUT_OF_MEMORY) and event.finish is FinishReason.ERROR:
            self._fail(event.error or "it does not say why")

    def _fail(self, why: str) -> None:
        self._failures += 1
        if self._answered and self._failures < _TRIES:
            self._asking = False
            self._ask()
        else:
            self._engine.kill(f"The model is loaded but cannot make a token: {why}")
