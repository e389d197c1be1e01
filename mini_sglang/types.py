"""The values that travel between the floors: sampling parameters, token events, outputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from mini_sglang.errors import InvalidValueError

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20
MAX_NEW_TOKENS_LIMIT = 1_000_000
MAX_SCHEMA_CHARS = 1 << 18
MAX_SCHEMA_DEPTH = 64
MAX_REGEX_CHARS = 8192
MAX_EBNF_CHARS = 1 << 16
MAX_PRIORITY = 100
SPECULATIVE_CHOICES = ("on", "off", "prompt_lookup", "draft_model")


class FinishReason(StrEnum):
    """Why a request ended; each request ends in exactly one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


def _param(default: Any, help: str, metavar: str | None = None) -> Any:
    metadata = {"help": help, "metavar": metavar}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen. Validated when made, immutable after.

    The default is greedy: always the most probable token. ``temperature`` above 0 samples. Filters
    apply in the order temperature, top_k, top_p, min_p. Logprobs are those of the model's own
    distribution, before penalties, bias, temperature and filters.

    At most one of ``json_schema``, ``regex``, ``ebnf`` and ``json_object`` is set; the answer's text is then
    of that form, unless ``max_new_tokens``, a stop or an abort cuts it short. Here only sizes are checked;
    whether a grammar can be used is said when the request is made.

    Raises:
        InvalidValueError: a value is of the wrong type or out of its range.
    """

    max_new_tokens: int = _param(128, "tokens to generate at most")
    min_new_tokens: int = _param(0, "tokens to generate before end-of-text may end the answer")
    temperature: float = _param(0.0, "0 is greedy, up to 2.0 is wilder")
    top_k: int = _param(0, "sample from the k most probable tokens; 0 is all")
    top_p: float = _param(1.0, "sample from the smallest set of tokens with this total probability")
    min_p: float = _param(0.0, "drop tokens below this fraction of the most probable one's probability")
    repetition_penalty: float = _param(1.0, "above 1 divides down tokens seen in prompt or answer")
    presence_penalty: float = _param(0.0, "subtracted once from tokens already in the answer")
    frequency_penalty: float = _param(0.0, "subtracted per occurrence in the answer")
    logit_bias: Mapping[int, float] = _param(
        dict, 'added to the logits of single tokens, as JSON: {"42": -100}', "JSON"
    )
    seed: int | None = _param(None, "makes sampling repeatable; by default every request draws its own")
    stop: tuple[str, ...] = _param((), "strings that end the answer; they are not part of it", "TEXT")
    stop_token_ids: tuple[int, ...] = _param((), "token ids that end the answer", "ID")
    ignore_eos: bool = _param(False, "go on past end-of-text")
    logprobs: bool = _param(False, "return the logprob of each generated token")
    top_logprobs: int = _param(0, "with logprobs: also the n most probable tokens at each place")
    prompt_logprobs: bool = _param(False, "return the logprob of each prompt token too")
    json_schema: str | None = _param(None, "answer in JSON of this schema, itself given as JSON", "JSON")
    regex: str | None = _param(None, "answer with a text that this whole regular expression matches", "REGEX")
    ebnf: str | None = _param(None, "answer with a text of this grammar, in Lark or GBNF notation", "GRAMMAR")
    json_object: bool = _param(False, "answer with a JSON object")
    priority: int = _param(0, "who goes first where not all can: the higher; it never changes the answer")
    speculative: str | None = _param(
        None,
        "guess tokens ahead, which changes the speed and never the answer: on, off, prompt_lookup or "
        "draft_model; the SPECULATIVE setting where not given",
        "HOW",
    )

    def __post_init__(self) -> None:
        _check_int("max_new_tokens", self.max_new_tokens, 1, MAX_NEW_TOKENS_LIMIT)
        _check_int("min_new_tokens", self.min_new_tokens, 0, MAX_NEW_TOKENS_LIMIT)
        if self.min_new_tokens > self.max_new_tokens:
            raise InvalidValueError(
                "min_new_tokens", self.min_new_tokens, f"at most max_new_tokens, {self.max_new_tokens}"
            )
        self._number("temperature", 0.0, 2.0)
        _check_int("top_k", self.top_k, 0, 1 << 30)
        self._number("top_p", 0.0, 1.0, open_low=True)
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", 0.01, 10.0)
        self._number("presence_penalty", -2.0, 2.0)
        self._number("frequency_penalty", -2.0, 2.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -(1 << 63), (1 << 63) - 1)
        for name in ("ignore_eos", "logprobs", "prompt_logprobs", "json_object"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidValueError(name, getattr(self, name), "true or false")
        _check_int("priority", self.priority, -MAX_PRIORITY, MAX_PRIORITY)
        _check_int("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        if self.top_logprobs and not (self.logprobs or self.prompt_logprobs):
            raise InvalidValueError("top_logprobs", self.top_logprobs, "0 unless logprobs is on")
        self._normalise_stop()
        self._normalise_stop_token_ids()
        self._normalise_logit_bias()
        self._normalise_grammar()
        self._normalise_speculative()

    @property
    def grammar(self) -> tuple[str, str] | None:
        """The form the answer must have, as a parameter's name and text; ``None`` where any will do."""
        if self.json_object:
            return "json_object", '{"type":"object"}'
        given = (("json_schema", self.json_schema), ("regex", self.regex), ("ebnf", self.ebnf))
        return next(((name, text) for name, text in given if text is not None), None)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether the logits depend on which tokens came before, beyond the model itself."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def _number(self, name: str, low: float, high: float, open_low: bool = False) -> None:
        value = getattr(self, name)
        allowed = f"a number {'above' if open_low else 'from'} {low:g} {'up ' if open_low else ''}to {high:g}"
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InvalidValueError(name, value, allowed)
        # A NaN fails both comparisons; an integer may be past every float.
        if not low <= value <= high or (open_low and value == low):
            raise InvalidValueError(name, value, allowed)
        object.__setattr__(self, name, float(value))

    def _normalise_stop(self) -> None:
        stop: object = (self.stop,) if isinstance(self.stop, str) else self.stop
        allowed = f"up to {MAX_STOPS} non-empty strings of at most {MAX_STOP_CHARS} characters"
        if not isinstance(stop, (list, tuple)) or len(stop) > MAX_STOPS:
            raise InvalidValueError("stop", self.stop, allowed)
        for text in stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
                raise InvalidValueError("stop", text, allowed)
        object.__setattr__(self, "stop", tuple(stop))

    def _normalise_stop_token_ids(self) -> None:
        ids: object = self.stop_token_ids
        allowed = f"up to {MAX_STOP_TOKEN_IDS} token ids"
        if not isinstance(ids, (list, tuple, set, frozenset)) or len(ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidValueError("stop_token_ids", ids, allowed)
        for token_id in ids:
            _check_int("stop_token_ids", token_id, 0, (1 << 31) - 1)
        object.__setattr__(self, "stop_token_ids", tuple(ids))

    def _normalise_logit_bias(self) -> None:
        bias: object = self.logit_bias
        allowed = f"up to {MAX_LOGIT_BIAS} pairs of a token id and a number from -100 to 100"
        if not isinstance(bias, Mapping) or len(bias) > MAX_LOGIT_BIAS:
            raise InvalidValueError("logit_bias", bias, allowed)
        checked: dict[int, float] = {}
        for key, value in bias.items():
            if isinstance(key, str) and key.isdecimal() and len(key) < 11:
                key = int(key)
            _check_int("logit_bias", key, 0, (1 << 31) - 1)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not -100 <= value <= 100:
                raise InvalidValueError("logit_bias", value, allowed)
            checked[key] = float(value)
        object.__setattr__(self, "logit_bias", MappingProxyType(checked))

    def _normalise_speculative(self) -> None:
        given: object = self.speculative
        if isinstance(given, bool):
            given = "on" if given else "off"
        if given is not None and given not in SPECULATIVE_CHOICES:
            allowed = "true, false, or one of " + ", ".join(SPECULATIVE_CHOICES)
            raise InvalidValueError("speculative", given, allowed)
        object.__setattr__(self, "speculative", given)

    def _normalise_grammar(self) -> None:
        if self.json_schema is not None:
            object.__setattr__(self, "json_schema", _canonical_schema(self.json_schema))
        for name, longest in (("regex", MAX_REGEX_CHARS), ("ebnf", MAX_EBNF_CHARS)):
            text = getattr(self, name)
            if text is not None and not (isinstance(text, str) and 0 < len(text) <= longest):
                raise InvalidValueError(name, text, f"a text of 1 to {longest} characters")
            if text is not None and not _encodable(text):
                raise InvalidValueError(name, text, "text without lone surrogates (halves of UTF-16 pairs)")
        forms = ("json_schema", "regex", "ebnf", "json_object")
        names = [name for name in forms if getattr(self, name) not in (None, False)]
        if len(names) > 1:
            raise InvalidValueError(names[1], getattr(self, names[1]), f"unset where {names[0]} is set")


def sampling_param_names() -> tuple[str, ...]:
    return tuple(f.name for f in fields(SamplingParams))


def _canonical_schema(schema: object) -> str:
    """A schema, as an object or its JSON text, as compact JSON with its keys in the order given."""
    sizes = f"at most {MAX_SCHEMA_CHARS} characters of JSON, nested at most {MAX_SCHEMA_DEPTH} deep"
    allowed = f"a JSON schema, an object or its text, of {sizes}"
    value = schema
    if isinstance(value, str) and len(value) <= MAX_SCHEMA_CHARS:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InvalidValueError("json_schema", schema, allowed) from None
    if not isinstance(value, Mapping) or not _shallow(value):
        raise InvalidValueError("json_schema", schema, allowed)
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=dict)
    except (TypeError, ValueError, RecursionError):
        raise InvalidValueError("json_schema", schema, allowed) from None
    if len(text) > MAX_SCHEMA_CHARS or not _encodable(text):
        raise InvalidValueError("json_schema", schema, allowed)
    return text


