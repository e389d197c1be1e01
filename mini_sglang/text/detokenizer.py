"""Token ids to text, a few at a time: the pieces join to exactly what decoding all ids at once gives.

How early text may be given depends on the tokenizer's decoder. Byte-level vocabularies give every character
with the token that completes it. SentencePiece-like ones decode a run of byte tokens as one unit, so
only the run is held until it is known to be broken or it ends. A decoder that is not known here goes
through a sliding window.
"""

from __future__ import annotations

import codecs
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from mini_sglang.text.decoder_stages import (
    Stage,
    byte_level_alphabet,
    byte_level_bytes,
    decoder_specs,
    stage_makers,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

logger = logging.getLogger(__name__)

_PLAIN_TRIES = 8


class Detokenizer(Protocol):
    """The text side of one answer. ``push`` any number of times, then ``finish`` once."""

    def push(self, ids: Iterable[int]) -> str:
        """Take the next token ids; give the text that is now certain, possibly none."""

    def finish(self) -> str:
        """The text still held, now that no more ids come."""


def detokenizer_factory(tokenizer: RustTokenizer) -> Callable[[], Detokenizer]:
    """How to make detokenizers for ``tokenizer``; they share one lazily filled table of its tokens.

    The text of a detokenizer joins to ``tokenizer.decode(ids, skip_special_tokens=True)``. Tokens must
    not be added to ``tokenizer`` afterwards.
    """
    table = TokenTable(tokenizer)
    specs = decoder_specs(tokenizer)
    if specs is not None and [spec["type"] for spec in specs] == ["ByteLevel"]:
        token_bytes = _TokenBytes(table)
        return lambda: _ByteLevelDetokenizer(token_bytes)
    makers = None if specs is None else stage_makers(specs)
    if makers is None:
        logger.warning("This tokenizer's decoder is not a known one; its text is streamed through a window.")
        return lambda: WindowedDetokenizer(tokenizer.decode)
    return lambda: _ChainDetokenizer(table, [make() for make in makers])


class TokenTable(dict[int, "str | None"]):
    """Token of each id met so far; ``None`` where decoding skips it: special tokens and unknown ids."""

    def __init__(self, tokenizer: RustTokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self._skipped = frozenset(token.content for token in added if token.special)

    def __missing__(self, token_id: int) -> str | None:
        token = self._tokenizer.id_to_token(token_id)
        if token in self._skipped:
            token = None
        self[token_id] = token
        return token


class _TokenBytes(dict[int, bytes]):
    def __init__(self, table: TokenTable) -> None:
        super().__init__()
        self._table = table
        self._byte_of = byte_level_alphabet()

    def __missing__(self, token_id: int) -> bytes:
        token = self._table[token_id]
        value = b"" if token is None else byte_level_bytes(token, self._byte_of)
        self[token_id] = value
        return value


class _ByteLevelDetokenizer:
    def __init__(self, token_bytes: Mapping[int, bytes]) -> None:
        self._token_bytes = token_bytes
        # Python's replacement of broken UTF-8 is that of Rust: one U+FFFD per maximal broken part.
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, ids: Iterable[int]) -> str:
        token_bytes = self._token_bytes
        return self._decode(b"".join([token_bytes[token_id] for token_id in ids]))

    def finish(self) -> str:
        return self._decode(b"", True)


class _ChainDetokenizer:
    """Runs tokens through the stages of a decoder, each of which holds back only what it must."""

    def __init__(self, table: TokenTable, stages: Sequence[Stage]) -> None:
        self._table = table
        self._stages = stages

    def push(self, ids: Iterable[int]) -> str:
        tokens = [token for token_id in ids if (token := self._table[token_id]) is not None]
        for stage in self._stages:
            if not tokens:
                break
            tokens = stage.push(tokens)
        return "".join(tokens)

    def finish(self) -> str:
        tokens: list[str] = []
        for stage in self._stages:
            tokens = (stage.push(tokens) if tokens else []) + stage.finish()
        return "".join(tokens)


class WindowedDetokenizer:
    """For any ``decode``: decodes a few of the last ids again and again and gives what they add.

    Exact wherever decoding looks back no further than the window; ``finish`` gives whatever of the whole
    text is then missing. Where the whole does not begin with what was sent, which cannot be taken back,
    a warning is logged and the window's last text is given.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._sent: list[str] = []
        self._window = 0
        self._read = 0
        self._next_try = 1

    def push(self, ids: Iterable[int]) -> str:
        self._ids.extend(ids)
        waiting = len(self._ids) - self._read
        if waiting < self._next_try:
            return ""
        known = self._decode(self._ids[self._window : self._read])
        text = self._decode(self._ids[self._window :])
        if len(text) <= len(known) or not text.startswith(known) or text.endswith("\ufffd"):
            # Tries grow rare while a window grows, which keeps the whole answer near linear time.
            self._next_try = waiting + 1 if waiting < _PLAIN_TRIES else 2 * waiting
            return ""
        self._window, self._read, self._next_try = self._read, len(self._ids), 1
        self._sent.append(text[len(known) :])
        return self._sent[-1]

    def finish(self) -> str:
        whole, sent = self._decode(self._ids), "".join(self._sent)
        if whole.startswith(sent):
            return whole[len(sent) :]
        logger.warning("The tokenizer decodes the whole answer differently from its parts; the parts stand.")
        known = self._decode(self._ids[self._window : self._read])
        return self._decode(self._ids[self._window :])[len(known) :]
