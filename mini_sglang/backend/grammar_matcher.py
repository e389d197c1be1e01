"""llguidance's matchers for our vocabularies: made here, for the engine and for the helper that checks.

numpy and torch stay out: the helper starts in a fraction of a second and stays small.
"""

from __future__ import annotations

import json
import random
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mini_sglang.errors import shorten

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# A single space, or a line end with its indentation: models that may add white space without end do.
_JSON_OPTIONS: dict[str, object] = {"whitespace_pattern": r" |\r?\n[ \t]{0,40}"}
_TRIED_TOKENS = 8
_TRIED_SECONDS = 0.05


def make_ll_tokenizer(
    tokens: Sequence[bytes], encode: Callable[[str], Sequence[int]] | None = None
) -> LLTokenizer:
    """llguidance's view of a vocabulary.

    Args:
        tokens: bytes of each id; empty for ids that a text may not hold.
        encode: ids of a text. Where a grammar leaves one text only, its tokens are the ones allowed;
            without ``encode``, those of the longest matches.

    Returns:
        A tokenizer of one id more than ``tokens``: the last one stands for the end of the text.
    """
    from llguidance import LLTokenizer

    return LLTokenizer(_Wrapper(tokens, encode))  # type: ignore[arg-type]


class _Wrapper:
    """What ``LLTokenizer`` wants of a tokenizer that is not one of its own."""

    is_tokenizer_wrapper = True

    def __init__(self, tokens: Sequence[bytes], encode: Callable[[str], Sequence[int]] | None) -> None:
        self.tokens = [*tokens, b"<|end of the text|>"]
        self.eos_token_id = len(tokens)
        self.bos_token_id = None
        self.special_token_ids = [len(tokens)]
        self._encode = encode
        self._ids: dict[bytes, int] = {}
        for token_id, token in enumerate(tokens):
            self._ids.setdefault(token, token_id)
        self._ids.pop(b"", None)
        self._longest = max(map(len, self._ids), default=1)

    def __call__(self, given: str | bytes) -> list[int]:
        data = given.encode() if isinstance(given, str) else given
        if self._encode is not None:
            ids = list(self._encode(data.decode("utf-8", "replace")))
            # A tokenizer may change its text (a space in front, Unicode forms); a grammar has no room for it.
            if b"".join(self.tokens[token_id] for token_id in ids) == data:
                return ids
        return self._longest_matches(data)

    def _longest_matches(self, data: bytes) -> list[int]:
        ids: list[int] = []
        start = 0
        while start < len(data):
            for end in range(min(len(data), start + self._longest), start, -1):
                token_id = self._ids.get(data[start:end])
                if token_id is not None:
                    ids.append(token_id)
                    start = end
                    break
            else:
                return ids  # a byte the vocabulary does not have
        return ids


def make_matcher(kind: str, text: str, tokenizer: LLTokenizer) -> tuple[LLMatcher | None, str | None]:
    """Compile a grammar of ``SamplingParams.grammar``; the matcher, or why there is none."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        if kind == "regex":
            grammar = LLMatcher.grammar_from_regex(_ascii_classes(text, {"d": "0-9"}))
        elif kind == "ebnf":
            grammar = LLMatcher.grammar_from_lark(any_to_lark(text))
        else:
            schema = json.dumps(_ascii_patterns(json.loads(text)), ensure_ascii=False)
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults=_JSON_OPTIONS)  # type: ignore[arg-type]
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_limits())
    except Exception as error:
        return None, str(error)
    return (None, matcher.get_error()) if matcher.is_error() else (matcher, None)


def _ascii_classes(regex: str, classes: Mapping[str, str]) -> str:
    """``regex`` with escapes such as ``\\d`` as ASCII ranges, inside brackets and outside.

    Unicode has 700 digits more, which a model that is held to digits may well choose.
    """
    parts: list[str] = []
    depth = 0
    at = 0
    while at < len(regex):
        char = regex[at]
        if char == "\\":
            ranges = classes.get(regex[at + 1 : at + 2])
            plain = regex[at : at + 2] if ranges is None else ranges
            parts.append(plain if ranges is None or depth else f"[{ranges}]")
            at += 2
            continue
        # Classes nest in this notation; a bracket right after the opening one is itself.
        if char == "[":
            depth += 1
        elif char == "]" and depth:
            depth -= 1
        parts.append(char)
        at += 1
    return "".join(parts)


def _ascii_patterns(schema: Any) -> Any:
    """A schema whose patterns mean by ``\\d`` and ``\\w`` what ECMAScript does."""
    if isinstance(schema, list):
        return [_ascii_patterns(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    changed: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("enum", "const", "default", "examples"):
            changed[key] = value
        elif key == "pattern" and isinstance(value, str):
            changed[key] = _ascii_classes(value, _ECMASCRIPT)
        elif key == "patternProperties" and isinstance(value, dict):
            changed[key] = {_ascii_classes(k, _ECMASCRIPT): _ascii_patterns(v) for k, v in value.items()}
        else:
            changed[key] = _ascii_patterns(value)
    return changed


_ECMASCRIPT: Mapping[str, str] = {"d": "0-9", "w": "A-Za-z0-9_"}


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=1000,
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=25_000,
        max_lexer_states=20_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def try_matcher(matcher: LLMatcher, num_ids: int) -> str | None:
    """Why answers could not be made with ``matcher`` at a bearable price, from the first few tokens of one.

    Uses up ``matcher``. ``num_ids``: ids of its tokenizer.
    """
    words = array("I", bytes(4 * (-(-num_ids // 32))))
    end_id = num_ids - 1
    draw = random.Random(0)
    for place in range(_TRIED_TOKENS):
        started = time.thread_time()
        matcher.unsafe_compute_mask_ptr(words.buffer_info()[0], 4 * len(words))
        seconds = time.thread_time() - started
        if matcher.is_error():
            return matcher.get_error() if place else "it allows no text at all"
        if seconds > _TRIED_SECONDS:
            return "it takes too long to tell which tokens may come next"
        allowed = [(index, word) for index, word in enumerate(words) if word]
        if not allowed:
            return "it comes to a point where none of the model's tokens may follow"
        index, word = draw.choice(allowed)
        token_id = 32 * index + draw.choice([bit for bit in range(32) if word >> bit & 1])
        if token_id == end_id or matcher.is_stopped():
            return None
        if not matcher.consume_token(token_id):
            return matcher.get_error()
    return None


def refusal(kind: str, reason: str) -> str:
    """The end of an ``InvalidValueError`` for a grammar that ``make_matcher`` or ``try_matcher`` refused."""
    wanted = _WANTED.get(kind, "a grammar that can be used")
    plain = " ".join(reason.replace("<non-verbose/>", "").split())
    return f"{wanted} ({shorten(plain)[1:-1]})" if plain else wanted


_WANTED: Mapping[str, str] = {
    "json_schema": "a JSON schema that can be compiled",
    "regex": "a regular expression that can be compiled",
    "ebnf": "a Lark or GBNF grammar that can be compiled",
}
