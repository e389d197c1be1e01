"""From settings to a running service: find the model, start the engines, make a first token."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from mini_sglang.api.loading import FoundModel, Notify, find_model, load_core, prepare_quietly, read_model
from mini_sglang.api.service import Service
from mini_sglang.api.warming import cache_file, fill_caches, warm_prefixes
from mini_sglang.config import Settings

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
        service = Service(settings, model.tokenizer, pool, model.name, model.grammar_checker(pool))
        service.prepare_grammars()
    except BaseException:
        await asyncio.to_thread(pool.close)
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
        # The engines load what was found here and ask no hub again.
        chosen = settings.chosen | {"model_local_dir"}
        self._settings = replace(settings, model_local_dir=self._model.files.path, chosen=chosen)

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

    def _make_handle(self, index: int) -> EngineHandle:
        if self._settings.engine_isolation == "thread":
            from mini_sglang.engine.worker import EngineThread

            return EngineThread(lambda: _load_served(self._model, self._settings, self._notify, index))
        from mini_sglang.engine.process import ProcessEngine

        files = self._model.files
        return ProcessEngine(
            index,
            self._settings,
            CHILD,
            num_engines=max(1, self._settings.num_engines),
            description={"model": files.name, "source": files.source},
            notify=self._notify,
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
    if settings.num_threads == 0 and setup.num_engines > 1:
        from mini_sglang.backend.device import choose_threads

        # Engines that each took every core would wait for one another at every step.
        settings = replace(settings, num_threads=max(1, choose_threads(0) // setup.num_engines))
    return _load_served(model, settings, notify, setup.index)


def _load_served(model: FoundModel, settings: Settings, notify: Notify, index: int) -> EngineCore:
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
    threading.Thread(target=prepare, name="mini-sglang-prepare", daemon=True).start()
    return core


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
