"""Every exception a user of mini-sglang can meet.

Each message is one sentence that names what was given and what is allowed; the command line prints it
and exits with status 2.
"""

from __future__ import annotations

_SHOWN_CHARS = 200


class MiniSglangError(Exception):
    """Base of all errors raised on purpose by this package."""


class InvalidValueError(MiniSglangError, ValueError):
    """A setting, sampling parameter or prompt that is not allowed.

    Args:
        field: what was set, as the user spells it (``max_new_tokens``, ``PAGE_SIZE_TOKENS``).
        value: what was given; shown shortened.
        allowed: what would be accepted, as the end of "…; it must be …".
    """

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field = field
        self.value = value
        self.allowed = allowed
        super().__init__(f"{field} is {shorten(value)}; it must be {allowed}.")


class ContextLengthError(InvalidValueError):
    """A prompt that does not fit the model's context window or the KV pool."""


class ModelNotFoundError(MiniSglangError):
    """No source could give the model that was asked for."""


class ModelLoadError(MiniSglangError):
    """The model was found but cannot be used: damaged, incomplete or unsupported."""


class CacheFileError(MiniSglangError):
    """A saved prefix cache that is missing, damaged, of another model, or cannot be written."""


class EngineError(MiniSglangError):
    """A request failed inside the engine, or the engine is no longer running."""


class BackendLostError(EngineError):
    """What runs an engine's steps is gone, one of several ranks say: the engine cannot go on."""


class OutOfMemoryError(EngineError):
    """A backend's step did not fit the device's memory; a smaller one may.

    Args:
        past_lost: whether the KV of the step's older positions went too, so that its sequences must be
            computed from their starts.
    """

    def __init__(self, message: str, *, past_lost: bool = False) -> None:
        self.past_lost = past_lost
        super().__init__(message)


class OverloadedError(MiniSglangError):
    """The queue is full; ``retry_after`` says in how many seconds a place may be free."""

    def __init__(self, message: str, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class UnavailableError(MiniSglangError):
    """No engine takes requests now: all are down, or the server is ending."""

    def __init__(self, message: str, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__(message)


def shorten(value: object) -> str:
    """``repr(value)``, cut to 200 characters, so that an error never echoes a huge input."""
    if isinstance(value, (list, tuple, dict, set)) and len(value) > 16:
        return f"a {type(value).__name__} of {len(value)} entries"
    if isinstance(value, str) and len(value) > _SHOWN_CHARS:
        return f"{value[:_SHOWN_CHARS]!r}… ({len(value)} characters)"
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes down
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"
