"""From an exception to what a client is told: a status, a code and a sentence, in the shape of each API."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from math import ceil
from typing import Any

import msgspec

from mini_sglang.errors import (
    ContextLengthError,
    EngineError,
    InvalidValueError,
    MiniSglangError,
    ModelLoadError,
    OverloadedError,
    UnavailableError,
)

logger = logging.getLogger(__name__)

MAX_MESSAGE_CHARS = 1000
_OPENAI_PREFIX = "/v1"


class RequestError(MiniSglangError):
    """A request that HTTP itself refuses: ``status`` and ``code`` say how.

    Args:
        field: the part of the request that is wrong, where there is one.
        allow: the methods the path takes, for 405.
    """

    def __init__(
        self, status: int, code: str, message: str, *, field: str | None = None, allow: str | None = None
    ) -> None:
        self.status = status
        self.code = code
        self.field = field
        self.allow = allow
        super().__init__(message)


class DeadlineError(MiniSglangError):
    """A request that ran longer than ``REQUEST_TIMEOUT``, or waited longer than ``QUEUE_TIMEOUT``."""


class ClientGoneError(MiniSglangError):
    """The client closed its connection; there is nobody to tell."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What a client is told. ``headers`` go with the response (``Retry-After``, ``Allow``)."""

    status: int
    code: str
    message: str
    field: str | None = None
    retry_after: float | None = None
    allow: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        headers: dict[str, str] = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, ceil(self.retry_after)))
        if self.allow is not None:
            headers["allow"] = self.allow
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["www-authenticate"] = "Bearer"
        return headers


def problem_of(error: BaseException) -> Problem:
    """How ``error`` is told. One that is not ours is logged whole and told as a bare 500."""
    match error:
        case RequestError():
            return Problem(error.status, error.code, _cut(error), error.field, allow=error.allow)
        case ContextLengthError():
            return Problem(400, "context_length_exceeded", _cut(error), error.field)
        case InvalidValueError():
            return Problem(400, "invalid_value", _cut(error), error.field)
        case OverloadedError():
            return Problem(429, "overloaded", _cut(error), retry_after=error.retry_after)
        case UnavailableError():
            return Problem(503, "unavailable", _cut(error), retry_after=error.retry_after)
        case DeadlineError():
            return Problem(504, "timeout", _cut(error))
        case EngineError():
            return Problem(500, "engine_error", _cut(error))
        case ModelLoadError():
            # Of a model that loaded: it has no chat template, or one that does not compile.
            return Problem(400, "not_supported", _cut(error))
        case MiniSglangError():
            return Problem(400, "invalid_request", _cut(error))
    logger.error("an unexpected error in the server", exc_info=error)
    return Problem(500, "internal_error", "The server met an unexpected error; its log has the details.")


def is_openai(path: str) -> bool:
    """Whether a path belongs to the OpenAI API, and its errors take that shape."""
    return path == _OPENAI_PREFIX or path.startswith(_OPENAI_PREFIX + "/")


def native_body(problem: Problem, request_id: str = "") -> dict[str, Any]:
    """``{"error": {"code", "message", "field"?, "request_id"?}}``"""
    error: dict[str, Any] = {"code": problem.code, "message": problem.message}
    if problem.field is not None:
        error["field"] = problem.field
    if request_id:
        error["request_id"] = request_id
    return {"error": error}


def openai_body(problem: Problem) -> dict[str, Any]:
    """``{"error": {"message", "type", "param", "code"}}`` as OpenAI's clients read it."""
    kinds: Mapping[int, str] = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(problem.status, "invalid_request_error" if problem.status < 500 else "server_error")
    return {"error": {"message": problem.message, "type": kind, "param": problem.field, "code": problem.code}}


def error_body(problem: Problem, path: str, request_id: str = "") -> bytes:
    """The JSON of a problem, in the shape of the API that ``path`` belongs to."""
    return msgspec.json.encode(openai_body(problem) if is_openai(path) else native_body(problem, request_id))


def _cut(error: BaseException) -> str:
    text = str(error)
    return text if len(text) <= MAX_MESSAGE_CHARS else text[:MAX_MESSAGE_CHARS] + "…"
