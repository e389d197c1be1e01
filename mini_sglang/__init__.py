"""mini-sglang: a minimal, streaming-first text generation stack.

    from mini_sglang import Engine, SamplingParams

Importing the package is cheap; the model code is loaded when an ``Engine`` is made.
"""

from __future__ import annotations

from mini_sglang.api.engine import Engine
from mini_sglang.api.streams import AsyncStream, Stream
from mini_sglang.config import VERSION, Settings
from mini_sglang.errors import (
    CacheFileError,
    ContextLengthError,
    EngineError,
    InvalidValueError,
    MiniSglangError,
    ModelLoadError,
    ModelNotFoundError,
)
from mini_sglang.types import Delta, FinishReason, Output, SamplingParams, TokenLogprob, Usage

__version__ = VERSION

__all__ = [
    "AsyncStream",
    "CacheFileError",
    "ContextLengthError",
    "Delta",
    "Engine",
    "EngineError",
    "FinishReason",
    "InvalidValueError",
    "MiniSglangError",
    "ModelLoadError",
    "ModelNotFoundError",
    "Output",
    "SamplingParams",
    "Settings",
    "Stream",
    "TokenLogprob",
    "Usage",
]
