"""From settings to a running service: find the model, start the engines, make a first token."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from mini_sglang.api.loading import (
    FoundModel,
    Notify,
    find_model,
    load_core,
    named_adapters,
    prepare_quietly,
    read_model,
)
from mini_sglang.api.openai.models import names_of
from mini_sglang.api.placing import place
from mini_sglang.api.service import Service
from mini_sglang.api.warming import cache_file, fill_caches, warm_prefixes
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError

if TYPE_CHECKING:
    from mini_sglang.backend.grammar import GrammarCompiler
    from mini_sglang.engine.engine import EngineCore
    from mini_sglang.engine.handle import EngineHandle
    from mini_sglang.engine.pool import EnginePool
    from mini_sglang.engine.wire import Setup
    from mini_sglang.text.tokenizer import Tokenizer

# How long at most the preparation for grammars waits for an engine's first step, and how often it looks.
_FIRST_STEP_SECONDS = 10.0
_LOOK_SECONDS = 0.05

logger = logging.getLogger(__name__)

CHILD = "mini_sglang.api.starting:make_core"


async def open_service(settings: Settings, notify: Notify) -> Service:
    """A service of which an engine has made its first token.

    The model is looked for on the event loop, on which nothing else runs yet, so that Ctrl-C and SIGTERM
    end a download at once.

    Raises:
        MiniSglangError: the model cannot be had, no engine started, or none could make a token.
    """
    with _plain_signals():
        model = Model(settings, notify)
    pool = model.start_pool()
    try:
        with _closing_on_signals(pool):
            await asyncio.to_thread(pool.wait_ready)
            for adapter in model.adapters:
                await asyncio.to_thread(pool.adapters.load, adapter)
        # Some bounds follow from the number of engines.
        own = replace(settings, num_engines=model.num_engines)
        service = Service(own, model.tokenizer, pool, model.name, model.grammar_checker(pool))
        service.prepare_grammars()
    except BaseException:
        await asyncio.to_thread(pool.close)
        # The interpreter must not end under native code of theirs.
        await asyncio.to_thread(model.wait_prepared)
        raise
    return service


class Model:
    """A model on disk with its tokenizer, and how to start engines for it."""

    def __init__(self, settings: Settings, notify: Notify) -> None:
        self._model = find_model(settings, notify)
        self.name = self._model.files.name
        self.tokenizer: Tokenizer = self._model.tokenizer
        self._notify = notify
        # What can be known to be wrong before the weights are loaded.
        cache_file(settings, 0)
        warm_prefixes(self.tokenizer, settings)
        self._preparing: list[threading.Thread] = []
        self.adapters = named_adapters(settings, notify)
        for adapter in self.adapters:
            if adapter.name in names_of(self.name, settings):
                raise InvalidValueError("LORA_ADAPTERS", adapter.name, "names other than the model's own")
        # The engines load what was found here and ask no hub again.
        chosen = settings.chosen | {"model_local_dir"}
        own = replace(settings, model_local_dir=self._model.files.path, chosen=chosen)
        self._placement = place(own, self._model.files.path)
        self._settings = self._placement.settings

    @property
    def num_engines(self) -> int:
        return max(1, self._settings.num_engines)

    def start_pool(self) -> EnginePool:
        """Start the engines; each takes requests once it has made a token, after a restart too."""
        from mini_sglang.engine.canary import CanaryEngine
        from mini_sglang.engine.pool import EnginePool

        ids = self.tokenizer.encode("Hello") or [0]
        return EnginePool(
            lambda index: CanaryEngine(self._make_handle(index), ids, self._settings), self._settings
        )

    def grammar_checker(self, pool: EnginePool) -> GrammarCompiler:
        """Tries the grammars of requests in a process that can be killed, before an engine sees them."""
        from mini_sglang.backend.grammar import GrammarCompiler

        return GrammarCompiler(self.tokenizer.vocabulary, pool.info.vocab_size, pool.info.eos_ids)

    def wait_prepared(self) -> None:
        """Wait until no engine of this process prepares for grammars any more."""
        for thread in self._preparing:
            thread.join()

    def _make_handle(self, index: int) -> EngineHandle:
        if self._settings.engine_isolation == "thread":
            from mini_sglang.engine.worker import EngineThread

            def load() -> EngineCore:
                core, preparing = _load_served(self._model, self._settings, self._notify, index)
                self._preparing.append(preparing)
                return core

            return EngineThread(load)
        from mini_sglang.engine.process import ProcessEngine

        files = self._model.files
        return ProcessEngine(
            index,
            self._placement.settings_of_engine(),
            CHILD,
            num_engines=self.num_engines,
            description={"model": files.name, "source": files.source},
            notify=self._notify,
            environment=self._placement.environment(index),
        )


def make_core(settings: Settings, setup: Setup, notify: Notify) -> EngineCore:
    """The core of an engine's own process, of the model at ``settings.model_local_dir``.

    Raises:
        ModelLoadError: it is damaged, incomplete or of a kind that is not supported.
    """
    from mini_sglang.backend.loading.source import ModelFiles

    path = settings.model_local_dir
    assert path is not None
    name, source = (str(setup.description[key]) for key in ("model", "source"))
    model = read_model(ModelFiles(path, name, source), settings)
    if setup.num_engines > 1:
        settings = _with_own_cores(settings, setup)
    return _load_served(model, settings, notify, setup.index)[0]


def _with_own_cores(settings: Settings, setup: Setup) -> Settings:
    """Keep this process to its part of the CPU: engines that each took all would wait for one another."""
    from mini_sglang.backend.openmp import sleeping_openmp

    with sleeping_openmp():
        from mini_sglang.backend.device import choose_device, choose_threads, keep_to_share

    threads = settings.num_threads or max(1, choose_threads(0) // setup.num_engines)
    if choose_device(settings.device).type == "cpu":
        cores = keep_to_share(setup.index, setup.num_engines, threads)
        logger.info("engine %d keeps to cores %s", setup.index, cores or "of all engines")
    return replace(settings, num_threads=threads)


def _load_served(
    model: FoundModel, settings: Settings, notify: Notify, index: int
) -> tuple[EngineCore, threading.Thread]:
    """A core, and the thread that prepares it for its first grammar."""
    sharing = max(1, settings.num_engines)
    # Grammars go unchecked here: the server has tried every one before it sends it.
    core, grammars = load_core(model, settings, notify, sharing=sharing, check_grammars=False)
    fill_caches(core, model.tokenizer, settings, notify, index)

    def prepare() -> None:
        # Nobody is served before the first step is done, so it has the cores to itself.
        deadline = time.monotonic() + _FIRST_STEP_SECONDS
        while not core.counters.steps and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        prepare_quietly(grammars)

    # Beside the steps after that, so that nobody waits: a large vocabulary's tree takes a while to build.
    preparing = threading.Thread(target=prepare, name="mini-sglang-prepare", daemon=True)
    preparing.start()
    return core, preparing


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
