"""An engine without a model, with the face of the real one. Words are tokens; ids are made on the way.

What the last user message says decides what happens, so that tests can steer it through a pipe or pty.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mini_sglang.config import Settings
from mini_sglang.errors import ContextLengthError, EngineError, ModelLoadError, ModelNotFoundError
from mini_sglang.types import Delta, FinishReason, Output, SamplingParams, TokenLogprob, Usage

CONTEXT = 60


class FakeTokenizer:
    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template
        self.words: list[str] = []

    def encode(self, text: str) -> list[int]:
        return [self._id(word) for word in text.split()]

    def token_text(self, token_id: int) -> str:
        return self.words[token_id]

    def _id(self, word: str) -> int:
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)


class FakeEngine:
    made: Callable[[FakeEngine], None] | None = None

    def __init__(
        self, model: str | None = None, *, notify: Callable[[str], None] | None = None, **settings: object
    ) -> None:
        given = settings if model is None else {**settings, "model": model}
        self.settings = Settings.resolve(given)
        self.given = given
        if notify is not None:
            notify(f"Loading {self.settings.model} …")
        if self.settings.model == "missing":
            raise ModelNotFoundError("missing was found in none of the places that were asked.")
        if self.settings.model == "broken":
            raise ModelLoadError("broken/model.safetensors ends after 12 of 4096 bytes.")
        if self.settings.model == "slow":
            _wait_a_minute()
        if self.settings.model == "bug":
            raise KeyError("rope_theta")
        self.tokenizer = FakeTokenizer(None if self.settings.model == "plain" else "{{ messages }}")
        self.description = {"model": self.settings.model, "device": "cpu"}
        self.calls: list[tuple[Any, SamplingParams]] = []
        self.seen: list[list[int]] = []
        self.aborted = 0
        self.closed = 0
        if FakeEngine.made is not None:
            FakeEngine.made(self)

    def encode(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode(" ".join(f"<{m['role']}> {m['content']}" for m in prompt) + " <go>")

    def count_tokens(self, prompt: str | Sequence[Mapping[str, str]]) -> int:
        return len(self.encode(prompt))

    def stream(self, prompt: Any, params: SamplingParams) -> FakeStream:
        ids = self.encode(prompt)
        if len(ids) >= CONTEXT:
            raise ContextLengthError("prompt", f"{len(ids)} tokens", f"shorter than {CONTEXT} tokens")
        self.calls.append(([dict(m) for m in prompt] if not isinstance(prompt, str) else prompt, params))
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        cached = max((_common(ids, other) for other in self.seen), default=0)
        self.seen.append(ids)
        return FakeStream(self, text, params, len(ids), cached)

    def stats(self) -> dict[str, int | float | str]:
        return {"requests": len(self.calls), "prefix_hit_tokens": 7}

    def close(self) -> None:
        self.closed += 1


class FakeStream:
    def __init__(
        self, engine: FakeEngine, text: str, params: SamplingParams, prompt_tokens: int, cached: int
    ) -> None:
        self._engine = engine
        self._params = params
        self._usage = (prompt_tokens, cached)
        self._count = 0
        self._stuck = False
        self._deltas = self._run(text)
        self._ended = False

    def _run(self, text: str) -> Iterator[Delta]:
        order, _, rest = text.partition(" ")
        self._stuck = order == "stuck"
        if order in ("hang", "stuck"):
            # As the real stream does in a long prefill.
            print("(hanging)", file=sys.stderr, flush=True)
            _wait_a_minute()
        if order == "silent":
            yield self._last(FinishReason.STOP)
            return
        words = [f"{word} " for word in text.split()]
        if order == "count":
            words = [f"w{i} " for i in range(int(rest))]
        elif order == "fickle":
            words = [f"run{len(self._engine.calls)} "]
        elif order == "escape":
            words = ["a\x1b[2Jb\r", "ü "]
        for i, word in enumerate(words[: self._params.max_new_tokens]):
            if order == "count":
                time.sleep(0.02)
            if order == "fail" and i == 1:
                raise EngineError("request r0 failed: out of memory")
            token_id = self._engine.tokenizer.encode(word)[0]
            self._count += 1
            entry = TokenLogprob(token_id, -0.25, ((token_id, -0.25),) * self._params.top_logprobs)
            yield Delta(word, (token_id,), (entry,) if self._params.logprobs else ())
        cut = len(words) > self._params.max_new_tokens
        yield self._last(FinishReason.LENGTH if cut else FinishReason.STOP)

    def _last(self, reason: FinishReason) -> Delta:
        return Delta("", (), finish_reason=reason, usage=Usage(self._usage[0], self._count, self._usage[1]))

    def __iter__(self) -> FakeStream:
        return self

    def __next__(self) -> Delta:
        delta = next(self._deltas)
        self._ended = delta.finish_reason is not None
        return delta

    def output(self) -> Output:
        entries = (TokenLogprob(0, -1.5),) if self._params.prompt_logprobs else ()
        return Output("", (), FinishReason.STOP, Usage(*self._usage, 0), prompt_logprobs=entries)

    def close(self) -> None:
        self._engine.aborted += not self._ended
        if self._stuck:
            print("(closing)", file=sys.stderr, flush=True)
            _wait_a_minute()
        self._ended = True


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    count = 0
    while count < min(len(a), len(b)) and a[count] == b[count]:
        count += 1
    return count


def _wait_a_minute() -> None:
    """Wait on a lock, for a while at a time: a signal just before a wait begins is handled after it."""
    for _ in range(120):
        threading.Event().wait(0.5)
