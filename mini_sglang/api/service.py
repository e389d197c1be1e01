"""What every HTTP door uses: prompts in, streams of deltas out. There is no HTTP in it.

Everything here runs on one event loop, but for the text work, which has threads of its own, and
``LoopCalls.put``, which the engines' threads call.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar, cast

from mini_sglang.api.jsonbody import parse_json
from mini_sglang.api.loading import prepare_quietly
from mini_sglang.api.mailbox import LoopCalls
from mini_sglang.api.metrics import Metrics
from mini_sglang.api.schemas import Form
from mini_sglang.api.served import ServedStream
from mini_sglang.config import Settings
from mini_sglang.engine.limits import make_work
from mini_sglang.errors import EngineError, InvalidValueError, UnavailableError
from mini_sglang.types import Prompt, SamplingParams

if TYPE_CHECKING:
    from mini_sglang.backend.grammar import GrammarCompiler
    from mini_sglang.engine.flights import Ticket
    from mini_sglang.engine.handle import EngineInfo, Work
    from mini_sglang.engine.pool import EnginePool
    from mini_sglang.text.tokenizer import Tokenizer
    from mini_sglang.types import Adapter

TEXT_THREADS = 4
GRAMMAR_THREADS = 4
# What is done on the event loop, being quicker there than the way to a thread and back.
_INLINE_BYTES = 64 << 10
_INLINE_IDS = 2048
T = TypeVar("T")


class Service:
    """One model being served. Made on the event loop that will use it.

    Args:
        tokenizer: the model's; its work runs in ``TEXT_THREADS`` threads.
        pool: the engines; closed by ``close``.
        model_name: what the model is called to clients.
        grammars: tries the grammars of requests before they are sent; closed by ``close``. Without it the
            engines are the first to see them.

    Attributes:
        draining: whether the server is on its way out and takes nothing new.
    """

    def __init__(
        self,
        settings: Settings,
        tokenizer: Tokenizer,
        pool: EnginePool,
        model_name: str,
        grammars: GrammarCompiler | None = None,
    ) -> None:
        self.settings = settings
        self.tokenizer = tokenizer
        self.pool = pool
        self.model_name = model_name
        self.metrics = Metrics()
        self.started_at = time.time()
        self.draining = False
        self.loop_calls = LoopCalls(asyncio.get_running_loop())
        self._grammars = grammars
        self._threads = ThreadPoolExecutor(TEXT_THREADS, thread_name_prefix="mini-sglang-text")
        # Threads of their own: a compile may take a second, for which no prompt should wait.
        self._compilers = ThreadPoolExecutor(GRAMMAR_THREADS, thread_name_prefix="mini-sglang-grammars")
        self._ids = itertools.count()
        self._streams: set[ServedStream] = set()
        self._opening = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def info(self) -> EngineInfo:
        return self.pool.info

    @property
    def in_flight(self) -> int:
        """Requests whose end the engines have not confirmed yet."""
        return len(self._streams)

    @property
    def ready(self) -> bool:
        """Whether a request sent now would be served: an engine is there that has made a token."""
        return not self.draining and self.pool.ready

    def reserve(self, count: int = 1) -> Ticket:
        """Take ``count`` places before any work is done for them; ``release`` gives back what is left.

        Raises:
            OverloadedError: the queue is full.
            UnavailableError: the server is ending, or no engine is alive.
        """
        if self.draining:
            raise UnavailableError("The server is ending and takes no new requests.", retry_after=5.0)
        return self.pool.reserve(count)

    def namespace(self, cache_salt: str | None, tenant: str = "") -> str:
        """The part of the prefix cache that a request may share: one for each tenant and salt."""
        if not cache_salt and not tenant:
            return ""
        return hashlib.sha256(f"{tenant}\0{cache_salt or ''}".encode()).hexdigest()[:32]

    async def open(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str,
        namespace: str = "",
        ticket: Ticket | None = None,
        template: Mapping[str, Any] | None = None,
        adapter: Adapter | None = None,
    ) -> ServedStream:
        """Send one prompt to an engine.

        Args:
            request_id: for the logs; need not be unique, the engines get one made from it.
            ticket: a place from ``reserve``; without one, one is taken here. One of several places
                may be used for as many calls.
            template: ``tools`` and ``template_kwargs`` of ``Tokenizer.encode_chat``, for messages.
            adapter: that it runs with, one of ``pool.adapters``.

        Raises:
            InvalidValueError: a prompt, parameter or grammar that cannot be used.
            ContextLengthError: a prompt that does not fit.
            OverloadedError, UnavailableError: as ``reserve``.
            ModelLoadError: messages for a model without a chat template.
        """
        started = time.perf_counter()
        self._opening += 1
        self._idle.clear()
        try:
            stream = await self._open(
                prompt, params, request_id, namespace, ticket, template, started, adapter
            )
        finally:
            self._opening -= 1
            self._note_idle()
        stream.start(self.settings.request_timeout)
        return stream

    async def _open(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str,
        namespace: str,
        ticket: Ticket | None,
        template: Mapping[str, Any] | None,
        started: float,
        adapter: Adapter | None,
    ) -> ServedStream:
        own = self.reserve() if ticket is None else None
        place = cast("Ticket", ticket or own)
        try:
            work_id = f"{request_id}.{next(self._ids)}"
            info = self.info

            def prepare() -> Work:
                ids = self._ids_of(prompt, template or {})
                return make_work(
                    info,
                    self.settings,
                    work_id,
                    ids,
                    params,
                    namespace=namespace,
                    adapter=adapter,
                    inflight=place.inflight,
                )

            work = await self._run(prepare, small=_is_short_ids(prompt))
            if params.grammar is not None and self._grammars is not None:
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(self._compilers, self._grammars.new, params)
            stream = ServedStream(self, work, started)
            self._streams.add(stream)
            try:
                self.pool.submit(work, stream.sink, place)
            except BaseException:
                self.forget(stream)
                raise
        except EngineError as error:
            raise UnavailableError(f"No engine took the request: {error}", retry_after=1.0) from None
        finally:
            if own is not None:
                own.release()
        return stream

    async def encode(
        self, prompt: Prompt, *, template: Mapping[str, Any] | None = None, add_special: bool = True
    ) -> list[int]:
        """The token ids of a prompt, made in a thread; ids are given back as they are.

        Raises:
            InvalidValueError: it is none of a text, ids and messages, or is empty.
        """
        return await self.in_thread(lambda: self._ids_of(prompt, template or {}, add_special))

    def _ids_of(self, prompt: Prompt, template: Mapping[str, Any], add_special: bool = True) -> list[int]:
        if isinstance(prompt, str) and prompt:
            return self.tokenizer.encode(prompt, add_special=add_special)
        if isinstance(prompt, Sequence) and not isinstance(prompt, (str, bytes, bytearray)) and prompt:
            if isinstance(prompt[0], Mapping):
                messages = cast("Sequence[Mapping[str, Any]]", prompt)
                return self.tokenizer.encode_chat(messages, **template)
            return list(cast("Sequence[int]", prompt))
        allowed = "a non-empty text, a non-empty list of token ids, or a non-empty list of chat messages"
        raise InvalidValueError("prompt", prompt, allowed)

    def prepare_grammars(self) -> None:
        """Get ready for the first grammar in the background, so that its request need not wait for that."""
        if self._grammars is not None:
            self._compilers.submit(prepare_quietly, self._grammars)

    async def read(self, form: Form, body: bytes) -> dict[str, Any]:
        """A request body's checked fields; a large one is read in a thread. Raises as ``Form.read``."""
        return await self._run(lambda: form.read(parse_json(body)), small=len(body) <= _INLINE_BYTES)

    async def in_thread(self, function: Callable[[], T]) -> T:
        """Run text work away from the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def _run(self, function: Callable[[], T], *, small: bool) -> T:
        return function() if small else await self.in_thread(function)

    def forget(self, stream: ServedStream) -> None:
        """Called by a stream once the engine has confirmed its end."""
        self._streams.discard(stream)
        self._note_idle()

    def _note_idle(self) -> None:
        if not self._streams and not self._opening:
            self._idle.set()

    async def drain(self, timeout: float) -> bool:
        """Take nothing new and wait for what runs; past ``timeout`` seconds it is ended with an error.

        Returns whether everything ended by itself.
        """
        self.draining = True
        try:
            async with asyncio.timeout(timeout):
                await self._idle.wait()
        except TimeoutError:
            self.end_all()
            return False
        return True

    def end_all(self, message: str = "The server is ending.") -> None:
        """End every request now, each with an error."""
        self.draining = True
        for stream in list(self._streams):
            stream.fail(UnavailableError(message, retry_after=5.0))

    async def close(self, *, at_once: bool = False) -> None:
        """End what runs and close the engines, ``at_once`` even in the midst of a step."""
        self.end_all()
        await asyncio.to_thread(self.pool.kill if at_once else self.pool.close)
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._compilers.shutdown(wait=False, cancel_futures=True)
        if self._grammars is not None:
            await asyncio.to_thread(self._grammars.close)


def _is_short_ids(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and 0 < len(prompt) <= _INLINE_IDS and type(prompt[0]) is int
