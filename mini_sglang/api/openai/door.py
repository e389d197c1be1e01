"""From an HTTP request to a handler and back, as JSON or as server-sent events."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mini_sglang.api.errors import Problem, RequestError, openai_body, problem_of
from mini_sglang.api.middleware import request_id_of, tenant_of
from mini_sglang.api.openai.params import shown_error
from mini_sglang.api.schemas import Form
from mini_sglang.api.streaming import SSE, StreamResponse, unless_gone
from mini_sglang.errors import ContextLengthError, InvalidValueError

if TYPE_CHECKING:
    from mini_sglang.api.service import Service

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Call:
    """One request: the checked fields of its body, the parameters of its path, and who it is from."""

    values: dict[str, Any]
    path: dict[str, Any]
    request_id: str
    tenant: str


@dataclass(frozen=True, slots=True)
class Events:
    """A streamed answer.

    Attributes:
        frames: server-sent events; what fails before the first has a status of its own.
        error: the frame that tells of a problem after that; nothing follows it.
    """

    frames: AsyncGenerator[bytes, None]
    error: Callable[[Problem], bytes]


Handler = Callable[[Call], Awaitable[dict[str, Any] | Events]]


def route(
    service: Service,
    method: str,
    path: str,
    handler: Handler,
    form: Form | None = None,
    *,
    prompt_field: str = "prompt",
) -> Route:
    """A route whose handler gets a checked request.

    Args:
        form: of the body; ``None`` where there is none to read.
        prompt_field: what the body calls the prompt, for the sentences of errors.
    """

    async def endpoint(request: Request) -> Any:
        try:
            values = {} if form is None else await service.read(form, await request.body())
            call = Call(values, request.path_params, request_id_of(request.scope), tenant_of(request.scope))
            answer = await unless_gone(request.receive, _await(handler(call)))
        except InvalidValueError as error:
            raise _told(service, error, prompt_field) from None
        if isinstance(answer, Events):
            return StreamResponse(
                _frames(service, answer.frames, prompt_field),
                media_type=SSE,
                on_error=answer.error,
                write_timeout=service.settings.write_timeout,
            )
        return Response(msgspec.json.encode(answer), media_type="application/json")

    return Route(path, endpoint, methods=[method])


def sse(data: object, event: str | None = None) -> bytes:
    """One server-sent event; JSON has no line ends of its own."""
    head = b"" if event is None else f"event: {event}\n".encode()
    return head + b"data: " + msgspec.json.encode(data) + b"\n\n"


def error_frame(problem: Problem) -> bytes:
    return sse(openai_body(problem))


async def _await(answer: Awaitable[dict[str, Any] | Events]) -> dict[str, Any] | Events:
    return await answer


async def _frames(
    service: Service, frames: AsyncGenerator[bytes, None], prompt_field: str
) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(frames):
            async for frame in frames:
                yield frame
    except InvalidValueError as error:
        raise _told(service, error, prompt_field) from None


def _told(service: Service, error: InvalidValueError, prompt_field: str) -> Exception:
    """The error in the words of this API."""
    shown = shown_error(error, prompt_field)
    if not isinstance(shown, ContextLengthError):
        return shown
    # Clients look for OpenAI's own words.
    limit = service.info.max_sequence_tokens
    problem = problem_of(shown)
    message = f"This model's maximum context length is {limit} tokens. {problem.message}"
    return RequestError(problem.status, problem.code, message, field=problem.field)