def _shallow(value: object) -> bool:
    """Whether plain data is nested ``MAX_SCHEMA_DEPTH`` deep at most; one that holds itself is not."""
    level: list[object] = [value]
    for _ in range(MAX_SCHEMA_DEPTH):
        inner: list[object] = []
        for item in level:
            if isinstance(item, Mapping):
                inner.extend(item.values())
            elif isinstance(item, (list, tuple)):
                inner.extend(item)
            if len(inner) > MAX_SCHEMA_CHARS:
                return False
        level = inner
        if not level:
            return True
    return False


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidValueError(name, value, f"a whole number from {low} to {high}")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What each token id adds to an answer's text: what a grammar must know of a tokenizer.

    Attributes:
        tokens: the bytes of each id; none for an id that adds no text (special tokens, unused ids).
        first: the same for ids whose bytes differ at the start of an answer, where some decoders drop
            a space.
        encode: the ids of a text, without special tokens, as the model is used to see it.
    """

    tokens: tuple[bytes, ...]
    first: Mapping[int, bytes]
    encode: Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter on disk.

    Attributes:
        name: what requests call it.
        path: its folder.
        fingerprint: SHA-256 of its files, in hex.
    """

    name: str
    path: str
    fingerprint: str

    @property
    def key(self) -> str:
        """Its name and content: two adapters that were called the same have different ones."""
        return f"{self.name}@{self.fingerprint}"

    def namespace(self, within: str) -> str:
        """The part of the prefix cache that its requests share, of those in the part ``within``."""
        return f"{within}|{self.key}"

    @staticmethod
    def name_in(key: str) -> str:
        """The name in a ``key``; empty for an empty one."""
        return key.rpartition("@")[0]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The natural-log probability of one token, and of the most probable ones at its place."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class TokenEvent:
    """What the engine tells about one request after one step. Not to be changed once it is made.

    Not frozen, which would make it take four times as long to make, for every token of every request.

    ``finish`` is set on the last event of a request and on no other. ``token_ids`` holds what this
    step added (none for a request that ended without a token, one for an ordinary decode).
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    matched_token_id: int | None = None
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    error_kind: str | None = None
    """With ``error``: what ended it from outside (the constants of ``engine.handle``), else None."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one request; ``cached_tokens`` is the part of the prompt that was not computed.

    ``capped_by`` says what made ``max_new_tokens`` less than was asked for: "load" (many requests in
    flight, ADAPTIVE_MAX_NEW_TOKENS), "context" (what the window leaves), or None.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    capped_by: str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """One piece of a streamed answer. ``finish_reason`` and ``usage`` are set on the last one only."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Output:
    """A whole answer.

    ``token_ids`` includes the end-of-text id or stop token that ended it; ``text`` does not.
    ``logprobs`` (asked for with ``SamplingParams(logprobs=True)``) has one entry per id of
    ``token_ids``; ``prompt_logprobs`` one per prompt token after the first. ``matched_stop`` is the
    stop string or token id that ended the answer.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    matched_stop: str | int | None = None


Message = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[Message]
