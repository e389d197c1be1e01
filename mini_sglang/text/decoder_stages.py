"""The decoders of the ``tokenizers`` library as stages that are fed token by token.

Each stage gives what its decoder gives for the whole list of tokens, and holds back only what a later token
could still change.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers.decoders import Decoder

# What Rust's u8::from_str_radix accepts between "<0x" and ">", its leading plus sign included.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")


class Stage(Protocol):
    """One decoder of a chain, fed at least one token at a time."""

    def push(self, tokens: list[str]) -> list[str]: ...

    def finish(self) -> list[str]: ...


def decoder_specs(tokenizer: RustTokenizer) -> list[dict[str, Any]] | None:
    """The decoder's parts as their JSON; none of them a sequence. ``None`` for one written in Python."""
    decoder = tokenizer.decoder
    if decoder is None:
        return []
    try:
        state = json.loads(decoder.__getstate__())
    except Exception:
        return None

    def flatten(spec: dict[str, Any]) -> list[dict[str, Any]]:
        if spec["type"] != "Sequence":
            return [spec]
        return [part for inner in spec["decoders"] for part in flatten(inner)]

    return flatten(state) or [{"type": "Fuse"}]


def stage_makers(specs: Sequence[dict[str, Any]]) -> list[Callable[[], Stage]] | None:
    """One factory per stage, or ``None`` where some part cannot be run token by token."""
    if not specs:
        return [_JoinWithSpaces]
    makers: list[Callable[[], Stage]] = []
    fused = False
    for position, spec in enumerate(specs):
        kind = spec["type"]
        if kind == "Fuse":
            fused = True
        elif kind == "Strip" and fused and spec["stop"] == 0:
            makers.append(partial(_StripStart, spec["content"], spec["start"]))
        elif fused:
            return None
        elif kind == "ByteLevel":
            fused = True
            makers.append(partial(_ByteLevel, byte_level_alphabet()))
        elif kind == "ByteFallback":
            makers.append(_ByteFallback)
        elif kind == "Replace" or (kind == "Strip" and spec["stop"] == 0):
            makers.append(partial(_EachToken, _decoder(spec)))
        elif kind in ("Metaspace", "WordPiece"):
            makers.append(partial(_EachToken, _decoder(spec), first_differs=True))
        elif kind == "BPEDecoder" and position == len(specs) - 1:
            makers.append(partial(_SuffixDecoder, _decoder(spec)))
        else:
            return None
    return makers


def _decoder(spec: Mapping[str, Any]) -> Decoder:
    from tokenizers import decoders

    # Restoring a pickled state gives the decoder the state names, whichever kind receives it.
    decoder = decoders.Fuse()
    decoder.__setstate__(json.dumps(spec).encode())
    return decoder


def byte_level_alphabet() -> dict[str, int]:
    """The byte each character stands for in a byte-level vocabulary (the scheme of OpenAI's GPT-2 encoder).

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100 and up, in order.
    """
    alphabet = {chr(byte): byte for byte in (*range(33, 127), *range(161, 173), *range(174, 256))}
    others = (byte for byte in range(256) if chr(byte) not in alphabet)
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


def byte_level_bytes(token: str, byte_of: Mapping[str, int]) -> bytes:
    """The bytes of one byte-level token; an added token with other characters is its own UTF-8."""
    try:
        return bytes([byte_of[char] for char in token])
    except KeyError:
        return token.encode()


class _EachToken:
    """A decoder that turns each token into text by itself, though it may treat the very first apart."""

    def __init__(self, decoder: Decoder, first_differs: bool = False) -> None:
        self._decoder = decoder
        self._first_differs = first_differs
        self._alone = True

    def push(self, tokens: list[str]) -> list[str]:
        texts = []
        for token in tokens:
            texts.append(self._decoder.decode([token] if self._alone else ["", token]))
            self._alone = not self._first_differs
        return texts

    def finish(self) -> list[str]:
        return []


class _SuffixDecoder:
    """A decoder under which only the last token differs from the others (a word's end is no space there)."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._last: str | None = None
        self._given = ""

    def push(self, tokens: list[str]) -> list[str]:
        texts = []
        for token in tokens:
            texts.extend(self._close(followed=True))
            within, at_end = self._decoder.decode([token, ""]), self._decoder.decode([token])
            self._last = token
            self._given = at_end if within.startswith(at_end) else ""
            texts.append(self._given)
        return texts

    def finish(self) -> list[str]:
        return self._close(followed=False)

    def _close(self, followed: bool) -> list[str]:
        if self._last is None:
            return []
        text = self._decoder.decode([self._last, ""] if followed else [self._last])
        self._last = None
        return [text[len(self._given) :]]


class _ByteFallback:
    """Runs of ``<0xNN>`` tokens: their text if the run is valid UTF-8, else one U+FFFD per byte."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._check = codecs.getincrementaldecoder("utf-8")("strict")
        self._text: list[str] = []
        self._num_bytes = 0
        self._broken = False

    def push(self, tokens: list[str]) -> list[str]:
        texts: list[str] = []
        for token in tokens:
            match = _BYTE_TOKEN.fullmatch(token)
            if match is None:
                texts.extend(self.finish())
                texts.append(token)
            elif self._broken:
                texts.append("\ufffd")
            else:
                self._num_bytes += 1
                try:
                    self._text.append(self._check.decode(bytes([int(match[1], 16)])))
                except UnicodeDecodeError:
                    # No later byte can mend the run, so it need not be held any longer.
                    self._broken = True
                    texts.extend("\ufffd" for _ in range(self._num_bytes))
        return texts

    def finish(self) -> list[str]:
        if self._broken or not self._num_bytes:
            texts = []
        elif self._check.getstate()[0]:
            texts = ["\ufffd"] * self._num_bytes
        else:
            texts = ["".join(self._text)]
        if self._num_bytes:
            self._restart()
        return texts


class _ByteLevel:
    def __init__(self, byte_of: Mapping[str, int]) -> None:
        self._byte_of = byte_of
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, tokens: list[str]) -> list[str]:
        return [self._decode(b"".join([byte_level_bytes(token, self._byte_of) for token in tokens]))]

    def finish(self) -> list[str]:
        return [self._decode(b"", True)]


class _StripStart:
    """Drops up to ``count`` leading ``char`` of the whole text."""

    def __init__(self, char: str, count: int) -> None:
        self._char = char
        self._left = count

    def push(self, tokens: list[str]) -> list[str]:
        text = "".join(tokens)
        start = 0
        while self._left and start < len(text):
            if text[start] != self._char:
                self._left = 0
                break
            start += 1
            self._left -= 1
        return [text[start:]]

    def finish(self) -> list[str]:
        return []


class _JoinWithSpaces:
    """What ``tokenizers`` does without a decoder."""

    def __init__(self) -> None:
        self._first = True

    def push(self, tokens: list[str]) -> list[str]:
        text = " ".join(tokens)
        if not self._first:
            text = " " + text
        self._first = False
        return [text]

    def finish(self) -> list[str]:
        return []
