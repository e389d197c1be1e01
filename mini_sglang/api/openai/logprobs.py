"""Logprobs in the shapes of the OpenAI API."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mini_sglang.types import TokenLogprob

if TYPE_CHECKING:
    from mini_sglang.text.tokenizer import Tokenizer

# JSON has no minus infinity; what a grammar or a bias has ruled out is told as this.
MIN_LOGPROB = -9999.0
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ESCAPED_BYTE = re.compile(rb"\\x([0-9a-f]{2})")


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], top: int) -> list[dict[str, Any]]:
    """One entry per token: ``token``, ``logprob``, ``bytes`` and the ``top`` most probable ones."""
    return [
        _entry(tokenizer, one.token_id, one.logprob)
        | {"top_logprobs": [_entry(tokenizer, *pair) for pair in one.top[:top]]}
        for one in logprobs
    ]


class TextLogprobs:
    """The parallel lists of the older completions: tokens, logprobs, alternatives, places in the text.

    Args:
        top: how many alternatives to give; with 0 their list is null.
    """

    def __init__(self, tokenizer: Tokenizer, top: int) -> None:
        self._tokenizer = tokenizer
        self._top = top
        self._detokenizer = tokenizer.detokenizer()
        self._offset = 0

    def shape(self, logprobs: Sequence[TokenLogprob | int]) -> dict[str, Any]:
        """The lists of the tokens that come next; a bare id is a token without a logprob."""
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for one in logprobs:
            token_id = one if isinstance(one, int) else one.token_id
            tokens.append(self._tokenizer.token_text(token_id))
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.push([token_id]))
            if isinstance(one, int):
                values.append(None)
                tops.append(None)
                continue
            values.append(max(one.logprob, MIN_LOGPROB))
            tops.append(
                {self._tokenizer.token_text(i): max(value, MIN_LOGPROB) for i, value in one.top[: self._top]}
            )
        return {
            "tokens": tokens,
            "token_logprobs": values,
            "top_logprobs": tops if self._top else None,
            "text_offset": offsets,
        }


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes a token stands for, also where they are only part of a character."""
    text = tokenizer.token_text(token_id)
    if match := _BYTE_TOKEN.fullmatch(text):
        return bytes([int(match[1], 16)])
    raw = text.encode()
    if b"\\x" in raw and "\ufffd" in tokenizer.decode([token_id], skip_special=False):
        return _ESCAPED_BYTE.sub(lambda match: bytes([int(match[1], 16)]), raw)
    return raw


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": max(logprob, MIN_LOGPROB),
        "bytes": list(token_bytes(tokenizer, token_id)),
    }
