"""Streams as each kind of server writes them, from a list of what it made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PROMPT, CACHED = 11, 4


@dataclass(frozen=True)
class Piece:
    """Tokens that a server hands over together."""

    ids: tuple[int, ...]
    text: str


def messages(dialect: str, pieces: Sequence[Piece], finish: str = "length") -> list[bytes]:
    """One message for each piece, and the messages that end the stream, framed."""
    return [
        *(_FRAMES[dialect](one) for one in _pieces(dialect, pieces)),
        *(_FRAMES[dialect](one) for one in _ends(dialect, pieces, finish)),
    ]


def error_message(dialect: str, text: str) -> bytes:
    """What the server sends when it fails in the middle."""
    if dialect == "ours":
        return _line({"event": "error", "message": text, "code": "x", "request_id": "r"})
    if dialect == "ollama":
        return _line({"error": text})
    if dialect == "transformers":
        return _sse({"error": text})
    return _sse({"error": {"message": text, "code": 500}})


def _pieces(dialect: str, pieces: Sequence[Piece]) -> list[Any]:
    found: list[Any] = []
    ids: list[int] = []
    text = ""
    for piece in pieces:
        ids += piece.ids
        text += piece.text
        meta = {"id": "x", "finish_reason": None, "prompt_tokens": PROMPT, "completion_tokens": len(ids)}
        found.append(
            {
                "ours": {"text_delta": piece.text, "token_ids": list(piece.ids)},
                "openai": {
                    "choices": [{"index": 0, "text": piece.text, "finish_reason": None}],
                    "usage": None,
                },
                "openai-chat": {"choices": [{"index": 0, "delta": {"content": piece.text}}]},
                "vllm": {"choices": [{"index": 0, "text": piece.text, "token_ids": list(piece.ids)}]},
                "transformers": {"choices": [{"index": 0, "text": piece.text}]},
                "sglang": {"text": text, "output_ids": list(ids), "meta_info": meta},
                "sglang-deltas": {"text": piece.text, "output_ids": list(piece.ids), "meta_info": meta},
                "llama-server": {"content": piece.text, "tokens": list(piece.ids), "stop": False},
                "ollama": {"model": "m", "response": piece.text, "done": False},
            }[dialect]
        )
    if dialect.startswith("sglang"):
        # Its last piece says itself that it is the last.
        found[-1]["meta_info"] |= {"finish_reason": {"type": "length"}, "cached_tokens": CACHED}
    return (
        [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}, *found]
        if "chat" in dialect
        else found
    )


def _ends(dialect: str, pieces: Sequence[Piece], finish: str) -> list[Any]:
    made = sum(len(piece.ids) for piece in pieces)
    usage = {
        "prompt_tokens": PROMPT,
        "completion_tokens": made,
        "prompt_tokens_details": {"cached_tokens": CACHED},
    }
    empty: dict[str, Any] = {"index": 0, "finish_reason": finish}
    empty |= {"delta": {}} if "chat" in dialect else {"text": ""}
    return {
        "ours": [
            {
                "event": "done",
                "finish_reason": finish,
                "prompt_tokens": PROMPT,
                "completion_tokens": made,
                "cached_tokens": CACHED,
            }
        ],
        "openai": [{"choices": [empty]}, {"choices": [], "usage": usage}, "[DONE]"],
        "openai-chat": [{"choices": [empty]}, {"choices": [], "usage": usage}, "[DONE]"],
        "vllm": [{"choices": [empty | {"token_ids": []}]}, {"choices": [], "usage": usage}, "[DONE]"],
        # It knows neither a last message nor cached tokens.
        "transformers": [{"choices": [empty], "usage": {"prompt_tokens": PROMPT, "completion_tokens": made}}],
        "sglang": ["[DONE]"],
        "sglang-deltas": ["[DONE]"],
        "llama-server": [
            {
                "content": "",
                "tokens": [],
                "stop": True,
                "stop_type": "limit",
                "tokens_predicted": made,
                "tokens_evaluated": PROMPT,
                "timings": {"cache_n": CACHED},
            }
        ],
        "ollama": [
            {
                "response": "",
                "done": True,
                "done_reason": finish,
                "eval_count": made,
                "prompt_eval_count": PROMPT,
            }
        ],
    }[dialect]


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _sse(value: Any) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


_FRAMES = {
    name: _line if name in ("ours", "ollama") else _sse
    for name in (
        *("ours", "openai", "openai-chat", "vllm", "transformers"),
        *("sglang", "sglang-deltas", "llama-server", "ollama"),
    )
}
NAMES = tuple(_FRAMES)
CACHE_TOLD = tuple(name for name in NAMES if name not in ("transformers", "ollama"))
IDS_TOLD = ("ours", "vllm", "sglang", "sglang-deltas", "llama-server")


def spoken(name: str) -> str:
    """The dialect that reads this stream."""
    return name.removesuffix("-deltas")
