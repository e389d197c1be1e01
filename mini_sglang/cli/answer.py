"""Streaming one answer to standard output, and the figures about it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from mini_sglang.cli.face import EngineFace, token_text
from mini_sglang.cli.terminal import Interrupt, LeaveNow, Terminal
from mini_sglang.types import Delta, FinishReason, Prompt, SamplingParams, TokenLogprob, Usage


@dataclass(slots=True)
class Answer:
    """What came of one prompt. Times are in seconds after the prompt was handed to the engine."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    interrupted: bool = False
    first_tokens: int = 0
    first_after: float | None = None
    last_after: float | None = None

    def add(self, delta: Delta, seconds: float) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.usage = delta.usage or self.usage
        self.finish_reason = delta.finish_reason or self.finish_reason
        if delta.token_ids:
            if self.first_after is None:
                self.first_after, self.first_tokens = seconds, len(self.token_ids)
            self.last_after = seconds

    def figures(self) -> str:
        """One line: "42 tokens, 55.1 tokens/s, first after 0.12 s, 310 of 330 prompt tokens from cache".

        Tokens per second are those after the first, over the time from the first to the last.
        """
        count = self.usage.completion_tokens if self.usage else len(self.token_ids)
        parts = [f"{count} token{'' if count == 1 else 's'}"]
        if self.first_after is not None and self.last_after is not None:
            rest, seconds = len(self.token_ids) - self.first_tokens, self.last_after - self.first_after
            if rest and seconds > 0:
                parts.append(f"{rest / seconds:.1f} tokens/s")
            parts.append(f"first after {self.first_after:.2f} s")
        if self.usage:
            parts.append(f"{self.usage.cached_tokens} of {self.usage.prompt_tokens} prompt tokens from cache")
        if self.interrupted:
            parts.append("stopped")
        elif self.finish_reason is FinishReason.LENGTH:
            parts.append("cut at its length limit")
        return ", ".join(parts)


def stream_answer(engine: EngineFace, prompt: Prompt, params: SamplingParams, terminal: Terminal) -> Answer:
    """Write the answer's text to standard output as it comes, then a line end if it has none.

    Ctrl-C stops it: the answer so far is returned, marked as interrupted.

    Raises:
        MiniSglangError: the engine refuses the prompt or fails; what it gave before is already written.
        OutputClosedError: the reader of standard output has gone away.
    """
    answer = Answer()
    with Interrupt() as interrupt:
        start = time.perf_counter()
        deltas = engine.stream(prompt, params)
        try:
            while not interrupt.presses:
                interrupt.may_raise = True
                delta = next(deltas, None)
                interrupt.may_raise = False
                if delta is None:
                    break
                answer.add(delta, time.perf_counter() - start)
                if delta.text:
                    terminal.write(delta.text)
            if params.prompt_logprobs and answer.finish_reason is not None:
                answer.prompt_logprobs = deltas.output().prompt_logprobs
        except LeaveNow:
            raise
        except KeyboardInterrupt:
            pass
        finally:
            interrupt.may_raise = False
            deltas.close()
            if answer.text and not answer.text.endswith("\n"):
                terminal.write("\n")
    answer.interrupted = interrupt.presses > 0 and answer.finish_reason is None
    return answer


def say_logprobs(engine: EngineFace, answer: Answer, terminal: Terminal) -> None:
    """One line on standard error per token whose logprob was asked for."""
    for title, logprobs in (("prompt", answer.prompt_logprobs), ("answer", answer.logprobs)):
        for entry in logprobs:
            pairs = [(entry.token_id, entry.logprob), *entry.top]
            chosen, *top = (f"{token_text(engine, i)!r} ({i}) {logprob:.4f}" for i, logprob in pairs)
            terminal.say(f"{title} {chosen}" + (f"; most probable: {', '.join(top)}" if top else ""))


def say_pairs(pairs: Mapping[str, object], terminal: Terminal) -> None:
    """Names and values, one pair a line, the values under each other."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        terminal.say(f"{name:<{width}}  {value}")
