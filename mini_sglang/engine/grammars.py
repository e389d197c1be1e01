"""Requests whose grammars are still being compiled: they wait here while the engine steps on."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

from mini_sglang.backend.step import GrammarFactory, TokenGrammar
from mini_sglang.engine.request import Request
from mini_sglang.errors import EngineError, MiniSglangError, shorten
from mini_sglang.types import SamplingParams

_THREADS = 2


class GrammarRoom:
    """Compiles in threads of its own. Used by the engine's thread alone.

    Args:
        factory: compiles; None refuses every grammar.
    """

    def __init__(self, factory: GrammarFactory | None) -> None:
        self._factory = factory
        self._threads: ThreadPoolExecutor | None = None
        self._waiting: dict[Request, Future[TokenGrammar]] = {}
        self._some_done = threading.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def make(self, params: SamplingParams) -> TokenGrammar | None:
        """The grammar of ``params``, compiled in the caller's thread; None where they have none.

        Raises:
            MiniSglangError: it cannot be used, or not now.
        """
        if params.grammar is None:
            return None
        if self._factory is None:
            raise EngineError("this engine was made without a compiler of grammars")
        return self._factory(params)

    def add(self, request: Request) -> None:
        """Begin to compile the grammar of ``request``."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="mini-sglang-grammar")
        future = self._threads.submit(self._compile, request.params)
        self._waiting[request] = future
        future.add_done_callback(lambda _: self._some_done.set())

    def remove(self, request: Request) -> bool:
        """Forget a request; whether it was here."""
        future = self._waiting.pop(request, None)
        if future is not None:
            future.cancel()
        return future is not None

    def compiled(self, wait: float = 0.0) -> list[tuple[Request, str | None]]:
        """Requests whose grammar is there, or failed, with a sentence where it failed; they stay here.

        Args:
            wait: seconds to wait at most for one.
        """
        if wait:
            self._some_done.wait(wait)
        self._some_done.clear()
        ready: list[tuple[Request, str | None]] = []
        for request, future in self._waiting.items():
            if not future.done():
                continue
            error = future.exception()
            if error is None:
                request.grammar = future.result()
            ready.append((request, None if error is None else _sentence(error)))
        return ready

    def _compile(self, params: SamplingParams) -> TokenGrammar:
        grammar = self.make(params)
        assert grammar is not None
        return grammar


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, MiniSglangError) else f"the grammar failed: {shorten(str(error))}"
