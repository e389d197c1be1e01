"""From settings to a running service: find the model, start the engines, make a first token."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from mini_sglang.api.service import Service
from mini_sglang.config import Settings
from mini_sglang.errors import EngineError

if TYPE_CHECKING:
    from mini_sglang.backend.grammar import GrammarCompiler
    from mini_sglang.engine.engine import EngineCore
    from mini_sglang.engine.handle import EngineHandle
    from mini_sglang.engine.pool import EnginePool
    from mini_sglang.engine.wire import Setup
    from mini_sglang.text.tokenizer import Tokenizer

CHILD = "mini_sglang.api.starting:make_core"
Notify = Callable[[str], None]


async def open_service(settings: Settings, notify: Notify) -> Service:
    """A service that has made its first token.

    The model is looked for on the event loop, on which nothing else runs yet, so that Ctrl-C and SIGTERM
    end a download at once.

    Raises:
        MiniSglangError: the model cannot be had, or no engine started.
    """
    with _plain_signals():
        model = Model(settings, notify)
    pool = model.start_pool()
    try:
        with _closing_on_signals(pool):
            await asyncio.to_thread(pool.wait_ready)
        service = Service(settings, model.tokenizer, pool, model.name, model.grammar_checker(pool))
        if not await service.try_canary():
            raise EngineError("The engine is ready, but a first token did not come.")
    except BaseException:
        await asyncio.to_thread(pool.close)
        raise
    return service


class Model:
    """A model on disk with its tokenizer, and how to start engines for it."""

    def __init__(self, settings: Settings, notify: Notify) -> None:
        from mini_sglang.backend.loading.source import resolve_model
        from mini_sglang.text.tokenizer import load_tokenizer

        files = resolve_model(settings, notify=notify)
        self.name = files.name
        self.tokenizer: Tokenizer = load_tokenizer(
            files.path, cache_dir=settings.cache_path, trust_remote_code=settings.trust_remote_code
        )
        self._notify = notify
        self._description: Mapping[str, str | int] = {"model": files.name, "source": files.source}
        # The engines load what was found here and ask no hub again.
        chosen = settings.chosen | {"model_local_dir"}
        self._settings = replace(settings, model_local_dir=files.path, chosen=chosen)

    def start_pool(self) -> EnginePool:
        from mini_sglang.engine.pool import EnginePool

        return EnginePool(self._make_handle, self._settings)

    def grammar_checker(self, pool: EnginePool) -> GrammarCompiler:
        """Tries the grammars of requests in a process that can be killed, before an engine sees them."""
        from mini_sglang.backend.grammar import GrammarCompiler

        return GrammarCompiler(self.tokenizer.vocabulary, pool.info.vocab_size, pool.info.eos_ids)

    def _make_handle(self, index: int) -> EngineHandle:
        settings, eos_ids = self._settings, tuple(sorted(self.tokenizer.eos_ids))
        if settings.engine_isolation == "thread":
            from mini_sglang.engine.worker import EngineThread

            def load() -> EngineCore:
                ends = frozenset(eos_ids)
                return load_core(settings, ends, self._description, self._notify, self.tokenizer)

            return EngineThread(load)
        from mini_sglang.engine.process import ProcessEngine

        return ProcessEngine(
            index,
            settings,
            CHILD,
            num_engines=max(1, settings.num_engines),
            eos_ids=eos_ids,
            description=self._description,
            notify=self._notify,
        )


def load_core(
    settings: Settings,
    eos_ids: frozenset[int],
    description: Mapping[str, str | int],
    notify: Notify,
    tokenizer: Tokenizer,
) -> EngineCore:
    """Load the weights of ``settings.model_local_dir`` into an engine.

    Raises:
        ModelLoadError: they are damaged, incomplete or of a kind that is not supported.
    """
    from mini_sglang.backend.grammar import GrammarCompiler
    from mini_sglang.backend.model_backend import load_backend
    from mini_sglang.engine.engine import EngineCore

    assert settings.model_local_dir is not None
    sharing = max(1, settings.num_engines)
    backend = load_backend(settings.model_local_dir, settings, notify=notify, sharing=sharing)
    all_eos_ids = frozenset(backend.eos_ids) | eos_ids
    # Unchecked here: the server has tried every grammar before it sends it.
    grammars = GrammarCompiler(tokenizer.vocabulary, backend.vocab_size, all_eos_ids, check=False)
    about = {**description, **backend.describe()}
    return EngineCore(backend, settings, all_eos_ids, about, grammars=grammars.new)


def make_core(settings: Settings, setup: Setup, notify: Notify) -> EngineCore:
    """``load_core`` in an engine's own process."""
    from mini_sglang.text.tokenizer import load_tokenizer

    folder = settings.model_local_dir
    assert folder is not None
    if settings.num_threads == 0 and setup.num_engines > 1:
        # Engines that each took every core would wait for one another at every step.
        settings = replace(settings, num_threads=max(1, _num_cores() // setup.num_engines))
    tokenizer = load_tokenizer(
        folder,
        cache_dir=settings.cache_path,
        trust_remote_code=settings.trust_remote_code,
    )
    return load_core(settings, frozenset(setup.eos_ids), setup.description, notify, tokenizer)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _plain_signals() -> Iterator[None]:
    """Let signals end the process as they do by default, whatever an ASGI server made of them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, signal.SIG_DFL),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _closing_on_signals(pool: EnginePool) -> Iterator[None]:
    """Let a signal give up engines that are still starting."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def close(number: int, frame: object) -> None:
        threading.Thread(target=pool.close, name="mini-sglang-give-up").start()

    previous = {number: signal.signal(number, close) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
