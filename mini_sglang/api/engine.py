"""The public ``Engine``: text at the edge, ids below."""

from __future__ import annotations

import asyncio
import itertools
import queue
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast, overload

from mini_sglang.api.loading import find_model, load_core, named_adapters
from mini_sglang.api.mailbox import LoopCalls
from mini_sglang.api.streams import AsyncStream, Stream
from mini_sglang.api.warming import fill_caches
from mini_sglang.backend.lora.files import open_adapter
from mini_sglang.config import Settings
from mini_sglang.errors import EngineError, InvalidValueError
from mini_sglang.types import Adapter, FinishReason, Output, Prompt, SamplingParams, TokenEvent

if TYPE_CHECKING:
    from mini_sglang.text.tokenizer import Tokenizer


class Engine:
    """A language model that generates text for many callers at once.

        from mini_sglang import Engine, SamplingParams

        with Engine() as engine:                                    # the default model
            print(engine.generate("The capital of France is").text)
            params = SamplingParams(max_new_tokens=64, temperature=0.7, seed=1)
            for delta in engine.stream([{"role": "user", "content": "Tell me a joke."}], params):
                print(delta.text, end="", flush=True)

    A prompt is a text, a list of token ids, or a list of chat messages (``{"role": …, "content": …}``),
    which the model's chat template turns into ids. In a text, special tokens such as ``<|im_end|>``
    count as what they are; in a message they are plain text. Requests of all threads and event loops share
    one batch and one prefix cache; what a request answers does not depend on the others.

    Args:
        model: a Hugging Face repository, a local folder or a ``.gguf`` file; the default one if None.
        notify: called with one line for each stage of the start; silent by default.
        settings: any setting in lower case, ``Engine("folder", dtype="fp32", page_size_tokens=16)``;
            what is not given comes from its environment variable, then from the default.

    Raises:
        InvalidValueError: a setting that is unknown or out of range.
        ModelNotFoundError: no source has the model.
        ModelLoadError: its files are damaged, incomplete or of a kind that is not supported.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        notify: Callable[[str], None] | None = None,
        **settings: object,
    ) -> None:
        from mini_sglang.engine.worker import EngineThread

        if model is not None:
            settings = {**settings, "model": model}
        self.settings = Settings.resolve(settings)
        notify = notify or _silent
        found = find_model(self.settings, notify)
        self.tokenizer: Tokenizer = found.tokenizer
        notify(f"Loading {found.files.name} …")
        core, self._grammars = load_core(found, self.settings, notify)
        try:
            fill_caches(core, self.tokenizer, self.settings, notify)
            self._adapters = {adapter.name: adapter for adapter in named_adapters(self.settings, notify)}
            for adapter in self._adapters.values():
                core.adapters.load(adapter)
        except BaseException:
            self._grammars.close()
            core.release()
            raise
        self.description: dict[str, Any] = core.info.description
        self._thread = EngineThread(core)
        self._ids = itertools.count()
        self._loop_calls: LoopCalls | None = None  # of the loop that used the engine last

    # A str is itself a sequence of str; the first overload is the one that counts for it.
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str | Sequence[int], params: SamplingParams | None = None, *, lora: str | None = None
    ) -> Output: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        lora: str | None = None,
    ) -> Output: ...
    @overload
    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]] | Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[Output]: ...

    def generate(self, prompts: Any, params: Any = None, *, lora: Any = None) -> Any:
        """Answer one prompt, or many together; gives an ``Output`` or a list of them in order.

        Args:
            prompts: one prompt or a list of prompts.
            params: for all of them, or a list with one for each.
            lora: the name of a loaded adapter for all of them, or a list with one, or None, for each.

        Raises:
            InvalidValueError: a prompt or parameter that cannot be used; none is answered then.
            ContextLengthError: a prompt as long as the context window.
            EngineError: the engine failed under a request, or is closed.
        """
        many, pairs = _pair_up(prompts, params)
        streams: list[Stream] = []
        try:
            adapters = self._adapters_of(lora, len(pairs), many)
            requests = [(self.encode(prompt), one) for prompt, one in pairs]
            streams.extend(
                self._open(*pair, one, whole=True) for pair, one in zip(requests, adapters, strict=True)
            )
            outputs = [stream.output() for stream in streams]
        finally:
            for stream in streams:
                stream.close()
        return outputs if many else outputs[0]

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, lora: str | None = None
    ) -> Stream:
        """Answer one prompt as it is made: an iterator of ``Delta``.

        The last delta has ``finish_reason`` and ``usage``. Closing the iterator, or leaving its ``with``
        block, aborts the request. Raises as ``generate`` does, for bad input at once.
        """
        return self._open(self.encode(prompt), params or SamplingParams(), self._adapter(lora))

    @overload
    async def agenerate(  # type: ignore[overload-overlap]
        self,
        prompts: str | Sequence[int] | Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        lora: str | None = None,
    ) -> Output: ...
    @overload
    async def agenerate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]] | Sequence[Sequence[Mapping[str, Any]]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        lora: str | Sequence[str | None] | None = None,
    ) -> list[Output]: ...

    async def agenerate(self, prompts: Any, params: Any = None, *, lora: Any = None) -> Any:
        """``generate`` for asyncio; cancelling it aborts the requests."""
        many, pairs = _pair_up(prompts, params)
        streams: list[AsyncStream] = []
        try:
            adapters = self._adapters_of(lora, len(pairs), many)
            requests = [(await asyncio.to_thread(self._prepare, *pair), pair[1]) for pair in pairs]
            streams.extend(
                self._open_async(*pair, one, whole=True) for pair, one in zip(requests, adapters, strict=True)
            )
            outputs = [await stream.output() for stream in streams]
        finally:
            for stream in streams:
                await stream.aclose()
        return outputs if many else outputs[0]

    def astream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, lora: str | None = None
    ) -> AsyncStream:
        """``stream`` for asyncio: ``async for delta in engine.astream(prompt)``.

        A grammar that is new to the engine is compiled at once, on the loop; ``agenerate`` compiles in a
        thread.
        """
        return self._open_async(self.encode(prompt), params or SamplingParams(), self._adapter(lora))

    def load_lora(self, name: str, path: str | Path) -> None:
        """Load a LoRA adapter, a folder as PEFT saves it; ``lora=name`` then has requests run with it.

        Raises:
            InvalidValueError: a name that is none or is taken, no room, or an adapter of a kind that is not
                supported.
            ModelLoadError: the folder is incomplete or damaged, or made for another model.
        """
        adapter = open_adapter(name, Path(path).expanduser())
        core = self._thread.core
        if name in self._adapters:
            raise InvalidValueError("lora_name", name, "a name that no loaded adapter has")
        prepared = core.adapters.read(adapter)
        self._thread.call(lambda: core.adapters.attach(adapter, prepared))
        self._adapters[name] = adapter

    def unload_lora(self, name: str) -> None:
        """Take an adapter's name away; requests that run go on with it, and the last takes it along.

        Raises:
            InvalidValueError: there is no adapter of that name.
        """
        adapter = self._adapter(name)
        assert adapter is not None
        self._thread.call(lambda: self._thread.core.adapters.unload(adapter.key))
        self._adapters.pop(name, None)

    def insert_prefix(self, prefix: Prompt, *, lora: str | None = None) -> int:
        """Compute a prefix now, so that prompts that begin with it start faster; returns its tokens.

        For messages the prefix ends where the next message would begin, so a system prompt can be
        given alone.

        Raises:
            InvalidValueError: the prefix cache is off, or the prefix is longer than it takes.
        """
        ids = self.encode(prefix, add_generation_prompt=False)
        request = self._thread.core.make_prefix_request(self._next_id(), ids, adapter=self._adapter(lora))
        events: queue.SimpleQueue[TokenEvent] = queue.SimpleQueue()
        self._thread.submit(request, events.put)
        event = events.get()
        if event.finish is not FinishReason.STOP:
            raise EngineError(event.error or "the engine was closed")
        return len(ids)

    def save_prefix_cache(self, path: str | Path) -> int:
        """Write the prefix cache to a file, from which a later engine starts warm; returns its tokens.

        Requests wait meanwhile. A file that is there is replaced at once and only by a whole one.

        Raises:
            CacheFileError: it cannot be written, or there is a file that is no saved prefix cache.
            InvalidValueError: the prefix cache is off.
        """
        return self._thread.call(lambda: self._thread.core.cache.save(Path(path)))

    def load_prefix_cache(self, path: str | Path) -> int:
        """Add a saved prefix cache to what is cached, as far as there is room; returns the tokens added.

        Raises:
            CacheFileError: it is missing, damaged, or of another model, type or page size; nothing changes.
            InvalidValueError: the prefix cache is off.
        """
        return self._thread.call(lambda: self._thread.core.cache.load(Path(path)))

    def clear_cache(self) -> int:
        """Drop every cached prefix that no running request uses; returns the tokens dropped."""
        return self._thread.call(self._thread.core.cache.clear)

    def encode(self, prompt: Prompt, *, add_generation_prompt: bool = True) -> list[int]:
        """The token ids of a prompt, as ``generate`` would run them."""
        if isinstance(prompt, str) and prompt:
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, Sequence) and not isinstance(prompt, (bytes, bytearray)) and prompt:
            if all(isinstance(part, Mapping) for part in prompt):
                messages = cast("Sequence[Mapping[str, Any]]", prompt)
                return self.tokenizer.encode_chat(messages, add_generation_prompt=add_generation_prompt)
            if all(type(part) is int for part in prompt):
                return list(cast("Sequence[int]", prompt))
        allowed = "a non-empty text, a non-empty list of token ids, or a non-empty list of chat messages"
        raise InvalidValueError("prompt", prompt, allowed)

    def _prepare(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """``encode``, and compile the grammar, which is then at hand where nothing may wait for it."""
        if params.grammar is not None:
            self._grammars.new(params)
        return self.encode(prompt)

    def count_tokens(self, prompt: Prompt) -> int:
        return len(self.encode(prompt))

    def stats(self) -> dict[str, int]:
        """Counters and gauges of the engine: requests, steps, tokens, cache hits, pages."""
        return self._thread.call(self._thread.core.stats)

    def close(self) -> None:
        """Abort what runs and free the engine. Called by the ``with`` block; safe to call twice."""
        self._thread.close()
        self._grammars.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _next_id(self) -> str:
        return f"r{next(self._ids)}"

    def _adapter(self, name: str | None) -> Adapter | None:
        if name is None:
            return None
        adapter = self._adapters.get(name)
        if adapter is None:
            known = ", ".join(self._adapters) or "there is none"
            raise InvalidValueError("lora", name, f"the name of a loaded adapter ({known})")
        return adapter

    def _adapters_of(self, lora: Any, count: int, many: bool) -> list[Adapter | None]:
        names = [lora] * count if lora is None or isinstance(lora, str) else lora
        if not isinstance(names, Sequence) or len(names) != count or (names is lora and not many):
            raise InvalidValueError("lora", lora, f"one name, or a list of one for each of {count} prompts")
        return [self._adapter(name) for name in names]

    def _open(
        self, ids: list[int], params: SamplingParams, adapter: Adapter | None, *, whole: bool = False
    ) -> Stream:
        return Stream(self._thread, self.tokenizer, self._next_id(), ids, params, adapter, whole=whole)

    def _open_async(
        self, ids: list[int], params: SamplingParams, adapter: Adapter | None, *, whole: bool = False
    ) -> AsyncStream:
        loop, calls = asyncio.get_running_loop(), self._loop_calls
        if calls is None or calls.loop is not loop:
            calls = self._loop_calls = LoopCalls(loop)
        return AsyncStream(
            self._thread, self.tokenizer, self._next_id(), ids, params, calls, adapter, whole=whole
        )


def _pair_up(prompts: Any, params: Any) -> tuple[bool, list[tuple[Prompt, SamplingParams]]]:
    """Whether many prompts were given, and each with its parameters."""
    many = not isinstance(prompts, str) and (
        not isinstance(prompts, Sequence)
        or any(isinstance(part, (str, Sequence)) and not isinstance(part, Mapping) for part in prompts)
    )
    if many and not isinstance(prompts, Sequence):
        raise InvalidValueError("prompts", prompts, "a text, token ids, chat messages, or a list of these")
    if not many:
        prompts = [prompts]
    if params is None or isinstance(params, SamplingParams):
        params = [params or SamplingParams()] * len(prompts)
    if (
        not isinstance(params, Sequence)
        or len(params) != len(prompts)
        or not all(isinstance(one, SamplingParams) for one in params)
    ):
        allowed = f"one SamplingParams, or a list of one for each of the {len(prompts)} prompts"
        raise InvalidValueError("params", params, allowed)
    return many, list(zip(prompts, params, strict=True))


def _silent(line: str) -> None:
    """The default ``notify``."""
