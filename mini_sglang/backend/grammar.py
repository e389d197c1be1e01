"""Grammars that an answer must follow, compiled and matched by llguidance.

llguidance matches an Earley parser over derivative-based lexers against the tree of all tokens, and gives
the set of tokens that may come next as bits. The notations are its own: JSON schema, Rust regular
expressions, Lark and GBNF.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mini_sglang.backend.grammar_check import Checker
from mini_sglang.backend.grammar_matcher import make_ll_tokenizer, make_matcher, refusal
from mini_sglang.backend.step import TokenGrammar
from mini_sglang.errors import InvalidValueError, OverloadedError
from mini_sglang.types import SamplingParams, Vocabulary

if TYPE_CHECKING:
    from llguidance import LLMatcher

_CACHE_BYTES = 64 << 20
_CACHE_REFUSALS = 256
_REFUSAL_SECONDS = 60.0
_COMPILERS = 2
_WAIT_SECONDS = 5.0
# CPU seconds of one mask from which on a request is ended: the whole batch waits for it.
_SLOW_MASK = 0.25


class GrammarCompiler:
    """Compiles the grammars of requests for one model; ``new`` is a ``GrammarFactory``. Thread-safe.

    A compile within llguidance cannot be interrupted, and small schemas can keep it busy for minutes; so each
    grammar is first compiled and tried in a helper process, which ends after 0.8 CPU seconds, and only then
    here. What compiled is kept, bounded by an estimate of its bytes; what was refused is remembered for a
    minute. Nothing is imported or started before the first grammar comes.

    Args:
        vocabulary: gives what the model's tokens mean; called once.
        vocab_size: ids the model can choose; those past the tokenizer's own are never allowed.
        eos_ids: ids that end an answer; never part of a text.
        check: use the helper. Without it a compile is bounded by llguidance's limits alone: for grammars that
            another process has checked.
    """

    def __init__(
        self,
        vocabulary: Callable[[], Vocabulary],
        vocab_size: int,
        eos_ids: Iterable[int] = (),
        *,
        check: bool = True,
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._eos_ids = frozenset(eos_ids)
        self._check = check
        self._cache_bytes = cache_bytes
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._turns = threading.BoundedSemaphore(_COMPILERS)
        self._tokens: _Tokens | None = None
        self._checker: Checker | None = None
        self._closed = False
        self._compiled: OrderedDict[tuple[str, str], tuple[LLMatcher, int]] = OrderedDict()
        self._bytes = 0
        self._refused: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()

    @property
    def cached_bytes(self) -> int:
        """Estimated size of the compiled grammars that are kept."""
        return self._bytes

    def new(self, params: SamplingParams) -> TokenGrammar:
        """The grammar of ``params`` at its start; it blocks for as long as the compile takes.

        Raises:
            InvalidValueError: it is wrong, allows nothing, or is too large or too slow.
            OverloadedError: too many others wait to be compiled.
            ModelLoadError: the model's tokenizer does not fit grammars.
        """
        key = params.grammar
        assert key is not None
        matcher = self._cached(key)
        if matcher is None:
            tokens = self._load()
            if not self._turns.acquire(timeout=_WAIT_SECONDS):
                raise OverloadedError("Too many grammars wait to be compiled.", retry_after=1.0)
            try:
                matcher = self._cached(key) or self._compile(key, tokens)
            finally:
                self._turns.release()
        assert self._tokens is not None
        return _Grammar(matcher.deep_copy(), self._tokens)

    def prepare(self) -> None:
        """Get everything ready for the first grammar: half a second that it need not wait.

        Raises:
            ModelLoadError: as ``new``.
        """
        self._load()
        if self._checker is not None:
            self._checker.prepare()

    def close(self) -> None:
        """End the helper processes. Safe to call twice."""
        with self._loading:  # one that is being made in another thread is not left behind
            self._closed = True
            if self._checker is not None:
                self._checker.close()

    def _load(self) -> _Tokens:
        with self._loading:
            if self._tokens is None:
                tokens = _Tokens(self._vocabulary(), self._vocab_size, self._eos_ids)
                if self._check:
                    self._checker = Checker(tokens.tokens)
                    if self._closed:
                        self._checker.close()
                self._tokens = tokens
            return self._tokens

    def _cached(self, key: tuple[str, str]) -> LLMatcher | None:
        with self._lock:
            if key in self._compiled:
                self._compiled.move_to_end(key)
                return self._compiled[key][0]
            sentence, until = self._refused.get(key, ("", 0.0))
        if time.monotonic() < until:
            raise InvalidValueError(*key, sentence)
        return None

    def _compile(self, key: tuple[str, str], tokens: _Tokens) -> LLMatcher:
        refused = None if self._checker is None else self._checker.check(*key)
        started = time.thread_time()
        matcher = None
        if refused is None:
            matcher, refused = make_matcher(*key, tokens.ll)
        if matcher is None or refused is not None:
            allowed = refusal(key[0], refused or "")
            with self._lock:
                self._refused[key] = allowed, time.monotonic() + _REFUSAL_SECONDS
                while len(self._refused) > _CACHE_REFUSALS:
                    self._refused.popitem(last=False)
            raise InvalidValueError(*key, allowed)
        # Not told by llguidance; measured, a compile allocates up to 240 KB per CPU millisecond and less than
        # 256 bytes per byte of its text.
        cost = 256 * len(key[1]) + int(100e6 * (time.thread_time() - started))
        with self._lock:
            if key not in self._compiled:
                self._compiled[key] = matcher, cost
                self._bytes += cost
            while self._bytes > self._cache_bytes and len(self._compiled) > 1:
                self._bytes -= self._compiled.popitem(last=False)[1][1]
        return matcher


class _Tokens:
    """A vocabulary as llguidance and as bit masks, cut or padded to the ids the model can choose.

    Attributes:
        tokens: bytes of each id; none where a text may not hold it.
        num_words: int32 words of llguidance's own masks.
        text_words: mask of the ids a text may hold.
        first_alias: for ids that read differently at the start of an answer, the id that always reads so; -1
            where none does.
    """

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, eos_ids: frozenset[int]) -> None:
        known = vocabulary.tokens[:vocab_size]
        tokens = [b"" if token_id in eos_ids else token for token_id, token in enumerate(known)]
        tokens += [b""] * (vocab_size - len(tokens))
        self.tokens = tokens
        self.ll = make_ll_tokenizer(tokens, vocabulary.encode)
        self.num_words = -(-(vocab_size + 1) // 32)
        self.text_words = _pack(np.array([bool(token) for token in tokens]))
        ids: dict[bytes, int] = {}
        for token_id, token in enumerate(tokens):
            ids.setdefault(token, token_id)
        ids.pop(b"", None)
        differing = {i: text for i, text in vocabulary.first.items() if i < vocab_size and tokens[i]}
        self.first_alias = {token_id: ids.get(text, -1) for token_id, text in differing.items()}
        self._from = np.array(list(self.first_alias), dtype=np.int64)
        self._to = np.array(list(self.first_alias.values()), dtype=np.int64)

    def at_start(self, words: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """A mask of llguidance's as it is for the first token of an answer."""
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(self.tokens)].view(np.bool_)
        aliased = bits.copy()
        aliased[self._from] = bits[self._to] & (self._to >= 0)
        return _pack(aliased) & self.text_words


