"""What the command line needs of an engine; ``mini_sglang.Engine`` is one, the tests hand in another."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from mini_sglang.types import Delta, Output, Prompt, SamplingParams


class StreamFace(Protocol):
    """One answer as it is made."""

    def __next__(self) -> Delta: ...

    def __iter__(self) -> Iterator[Delta]: ...

    def output(self) -> Output: ...

    def close(self) -> None: ...


class EngineFace(Protocol):
    """The part of ``mini_sglang.Engine`` that the command line uses."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def description(self) -> Mapping[str, object]: ...

    def stream(self, prompt: Prompt, params: SamplingParams) -> StreamFace: ...

    def count_tokens(self, prompt: Prompt) -> int: ...

    def stats(self) -> Mapping[str, int | float | str]: ...

    def close(self) -> None: ...


class EngineFactory(Protocol):
    """Makes an engine: ``Engine`` itself, with ``model``, ``notify`` and settings as keywords."""

    def __call__(self, **keywords: Any) -> EngineFace: ...


def load_engine(**keywords: Any) -> EngineFace:
    """Import and start the real engine."""
    from mini_sglang import Engine

    # What an import makes stays: looking for garbage in it would take a third as long again as making it.
    gc.disable()
    try:
        return Engine(**keywords)
    finally:
        gc.freeze()
        gc.enable()


def has_chat_template(engine: EngineFace) -> bool:
    return engine.tokenizer.chat_template is not None


def token_text(engine: EngineFace, token_id: int) -> str:
    return str(engine.tokenizer.token_text(token_id))


def as_messages(text: str, system: str | None) -> Sequence[Mapping[str, str]]:
    """``text`` as the first user message of a conversation."""
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": text}]
