"""The native API: ``/generate``, ``/tokenize``, ``/detokenize``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mini_sglang.api.adapters import LORA_FIELDS, chosen_adapter
from mini_sglang.api.errors import Problem, problem_of
from mini_sglang.api.middleware import request_id_of, tenant_of
from mini_sglang.api.schemas import (
    CACHE_SALT,
    MAX_MESSAGES,
    AnyOf,
    Boolean,
    Field,
    Form,
    FreeObject,
    ListOf,
    Objects,
    Text,
    TokenIds,
    sampling_fields,
    sampling_from,
)
from mini_sglang.api.served import ServedStream
from mini_sglang.api.service import Service
from mini_sglang.api.streaming import JSON_LINES, SSE, StreamResponse, sse_event, unless_gone
from mini_sglang.errors import InvalidValueError
from mini_sglang.types import Delta, Output, Prompt, TokenLogprob, Usage

MAX_PROMPTS = 4096
MAX_DETOKENIZE = 1 << 20
_PROMPT_ALLOWED = "a non-empty text, a list of token ids, or a list of either"
_ONE = AnyOf((Text(least=1), TokenIds()), "a non-empty text or a list of token ids")
_MESSAGE = {
    "type": "object",
    "properties": {"role": {"type": "string"}, "content": {}},
    "required": ["role"],
}
_encode = msgspec.json.encode

GENERATE = Form(
    {
        "prompt": Field(
            AnyOf((*_ONE.kinds, ListOf(_ONE, MAX_PROMPTS, 1)), _PROMPT_ALLOWED),
            "the prompt as it is, a text or token ids; or a list of prompts",
        ),
        "messages": Field(
            Objects(MAX_MESSAGES, item=_MESSAGE),
            "a conversation instead of a prompt, laid out by the model's chat template",
        ),
        "chat_template_kwargs": Field(
            FreeObject(64), "with messages: further variables of the model's chat template", nullable=True
        ),
        "stream": Field(Boolean(), "send the answer as it is made, one JSON object a line", default=False),
        "return_token_ids": Field(Boolean(), "give the ids of the generated tokens too", default=False),
        "cache_salt": CACHE_SALT,
        **LORA_FIELDS,
        **sampling_fields(),
    },
    either=("prompt", "messages"),
)
TOKENIZE = Form(
    {
        "prompt": Field(Text(), "the text"),
        "messages": Field(Objects(MAX_MESSAGES, item=_MESSAGE), "a conversation instead of a text"),
        "add_special_tokens": Field(
            Boolean(),
            "begin with the model's beginning-of-text token, where its tokenizer does",
            default=True,
        ),
        "add_generation_prompt": Field(
            Boolean(), "with messages: end with the opening of the assistant's turn", default=True
        ),
    },
    either=("prompt", "messages"),
)
DETOKENIZE = Form(
    {
        "tokens": Field(TokenIds(MAX_DETOKENIZE), "token ids", required=True),
        "skip_special_tokens": Field(Boolean(), "leave special tokens out of the text", default=True),
    }
)


def routes(service: Service) -> list[Route]:
    """The routes of this API."""

    async def generate(request: Request) -> Any:
        return await _generate(service, request)

    async def tokenize(request: Request) -> Any:
        values = await service.read(TOKENIZE, await request.body())
        prompt = values["messages"] if "messages" in values else values["prompt"]
        template = {"add_generation_prompt": values.get("add_generation_prompt", True)}
        with service.reserve():
            if prompt == "":
                ids: list[int] = []
            else:
                special = values.get("add_special_tokens", True)
                ids = await service.encode(prompt, template=template, add_special=special)
        answer = {"tokens": ids, "count": len(ids), "max_model_len": service.info.context_length}
        return _json(answer)

    async def detokenize(request: Request) -> Any:
        values = await service.read(DETOKENIZE, await request.body())
        ids, skip = values["tokens"], values.get("skip_special_tokens", True)
        limit = service.info.vocab_size
        if max(ids) >= limit:
            raise InvalidValueError("tokens", max(ids), f"made of token ids from 0 to {limit - 1}")
        with service.reserve():
            text = await service.in_thread(lambda: service.tokenizer.decode(ids, skip_special=skip))
        return _json({"text": text})

    return [
        Route("/generate", generate, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the client wants in its lines."""

    request_id: str
    indexed: bool
    token_ids: bool
    logprobs: bool


async def _generate(service: Service, request: Request) -> Any:
    values = await service.read(GENERATE, await request.body())
    params = sampling_from(values)
    prompts, many = _prompts_of(values, service.settings.max_prompts_per_request)
    template = (
        {"template_kwargs": values["chat_template_kwargs"]} if "chat_template_kwargs" in values else None
    )
    request_id = request_id_of(request.scope)
    namespace = service.namespace(values.get("cache_salt"), tenant_of(request.scope))
    adapter = chosen_adapter(service, values)
    shape = _Shape(request_id, many, values.get("return_token_ids", False), params.logprobs)

    async def open_all() -> list[ServedStream]:
        streams: list[ServedStream] = []
        with service.reserve(len(prompts)) as ticket:
            try:
                for prompt in prompts:
                    stream = await service.open(
                        prompt,
                        params,
                        request_id=request_id,
                        namespace=namespace,
                        ticket=ticket,
                        template=template,
                        adapter=adapter,
                    )
                    streams.append(stream)
            except BaseException:
                for stream in streams:
                    await stream.aclose()
                raise
        return streams

    if not values.get("stream", False):
        return await unless_gone(request.receive, _whole(open_all, shape))
    wrap = _sse if "text/event-stream" in request.headers.get("accept", "") else _line
    return StreamResponse(
        _lines(open_all, shape, wrap),
        media_type=SSE if wrap is _sse else JSON_LINES,
        on_error=lambda problem: wrap(_error_event(problem, shape)),
        write_timeout=service.settings.write_timeout,
    )


