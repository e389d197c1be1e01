"""A client that keeps the books: every token that came, in which order, and how the answer ended."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.reliability.client import BrokenOffError, Exchange

PATHS = {"generate": "/generate", "completions": "/v1/completions", "chat": "/v1/chat/completions"}
# Of the tiny model's tokenizer: ids 0 to 2 are special, the rest bytes in the order of their stand-ins.
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_ESCAPED = re.compile(r"\\x([0-9a-f]{2})")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, for any of the three APIs.

    Attributes:
        prompts: texts or token ids, more than one as a list in one request; a chat has one text.
        seed: with ``temperature`` above 0 the same seed gives the same answer.
        told: ask for what tells the token ids: ``return_token_ids``, or logprobs in the OpenAI API.
        sse: have ``/generate`` stream server-sent events.
        extra: further fields, of the same name in every API.
    """

    api: str
    prompts: tuple[str | tuple[int, ...], ...]
    max_new: int
    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = True
    told: bool = True
    sse: bool = False
    extra: tuple[tuple[str, Any], ...] = ()

    @property
    def path(self) -> str:
        return PATHS[self.api]

    def body(self, *, stream: bool) -> dict[str, Any]:
        """What is sent."""
        shown: Any = list(self.prompts) if len(self.prompts) > 1 else self.prompts[0]
        common = {
            "temperature": self.temperature, "seed": self.seed, "ignore_eos": self.ignore_eos,
            "stream": stream, **dict(self.extra),
        }  # fmt: skip
        if self.api == "generate":
            return {**common, "prompt": shown, "max_new_tokens": self.max_new, "return_token_ids": self.told}
        common |= {"max_tokens": self.max_new}
        if stream:
            common["stream_options"] = {"include_usage": True}
        if self.api == "completions":
            return {**common, "prompt": shown, **({"logprobs": 0} if self.told else {})}
        return {
            **common, "messages": [{"role": "user", "content": shown}],
            **({"logprobs": True} if self.told else {}),
        }  # fmt: skip

    def reference(self, index: int) -> dict[str, Any]:
        """The same answer asked of the native API whole, with its ids."""
        body: dict[str, Any] = {
            "max_new_tokens": self.max_new, "temperature": self.temperature, "seed": self.seed,
            "ignore_eos": self.ignore_eos, "return_token_ids": True, **dict(self.extra),
        }  # fmt: skip
        if self.api == "chat":
            return {**body, "messages": [{"role": "user", "content": self.prompts[0]}]}
        return {**body, "prompt": self.prompts[index]}


@dataclass(slots=True)
class Answer:
    """What one answer of a response was made of. ``ids`` is None where the API was not asked to tell them."""

    text: str = ""
    ids: list[int] | None = None
    finishes: list[str] = field(default_factory=list)
    pieces: int = 0

    def add(self, text: str, ids: Sequence[int] | None) -> None:
        self.text += text
        if ids is not None:
            self.ids = [*(self.ids or ()), *ids]
        self.pieces += 1


