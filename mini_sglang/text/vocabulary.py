"""What each token of a tokenizer adds to the text of an answer, for grammars."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mini_sglang.errors import ModelLoadError
from mini_sglang.text.decoder_stages import byte_level_alphabet, byte_level_bytes, decoder_specs
from mini_sglang.types import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def vocabulary_of(tokenizer: RustTokenizer) -> Vocabulary:
    """The vocabulary of a byte-level or SentencePiece-like tokenizer.

    Raises:
        ModelLoadError: the text of its tokens depends on their neighbours: no grammar can be followed then.
    """
    specs = decoder_specs(tokenizer)
    reader = None if specs is None else _reader(specs)
    if reader is None:
        raise ModelLoadError("This model's tokenizer has a decoder under which no grammar can be followed.")
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    ids = tokenizer.get_vocab(with_added_tokens=True)
    tokens = [b""] * (max(ids.values(), default=-1) + 1)
    first: dict[int, bytes] = {}
    for token, token_id in ids.items():
        if token_id in special:
            continue
        tokens[token_id] = reader.later(token)
        at_start = reader.first(tokens[token_id])
        if at_start != tokens[token_id]:
            first[token_id] = at_start

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return Vocabulary(tuple(tokens), first, encode)


class _Reader:
    """Reads one token as its decoder does, in the middle of a text and at its start."""

    def __init__(self) -> None:
        self.byte_of: dict[str, int] | None = None
        self.byte_tokens = False
        self.replaced: list[tuple[str, str]] = []
        self.stripped: list[tuple[bytes, int]] = []

    def later(self, token: str) -> bytes:
        if self.byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for old, new in self.replaced:
            token = token.replace(old, new)
        return token.encode() if self.byte_of is None else byte_level_bytes(token, self.byte_of)

    def first(self, data: bytes) -> bytes:
        for char, count in self.stripped:
            for _ in range(count):
                data = data.removeprefix(char)
        return data


def _reader(specs: Sequence[dict[str, Any]]) -> _Reader | None:
    """A reader for the parts of a decoder; None where one of them is of another kind."""
    reader = _Reader()
    fused = False
    for spec in specs:
        kind = spec["type"]
        if kind == "ByteLevel" and not fused:
            reader.byte_of = byte_level_alphabet()
            fused = True
        elif kind == "Fuse":
            fused = True
        elif kind == "ByteFallback" and not fused:
            reader.byte_tokens = True
        elif kind == "Replace" and not fused and "String" in spec["pattern"]:
            reader.replaced.append((spec["pattern"]["String"], spec["content"]))
        elif kind == "Strip" and fused and spec["stop"] == 0:
            reader.stripped.append((spec["content"].encode(), spec["start"]))
        elif kind == "Metaspace" and not fused:
            reader.replaced.append((spec["replacement"], " "))
            if spec["prepend_scheme"] != "never":
                reader.stripped.append((b" ", 1))
        else:
            return None
    return reader if specs else None
