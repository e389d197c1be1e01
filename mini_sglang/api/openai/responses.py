"""``/v1/responses``: the newer API, which can keep a conversation on the server."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from mini_sglang.api.errors import Problem, RequestError
from mini_sglang.api.openai.answer import Whole, new_id
from mini_sglang.api.openai.choices import Plan, Step, capped_json, run
from mini_sglang.api.openai.door import Call, Events
from mini_sglang.api.openai.logprobs import chat_logprobs
from mini_sglang.api.openai.messages import read_messages
from mini_sglang.api.openai.models import check_chat, check_model, shown_name, traits_of
from mini_sglang.api.openai.prompts import Conversation, make_conversation, reasoning_tokens
from mini_sglang.api.openai.response_events import EventWriter, answer_message, items_of
from mini_sglang.api.openai.response_items import chat_tools, input_messages
from mini_sglang.api.openai.store import ResponseStore
from mini_sglang.api.openai.tools import read_tools
from mini_sglang.errors import InvalidValueError
from mini_sglang.types import FinishReason, TokenLogprob, Usage

if TYPE_CHECKING:
    from mini_sglang.api.service import Service


class Responses:
    """The handlers of responses.

    Args:
        store: where responses are kept, for ``previous_response_id`` and for ``get``.
    """

    def __init__(self, service: Service, store: ResponseStore) -> None:
        self._service = service
        self._traits = traits_of(service.tokenizer)
        self._store = store

    async def create(self, call: Call) -> dict[str, Any] | Events:
        """Answer an input, whole or as a stream of events.

        Raises:
            RequestError, InvalidValueError, ContextLengthError: a body that cannot be answered.
            OverloadedError, UnavailableError: there is no place for it.
        """
        service, values = self._service, call.values
        adapter = check_model(service, values)
        check_chat(service)
        messages = self._history(values.get("previous_response_id"), call.tenant)
        messages += input_messages(values["input"])
        chat = self._read(messages, values)

        async def encode() -> list[list[int]]:
            return [await chat.encode(service)]

        plan = Plan(
            encode=encode,
            prompts=1,
            params=chat.params,
            n=1,
            capped="max_output_tokens" in values,
            request_id=call.request_id,
            namespace=service.namespace(values.get("cache_salt"), call.tenant),
            adapter=adapter,
        )
        keep = values.get("store", True) and self._store.on

        def done(response: dict[str, Any]) -> None:
            if keep:
                self._store.put(call.tenant, response, [*messages, answer_message(response["output"])])

        answer = _Answer(
            service, chat, _head(chat, values, stored=keep, model=shown_name(service, adapter)), done
        )
        if not values.get("stream"):
            return await answer.whole(run(service, plan))
        return Events(answer.events(run(service, plan)), answer.failed)

    async def get(self, call: Call) -> dict[str, Any]:
        found = self._store.get(call.tenant, call.path["id"])
        if found is None:
            raise self._unknown(404, call.path["id"], None)
        return found[0]

    async def delete(self, call: Call) -> dict[str, Any]:
        if not self._store.delete(call.tenant, call.path["id"]):
            raise self._unknown(404, call.path["id"], None)
        return {"id": call.path["id"], "object": "response", "deleted": True}

    def _history(self, previous: str | None, tenant: str) -> list[dict[str, Any]]:
        if previous is None:
            return []
        found = self._store.get(tenant, previous)
        if found is None:
            raise self._unknown(400, previous, "previous_response_id")
        return found[1]

    def _unknown(self, status: int, response_id: str, field: str | None) -> RequestError:
        if not self._store.on:
            message = "This server keeps no responses (RESPONSES_STORE_SIZE is 0)."
        else:
            message = f"There is no response {response_id[:100]!r} here, or no longer."
        return RequestError(
            status, "previous_response_not_found" if field else "not_found", message, field=field
        )

    def _read(self, messages: list[dict[str, Any]], values: Mapping[str, Any]) -> Conversation:
        shown = [*messages]
        if values.get("instructions"):
            shown.insert(0, {"role": "system", "content": values["instructions"]})
        if not shown:
            raise InvalidValueError("input", values["input"], "such that a message is in it")
        text, reasoning = values.get("text", {}), values.get("reasoning", {})
        _check_keys("text", text, ("format", "verbosity"))
        _check_keys("reasoning", reasoning, ("effort", "summary", "generate_summary"))
        if text.get("verbosity") not in (None, "medium"):
            raise InvalidValueError("text.verbosity", text["verbosity"], "medium, or left out")
        for name in ("summary", "generate_summary"):
            if reasoning.get(name) is not None:
                raise InvalidValueError(
                    f"reasoning.{name}", reasoning[name], "left out; thoughts are given as they are"
                )
        format, effort = text.get("format"), reasoning.get("effort")
        if format is not None and not isinstance(format, Mapping):
            raise InvalidValueError("text.format", format, '{"type": "text"}, json_object or json_schema')
        if effort is not None and not isinstance(effort, str):
            raise InvalidValueError("reasoning.effort", effort, "a text")
        return make_conversation(
            read_messages(shown, developer=self._traits.takes_developer),
            values,
            read_tools(
                chat_tools(values.get("tools", ())),
                values.get("tool_choice"),
                values.get("parallel_tool_calls"),
            ),
            self._traits,
            format=format,
            format_field="text.format",
            effort=effort,
            max_tokens=values.get("max_output_tokens"),
            logprobs="message.output_text.logprobs" in values.get("include", ()),
        )


class _Answer:
    """The answer to one request, in the shapes of the API."""

    def __init__(self, service: Service, chat: Conversation, head: dict[str, Any], done: Any) -> None:
        self._service = service
        self._chat = chat
        self._head = head
        self._done = done
        self._writer = EventWriter()
        self._reasoning_tokens = 0
        self._usage: Usage | None = None
        self._finish: FinishReason | None = None

    async def whole(self, steps: AsyncGenerator[Step, None]) -> dict[str, Any]:
        whole, logprobs, parser = Whole(), list[TokenLogprob](), None
        async with aclosing(steps):
            async for step in steps:
                parser = parser or self._chat.parser(self._service, step.job.ids)
                whole.add(parser.push(step.delta.text))
                logprobs += step.logprobs
                self._count(step)
        if parser is not None:
            whole.add(parser.finish())
        self._reasoning_tokens = await reasoning_tokens(self._service, [whole.reasoning])
        response = self._response(items_of(whole, self._logprobs(logprobs), self._status))
        self._done(response)
        return response

    async def events(self, steps: AsyncGenerator[Step, None]) -> AsyncGenerator[bytes, None]:
        writer, parser = self._writer, None
        logprobs: list[dict[str, Any]] = []
        async with aclosing(steps):
            async for step in steps:
                frames: list[bytes] = []
                if parser is None:
                    parser = self._chat.parser(self._service, step.job.ids)
                    begun = ("response.created", "response.in_progress")
                    frames += [writer.event(kind, response=self._response([])) for kind in begun]
                pieces = parser.push(step.delta.text)
                self._count(step)
                logprobs += self._logprobs(step.logprobs)
                if step.finished:
                    pieces += parser.finish()
                frames += writer.add(pieces, logprobs)
                if frames:
                    yield b"".join(frames)
        frames = writer.close(self._status)
        if not writer.items:
            # An answer without a word is a message all the same.
            frames = writer.add_empty(self._status)
        thoughts = [item["content"][0]["text"] for item in writer.items if item["type"] == "reasoning"]
        self._reasoning_tokens = await reasoning_tokens(self._service, thoughts)
        response = self._response(writer.items)
        self._done(response)
        frames.append(writer.event(f"response.{self._status}", response=response))
        yield b"".join(frames)

    def failed(self, problem: Problem) -> bytes:
        code = "rate_limit_exceeded" if problem.status == 429 else "server_error"
        response = self._response(self._writer.items) | {
            "status": "failed",
            "error": {"code": code, "message": problem.message},
        }
        return self._writer.event("response.failed", response=response)

    @property
    def _status(self) -> str:
        if self._finish is None:
            return "in_progress"
        return "incomplete" if self._finish is FinishReason.LENGTH else "completed"

    def _count(self, step: Step) -> None:
        self._usage = step.delta.usage
        self._finish = step.delta.finish_reason

    def _logprobs(self, logprobs: Any) -> list[dict[str, Any]]:
        return chat_logprobs(self._service.tokenizer, logprobs, self._chat.params.top_logprobs)

    def _response(self, output: list[dict[str, Any]]) -> dict[str, Any]:
        usage = None
        if self._usage is not None:
            made = self._usage.completion_tokens
            usage = {
                "input_tokens": self._usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": self._usage.cached_tokens},
                "output_tokens": made,
                "output_tokens_details": {"reasoning_tokens": self._reasoning_tokens},
                "total_tokens": self._usage.prompt_tokens + made,
            }
        incomplete = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        return self._head | {
            "status": self._status,
            "incomplete_details": incomplete,
            "output": output,
            "usage": usage,
            **capped_json(self._usage),
        }


def _head(chat: Conversation, values: Mapping[str, Any], *, stored: bool, model: str) -> dict[str, Any]:
    """What a response says from its beginning to its end."""
    return {
        "id": new_id("resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "error": None,
        "background": False,
        "instructions": values.get("instructions"),
        "max_output_tokens": values.get("max_output_tokens"),
        "metadata": values.get("metadata", {}),
        "model": model,
        "parallel_tool_calls": chat.tools.parallel,
        "previous_response_id": values.get("previous_response_id"),
        "reasoning": {"effort": values.get("reasoning", {}).get("effort"), "summary": None},
        "store": stored,
        "temperature": chat.params.temperature,
        "text": {"format": values.get("text", {}).get("format") or {"type": "text"}},
        "tool_choice": values.get("tool_choice", "auto"),
        "tools": values.get("tools", []),
        "top_logprobs": chat.params.top_logprobs,
        "top_p": chat.params.top_p,
        "truncation": "disabled",
        "user": values.get("user"),
    }


def _check_keys(field: str, value: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    for key in value:
        if key not in allowed:
            raise InvalidValueError(field, key, "made of " + ", ".join(allowed))
