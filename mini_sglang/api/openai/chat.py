"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from mini_sglang.api.openai.answer import AnswerParser, Whole, call_json, new_id
from mini_sglang.api.openai.calls import Piece
from mini_sglang.api.openai.choices import Plan, Step, UsageSum, capped_json, run, usage_json
from mini_sglang.api.openai.door import DONE, Call, Events, error_frame, sse
from mini_sglang.api.openai.forms import number_of
from mini_sglang.api.openai.logprobs import chat_logprobs
from mini_sglang.api.openai.messages import read_messages
from mini_sglang.api.openai.models import check_chat, check_model, shown_name, traits_of
from mini_sglang.api.openai.prompts import Conversation, make_conversation, reasoning_tokens
from mini_sglang.api.openai.tools import read_tools
from mini_sglang.errors import InvalidValueError
from mini_sglang.types import FinishReason, TokenLogprob

if TYPE_CHECKING:
    from mini_sglang.api.service import Service


class Chat:
    """The handler of chat completions."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._traits = traits_of(service.tokenizer)

    async def create(self, call: Call) -> dict[str, Any] | Events:
        """Answer one chat, whole or as a stream of chunks.

        Raises:
            RequestError, InvalidValueError, ContextLengthError: a body that cannot be answered.
            OverloadedError, UnavailableError: there is no place for it.
        """
        service = self._service
        values = call.values
        adapter = check_model(service, values)
        check_chat(service)
        chat, max_tokens = self._read(values)
        n = number_of(values, "n", 1)
        if n > service.settings.max_prompts_per_request:
            raise InvalidValueError("n", n, f"at most {service.settings.max_prompts_per_request}")
        plan = Plan(
            encode=lambda: _only(chat.encode(service)),
            prompts=1,
            params=chat.params,
            n=n,
            capped=max_tokens is not None,
            request_id=call.request_id,
            namespace=service.namespace(values.get("cache_salt"), call.tenant),
            adapter=adapter,
        )
        answer = _Answer(service, chat, shown_name(service, adapter))
        if not values.get("stream"):
            return await answer.whole(run(service, plan))
        include_usage = bool(values.get("stream_options", {}).get("include_usage"))
        return Events(answer.chunks(run(service, plan), include_usage), error_frame)

    def _read(self, values: Mapping[str, Any]) -> tuple[Conversation, int | None]:
        old, new = values.get("max_tokens"), values.get("max_completion_tokens")
        if old is not None and new is not None and old != new:
            raise InvalidValueError(
                "max_completion_tokens", new, "the same as max_tokens where both are given"
            )
        max_tokens = old if new is None else new
        chat = make_conversation(
            read_messages(values["messages"], developer=self._traits.takes_developer),
            values,
            read_tools(values.get("tools"), values.get("tool_choice"), values.get("parallel_tool_calls")),
            self._traits,
            format=values.get("response_format"),
            format_field="response_format",
            effort=values.get("reasoning_effort"),
            max_tokens=max_tokens,
            logprobs=values.get("logprobs", False),
        )
        return chat, max_tokens


class _Choice:
    """One of the answers while it is made."""

    def __init__(self, index: int, parser: AnswerParser) -> None:
        self.index = index
        self.parser = parser
        self.whole = Whole()
        self.begun = False
        self.logprobs: list[TokenLogprob] = []
        self.reasoning = ""
        self.called = False
        self.finish: FinishReason | None = None
        self.capped: dict[str, Any] = {}

    def take(self, step: Step) -> list[Piece]:
        """What a delta adds."""
        pieces = self.parser.push(step.delta.text)
        self.finish = step.delta.finish_reason
        self.capped = capped_json(step.delta.usage)
        if self.finish is not None:
            pieces += self.parser.finish()
        self.logprobs.extend(step.logprobs)
        for piece in pieces:
            if piece.kind == "reasoning":
                self.reasoning += piece.text
            elif piece.kind == "call":
                self.called = True
        return pieces

    def finish_reason(self, called: bool) -> str | None:
        if self.finish is None:
            return None
        return "tool_calls" if called and self.finish is FinishReason.STOP else str(self.finish)


class _Answer:
    """The answers to one chat, in the shapes of the API."""

    def __init__(self, service: Service, chat: Conversation, model: str) -> None:
        self.service = service
        self.chat = chat
        self._choices: dict[int, _Choice] = {}
        self._usage = UsageSum()
        self._head = {
            "id": new_id("chatcmpl-"),
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self, steps: AsyncGenerator[Step, None]) -> dict[str, Any]:
        async with aclosing(steps):
            async for step in steps:
                choice = self._choice(step)
                choice.whole.add(choice.take(step))
                self._usage.add(step)
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [self._message(choice) for _, choice in sorted(self._choices.items())],
            "usage": await self._usage_json(),
        }

    async def chunks(
        self, steps: AsyncGenerator[Step, None], include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        head: dict[str, Any] = {**self._head, "object": "chat.completion.chunk"}
        tail: dict[str, Any] = {"usage": None} if include_usage else {}
        async with aclosing(steps):
            async for step in steps:
                choice = self._choice(step)
                self._usage.add(step)
                deltas = self._deltas(choice, choice.take(step))
                frames = []
                for delta in deltas:
                    shown: dict[str, Any] = {
                        "index": choice.index,
                        "delta": delta,
                        # With the first piece that they may have made.
                        "logprobs": None if "role" in delta else self._logprobs(choice),
                        "finish_reason": None if delta else choice.finish_reason(choice.called),
                        **({} if delta else choice.capped),
                    }
                    frames.append(sse({**head, "choices": [shown], **tail}))
                if frames:
                    yield b"".join(frames)
        if include_usage:
            yield sse({**head, "choices": [], "usage": await self._usage_json()})
        yield DONE

    def _choice(self, step: Step) -> _Choice:
        if step.index not in self._choices:
            parser = self.chat.parser(self.service, step.job.ids)
            self._choices[step.index] = _Choice(step.index, parser)
        return self._choices[step.index]

    def _deltas(self, choice: _Choice, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
        """The deltas of one step; an empty one at the end carries the finish reason."""
        deltas: list[dict[str, Any]] = []
        if not choice.begun:
            choice.begun = True
            deltas.append({"role": "assistant", "content": ""})
        for piece in pieces:
            match piece.kind:
                case "content":
                    deltas.append({"content": piece.text})
                case "reasoning":
                    deltas.append({"reasoning_content": piece.text})
                case "call":
                    function = {"name": piece.name, "arguments": ""}
                    opened = {"id": new_id("call_"), "type": "function", "function": function}
                    deltas.append({"tool_calls": [{"index": piece.index, **opened}]})
                case "arguments":
                    more = {"index": piece.index, "function": {"arguments": piece.text}}
                    deltas.append({"tool_calls": [more]})
        if choice.finish is not None:
            deltas.append({})
        return deltas

    def _message(self, choice: _Choice) -> dict[str, Any]:
        whole = choice.whole
        message: dict[str, Any] = {
            "role": "assistant",
            "content": whole.content if whole.content or not whole.calls else None,
            "refusal": None,
        }
        if whole.reasoning:
            message["reasoning_content"] = whole.reasoning
        if whole.calls:
            message["tool_calls"] = [call_json(call) for call in whole.calls]
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(choice),
            "finish_reason": choice.finish_reason(bool(whole.calls)),
            **choice.capped,
        }

    def _logprobs(self, choice: _Choice) -> dict[str, Any] | None:
        """The logprobs not given yet."""
        params = self.chat.params
        if not params.logprobs or not (choice.logprobs or choice.finish):
            return None
        taken, choice.logprobs = choice.logprobs, []
        return {
            "content": chat_logprobs(self.service.tokenizer, taken, params.top_logprobs),
            "refusal": None,
        }

    async def _usage_json(self) -> dict[str, Any]:
        thinks = self.chat.traits.thinks
        thoughts = [choice.reasoning for choice in self._choices.values()]
        tokens = await reasoning_tokens(self.service, thoughts)
        return usage_json(self._usage.usage, tokens if thinks else None)


async def _only(ids: Awaitable[list[int]]) -> list[list[int]]:
    return [await ids]