@dataclass(slots=True)
class Entry:
    """One response in the ledger.

    Attributes:
        answers: by their index in the request.
        usages: each usage that came, as (prompt, completion, cached) tokens; of several answers summed up.
        errors: messages of error events.
        dones: ``[DONE]`` events.
        after: pieces that came after the last event there may be.
        broken: why the response ended before its end, or what in it could not be read.
        arrivals: when each piece with text or ids came, by ``time.perf_counter``.
    """

    ask: Ask
    streamed: bool
    status: int = 0
    retry_after: str | None = None
    answers: dict[int, Answer] = field(default_factory=dict)
    usages: list[tuple[int, int, int]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    dones: int = 0
    after: int = 0
    broken: str | None = None
    sent_at: float = 0.0
    ended_at: float = 0.0
    arrivals: list[float] = field(default_factory=list)

    @property
    def completion_tokens(self) -> int:
        return sum(usage[1] for usage in self.usages)

    @property
    def seconds(self) -> float:
        return self.ended_at - self.sent_at

    def answer(self, index: int) -> Answer:
        return self.answers.setdefault(index, Answer())

    def faults(self) -> list[str]:
        """What is wrong with it by itself, as sentences; none of a refusal."""
        if self.broken is not None:
            return [self.broken]
        if self.status != 200:
            return [] if self.status in (429, 503) else [f"status {self.status}"]
        found = [f"error event: {message}" for message in self.errors]
        if sorted(self.answers) != list(range(len(self.ask.prompts))):
            found.append(f"answers {sorted(self.answers)} for {len(self.ask.prompts)} prompts")
        for index, answer in self.answers.items():
            if len(answer.finishes) != 1 or answer.finishes[0] not in ("stop", "length"):
                found.append(f"answer {index} has finish reasons {answer.finishes}")
            if answer.finishes == ["length"] and self.ask.told and len(answer.ids or ()) != self.ask.max_new:
                found.append(f"answer {index} has {len(answer.ids or ())} tokens and ended by length")
        sse = self.streamed and self.ask.api != "generate"
        if self.dones != int(sse):
            found.append(f"{self.dones} [DONE] events")
        expected = len(self.ask.prompts) if self.ask.api == "generate" else 1
        if len(self.usages) != expected:
            found.append(f"{len(self.usages)} usages")
        if self.after:
            found.append(f"{self.after} events after the end")
        if self.ask.told and self.completion_tokens != sum(map(self._made, self.answers.values())):
            found.append(
                f"usage {self.completion_tokens}, came {sum(map(self._made, self.answers.values()))}"
            )
        return found

    def differences(self, index: int, reference: dict[str, Any]) -> list[str]:
        """Where the answer ``index`` is not the native API's whole answer."""
        answer, found = self.answers.get(index), []
        if answer is None:
            return ["it did not come"]
        if answer.text != reference["text"]:
            found.append(f"the text is another: {_where(answer.text, reference['text'])}")
        if answer.finishes != [reference["finish_reason"]]:
            found.append(f"finish {answer.finishes} for {reference['finish_reason']}")
        ids = list(reference["token_ids"])
        if self.ask.api != "generate" and reference["finish_reason"] == "stop":
            ids.pop()  # the OpenAI API leaves the token that ended it out
        if answer.ids is not None and answer.ids != ids:
            found.append(f"the ids are others: {_where(answer.ids, ids)}")
        return found

    def _made(self, answer: Answer) -> int:
        hidden = self.ask.api != "generate" and answer.finishes == ["stop"]
        return len(answer.ids or ()) + hidden


async def keep(port: int, ask: Ask, *, stream: bool = True) -> Entry:
    """Send a request and write down what comes, to its end; never raises for what the server does."""
    headers = {"Accept": "text/event-stream"} if ask.sse else {}
    entry = Entry(ask, stream)
    try:
        async with Exchange(port, ask.path, ask.body(stream=stream), headers=headers) as one:
            entry.sent_at = one.sent_at
            entry.status = await one.head()
            entry.retry_after = one.headers.get("retry-after")
            if entry.status != 200:
                entry.errors.append((await one.body()).decode(errors="replace")[:300])
            elif stream:
                await _stream(entry, one.pieces())
            else:
                _whole(entry, json.loads(await one.body()))
    except (BrokenOffError, OSError, TimeoutError) as error:
        entry.broken = f"{type(error).__name__}: {error}"
    except (ValueError, KeyError, TypeError) as error:
        entry.broken = f"it could not be read: {error!r}"
    entry.ended_at = time.perf_counter()
    return entry


async def _stream(entry: Entry, pieces: AsyncIterator[bytes]) -> None:
    native = entry.ask.api == "generate"
    read: Callable[[Entry, Any], bool] = _native_event if native else _openai_event
    sse = entry.ask.sse or not native
    end = b"\n\n" if sse else b"\n"
    rest = b""
    async for piece in pieces:
        now = time.perf_counter()
        *events, rest = (rest + piece).split(end)
        for event in events:
            data = event.removeprefix(b"data: ") if sse else event
            # Of several answers, one that failed does not end the others.
            if entry.dones or (entry.errors and len(entry.ask.prompts) == 1):
                entry.after += 1
            if data == b"[DONE]":
                entry.dones += 1
            elif read(entry, json.loads(data)):
                entry.arrivals.append(now)
    if rest:
        entry.broken = f"an event is not whole: {rest[:100]!r}"


def _native_event(entry: Entry, event: dict[str, Any]) -> bool:
    answer = entry.answer(event.get("index", 0))
    if answer.finishes:
        entry.after += 1
    if "text_delta" in event:
        answer.add(event["text_delta"], event.get("token_ids"))
        return True
    if event["event"] == "error":
        entry.errors.append(event["message"])
    else:
        _native_end(entry, answer, event)
    return False


def _native_end(entry: Entry, answer: Answer, end: dict[str, Any]) -> None:
    answer.finishes.append(end["finish_reason"])
    entry.usages.append((end["prompt_tokens"], end["completion_tokens"], end["cached_tokens"]))


def _openai_event(entry: Entry, event: dict[str, Any]) -> bool:
    if "error" in event:
        entry.errors.append(event["error"]["message"])
        return False
    if event.get("usage") is not None:
        _openai_usage(entry, event["usage"])
    came = False
    for choice in event["choices"]:
        answer = entry.answer(choice["index"])
        if answer.finishes or entry.usages:
            entry.after += 1
        text = choice["delta"].get("content", "") if "delta" in choice else choice["text"]
        ids = _openai_ids(choice)
        if text or ids:
            answer.add(text, ids)
            came = True
        if choice["finish_reason"] is not None:
            answer.finishes.append(choice["finish_reason"])
    return came


def _whole(entry: Entry, body: dict[str, Any]) -> None:
    if entry.ask.api == "generate":
        for output in body["outputs"] if len(entry.ask.prompts) > 1 else [body]:
            answer = entry.answer(output.get("index", 0))
            answer.add(output["text"], output.get("token_ids"))
            _native_end(entry, answer, output)
        return
    _openai_usage(entry, body["usage"])
    for choice in body["choices"]:
        answer = entry.answer(choice["index"])
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        answer.add(text or "", _openai_ids(choice))
        answer.finishes.append(choice["finish_reason"])


def _openai_usage(entry: Entry, usage: dict[str, Any]) -> None:
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    entry.usages.append((usage["prompt_tokens"], usage["completion_tokens"], cached))


def _openai_ids(choice: dict[str, Any]) -> list[int] | None:
    """The token ids that a choice's logprobs tell of; None where it has none."""
    logprobs = choice.get("logprobs")
    if logprobs is None:
        return None
    if "content" in logprobs:
        return [_id_of(bytes(one["bytes"])) for one in logprobs["content"]]
    return [_id_of(_unescaped(token)) for token in logprobs["tokens"]]


def _unescaped(token: str) -> bytes:
    match = _ESCAPED.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.encode()


def _id_of(token: bytes) -> int:
    return SPECIAL.index(token.decode()) if len(token) > 1 else len(SPECIAL) + _BYTE_ORDER[token[0]]


def _byte_order() -> dict[int, int]:
    """The place of each byte in a byte-level vocabulary that is sorted by stand-in character."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    stand_in = {byte: byte for byte in plain} | {byte: 256 + n for n, byte in enumerate(others)}
    return {byte: place for place, byte in enumerate(sorted(stand_in, key=stand_in.__getitem__))}


_BYTE_ORDER = _byte_order()


def _where(found: Sequence[Any], expected: Sequence[Any]) -> str:
    """The first place at which two sequences part."""
    pairs = zip(found, expected, strict=False)
    place = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(found), len(expected)))
    return f"from {place} on, lengths {len(found)} and {len(expected)}"
