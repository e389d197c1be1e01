"""Requests with chosen figures."""

from __future__ import annotations

from typing import Any

from mini_sglang.bench.load.generator import Request


def request(number: int = 0, **fields: Any) -> Request:
    """One that was answered; ``fields`` say what is different."""
    plain: dict[str, Any] = {
        "id": number,
        "session": number,
        "turn": 0,
        "planned": 0.0,
        "sent": 0.0,
        "first_byte": None,
        "times": (1.0, 2.0),
        "counted": True,
        "asked_tokens": 2,
        "prompt_tokens": 10,
        "output_tokens": 2,
        "cached_tokens": None,
        "end": 2.0,
        "finish": "length",
        "error": None,
        "detail": "",
    }
    return Request(**{**plain, **fields})