def _pack(bits: npt.NDArray[np.bool_]) -> npt.NDArray[np.int32]:
    padded = np.zeros(-(-len(bits) // 32) * 32, dtype=np.bool_)
    padded[: len(bits)] = bits
    return np.packbits(padded, bitorder="little").view(np.int32)


class _Grammar:
    """A ``TokenGrammar``: one matcher of llguidance, and what makes its bits those of our vocabulary."""

    def __init__(self, matcher: LLMatcher, tokens: _Tokens, started: bool = False) -> None:
        self._matcher = matcher
        self._tokens = tokens
        self._started = started
        self._words: npt.NDArray[np.int32] = np.empty(tokens.num_words, dtype=np.int32)

    @property
    def done(self) -> bool:
        return bool(self._matcher.is_stopped() and self._matcher.is_accepting())

    def accept(self, token_id: int) -> str | None:
        if not self._started:
            self._started = True
            token_id = self._tokens.first_alias.get(token_id, token_id)
        # A matcher that was refused a token stays broken: it is the end of this request.
        if not self._matcher.consume_token(token_id):
            return _broken(self._matcher)
        return None

    def fill_mask(self, words: memoryview, end_ids: Sequence[int]) -> str | None:
        started = time.thread_time()
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if self._matcher.is_error():
            return _broken(self._matcher)
        if self._matcher.is_stopped() and not self._matcher.is_accepting():
            return _broken(self._matcher)
        if time.thread_time() - started > _SLOW_MASK:
            return "The grammar takes too long to tell which tokens may come next."
        out = np.frombuffer(words, dtype=np.int32)
        if self._started or not self._tokens.first_alias:
            np.bitwise_and(self._words[: len(out)], self._tokens.text_words, out=out)
        else:
            out[:] = self._tokens.at_start(self._words)
        if self._matcher.is_accepting():
            for token_id in end_ids:
                out[token_id >> 5] |= _BIT[token_id & 31]
        if not out.any():
            return "The grammar has come to a point where none of the model's tokens may follow."
        return None

    def copy(self) -> TokenGrammar:
        return _Grammar(self._matcher.deep_copy(), self._tokens, self._started)


_BIT = np.left_shift(np.uint32(1), np.arange(32, dtype=np.uint32)).view(np.int32)


def _broken(matcher: LLMatcher) -> str:
    reason = " ".join(matcher.get_error().split())[:160] or matcher.stop_reason()
    return f"The grammar cannot be followed further: {reason}"