async def _whole(open_all: Callable[[], Any], shape: _Shape) -> Response:
    streams = await open_all()
    try:
        answers = [
            _answer(await stream.output(), stream, shape, index) for index, stream in enumerate(streams)
        ]
    finally:
        for stream in streams:
            await stream.aclose()
    return _json({"outputs": answers, "request_id": shape.request_id} if shape.indexed else answers[0])


async def _lines(
    open_all: Callable[[], Any], shape: _Shape, wrap: Callable[[Any], bytes]
) -> AsyncGenerator[bytes, None]:
    streams = await open_all()
    try:
        if not shape.indexed:
            async for delta in streams[0]:
                for event in _events(delta, streams[0], shape, 0):
                    yield wrap(event)
        else:
            async for chunk in _interleaved(streams, shape, wrap):
                yield chunk
    finally:
        for stream in streams:
            await stream.aclose()


async def _interleaved(
    streams: Sequence[ServedStream], shape: _Shape, wrap: Callable[[Any], bytes]
) -> AsyncGenerator[bytes, None]:
    """The lines of several streams as they come; one that fails ends with its own error line."""
    # Of one place: while the client does not read, the streams gather what comes and nothing piles up here.
    queue: asyncio.Queue[bytes | None] = asyncio.Queue(1)

    async def pump(index: int, stream: ServedStream) -> None:
        try:
            async for delta in stream:
                for event in _events(delta, stream, shape, index):
                    await queue.put(wrap(event))
        except Exception as error:
            await queue.put(wrap(_error_event(problem_of(error), shape, index)))
        await queue.put(None)

    tasks = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(streams)]
    running = len(tasks)
    try:
        while running:
            chunk = await queue.get()
            if chunk is None:
                running -= 1
            else:
                yield chunk
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _events(delta: Delta, stream: ServedStream, shape: _Shape, index: int) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    if delta.text or (delta.token_ids and (shape.token_ids or shape.logprobs)):
        line: dict[str, Any] = {"text_delta": delta.text}
        if shape.token_ids:
            line["token_ids"] = delta.token_ids
        if shape.logprobs:
            line["logprobs"] = [_logprob(one) for one in delta.logprobs]
        events.append(line)
    if delta.finish_reason is not None:
        assert delta.usage is not None
        events.append({"event": "done", **_end(delta.finish_reason, delta.usage, stream, shape)})
    if shape.indexed:
        for event in events:
            event["index"] = index
    return events


def _answer(output: Output, stream: ServedStream, shape: _Shape, index: int) -> dict[str, Any]:
    answer: dict[str, Any] = {"text": output.text}
    if shape.token_ids:
        answer["token_ids"] = output.token_ids
    if shape.logprobs:
        answer["logprobs"] = [_logprob(one) for one in output.logprobs]
    answer |= _end(output.finish_reason, output.usage, stream, shape)
    if shape.indexed:
        answer["index"] = index
    return answer


def _end(finish: str, usage: Usage, stream: ServedStream, shape: _Shape) -> dict[str, Any]:
    end: dict[str, Any] = {
        "finish_reason": str(finish),
        "matched_stop": stream.matched_stop,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "cached_tokens": usage.cached_tokens,
        "max_new_tokens": stream.max_new_tokens,
        "max_new_tokens_capped": usage.capped_by,
        "seconds": round(time.perf_counter() - stream.started, 6),
        "request_id": shape.request_id,
    }
    if stream.prompt_logprobs:
        end["prompt_logprobs"] = [_logprob(one) for one in stream.prompt_logprobs]
    return end


def _error_event(problem: Problem, shape: _Shape, index: int | None = None) -> dict[str, Any]:
    event: dict[str, Any] = {
        "event": "error",
        "message": problem.message,
        "code": problem.code,
        "request_id": shape.request_id,
    }
    return event if index is None else event | {"index": index}


def _logprob(one: TokenLogprob) -> dict[str, Any]:
    return {"token_id": one.token_id, "logprob": one.logprob, "top": [list(pair) for pair in one.top]}


def _prompts_of(values: dict[str, Any], limit: int) -> tuple[list[Prompt], bool]:
    prompt = values["messages"] if "messages" in values else values["prompt"]
    if "chat_template_kwargs" in values and "messages" not in values:
        raise InvalidValueError("chat_template_kwargs", values["chat_template_kwargs"], "given with messages")
    if "messages" in values or isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt], False
    if len(prompt) > limit:
        allowed = f"a list of at most {limit} prompts (MAX_PROMPTS_PER_REQUEST)"
        raise InvalidValueError("prompt", f"{len(prompt)} prompts", allowed)
    return list(prompt), True


def _line(event: Any) -> bytes:
    return _encode(event) + b"\n"


def _sse(event: Any) -> bytes:
    return sse_event(_encode(event))


def _json(value: Any) -> Response:
    return Response(_encode(value), media_type="application/json")
