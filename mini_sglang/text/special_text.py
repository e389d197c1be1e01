"""Special tokens spelled out in chat messages are text, not control tokens.

A message that says ``<|im_end|>`` must not end its turn. Where a template's inputs spell a special token, its
first character is disguised as a private-use character before rendering, so nothing but the template's own
special tokens is recognised in the rendered prompt; the stretches of text between them that hold a disguise
are then encoded without it and without any special token.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from mini_sglang.errors import InvalidValueError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

_PRIVATE_USE = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


class SpecialTextGuard:
    """Disguises special tokens in a template's inputs and encodes the rendered prompt. Thread-safe.

    Args:
        tokenizer: parses special tokens; left as it is.
    """

    def __init__(self, tokenizer: RustTokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        special = {token_id: token for token_id, token in added.items() if token.special}
        self._special = special
        self._spelled_ids = {token.content: token_id for token_id, token in special.items()}
        self._pattern = _any_of(self._spelled_ids)
        # Tokens that are matched after normalisation can be spelled in other ways (full-width letters).
        normalized = [token.content for token in special.values() if token.normalized]
        self._normalize: Callable[[str], str] | None = None
        if tokenizer.normalizer is not None and normalized:
            self._normalize = tokenizer.normalizer.normalize_str
            self._normalized_pattern = _any_of([self._normalize(text) for text in normalized])
        self._plain: tuple[RustTokenizer, str] | None = None

    def disguise(self, inputs: list[Any], taken: str) -> tuple[list[Any], dict[str, str]]:
        """Disguise every special token spelled in ``inputs``.

        Args:
            inputs: plain data; texts and keys at any depth are looked at.
            taken: text whose characters must not be used as a disguise, that of the template.

        Returns:
            ``inputs``, copied where something was disguised, and the real character behind each disguise;
            none where no special token is spelled.
        """
        if not any(self._spells(text) for text in texts_of(inputs)):
            return inputs, {}
        used = set(taken).union(*self._spelled_ids, *texts_of(inputs))
        free = (chr(code) for code in chain(*_PRIVATE_USE) if chr(code) not in used)
        masks: dict[str, str] = {}

        def mask(char: str) -> str:
            if char not in masks:
                masks[char] = next(free, "")
                if not masks[char]:
                    raise InvalidValueError(
                        "messages", "…", "text that leaves a private-use character unused"
                    )
            return masks[char]

        def mask_text(text: str) -> str:
            chars = list(text)
            for match in self._pattern.finditer(text):
                chars[match.start()] = mask(text[match.start()])
            masked = "".join(chars)
            return "".join(map(mask, text)) if self._spells_normalized(masked) else masked

        return _map_texts(inputs, mask_text), {disguise: char for char, disguise in masks.items()}

    def encode(self, rendered: str, disguises: Mapping[str, str]) -> list[int]:
        """Ids of a rendered prompt, in which each disguise stands for its character as plain text."""
        encoding = self._tokenizer.encode(rendered, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        disguise = re.compile("[" + "".join(disguises) + "]")
        real = str.maketrans(dict(disguises))
        result: list[int] = []
        token, text_start = 0, 0
        for index in range(len(ids) + 1):
            at_end = index == len(ids)
            start, end = (len(rendered), len(rendered)) if at_end else offsets[index]
            if not at_end and not self._is_control(ids[index], rendered[start:end], disguise):
                continue
            if disguise.search(rendered, text_start, start):
                cuts = [match.end() for match in disguise.finditer(rendered, text_start, start)]
                bounds = [text_start, *cuts, start]
                parts = [rendered[a:b].translate(real) for a, b in pairwise(bounds)]
                result += self._encode_text(parts, at_start=text_start == 0)
            else:
                result += ids[token:index]
            result += ids[index : index + 1]
            token, text_start = index + 1, end
        return result

    def _is_control(self, token_id: int, text: str, disguise: re.Pattern[str]) -> bool:
        """Whether an id comes from a special token spelled out; unknown characters give ``<unk>`` too."""
        token = self._special.get(token_id)
        if token is None or disguise.search(text):
            return False
        return token.normalized or token.content in text

    def _encode_text(self, parts: list[str], at_start: bool) -> list[int]:
        """Ids of the joined parts without special tokens; ``parts`` are cut inside each one spelled."""
        text = "".join(parts)
        ids = self._encode_plain(text, at_start)
        spelled = {token_id for content, token_id in self._spelled_ids.items() if content in text}
        if spelled.isdisjoint(ids):
            return ids
        # The vocabulary has the special token as an ordinary word too: only apart is its text safe.
        apart = []
        for index, part in enumerate(parts):
            apart += self._encode_plain(part, at_start and index == 0)
        return apart

    def _encode_plain(self, text: str, at_start: bool) -> list[int]:
        plain, anchor = self._plain_tokenizer()
        if at_start:
            return plain.encode(text, add_special_tokens=False).ids
        # The anchor is an added token, as is the special token before this text: some pre-tokenizers put
        # a space before the start of the whole prompt and nowhere else.
        ids = plain.encode(anchor + text, add_special_tokens=False).ids
        assert ids[0] == plain.token_to_id(anchor)
        return ids[1:]

    def _plain_tokenizer(self) -> tuple[RustTokenizer, str]:
        """A second tokenizer that takes special tokens for text, and its anchor. Made when first needed."""
        # The flag that does it is state of the tokenizer, so the one that others use must not carry it.
        if self._plain is None:
            from tokenizers import AddedToken

            plain = _copy(self._tokenizer)
            plain.encode_special_tokens = True
            # Random, so that nobody can write it into a message.
            anchor = "".join(chr(0xE000 + byte) for byte in secrets.token_bytes(16))
            plain.add_tokens([AddedToken(anchor, normalized=False)])
            # Set together: two threads that both get here must not mix their anchors.
            self._plain = plain, anchor
        return self._plain

    def _spells(self, text: str) -> bool:
        return self._pattern.search(text) is not None or self._spells_normalized(text)

    def _spells_normalized(self, text: str) -> bool:
        if self._normalize is None:
            return False
        return self._normalized_pattern.search(self._normalize(text)) is not None


def _any_of(texts: Any) -> re.Pattern[str]:
    # Looks ahead only, so that tokens that overlap are all found. The empty class matches nothing.
    options = "|".join(re.escape(text) for text in texts if text)
    return re.compile(f"(?={options})" if options else r"(?!)")


def _copy(tokenizer: RustTokenizer) -> RustTokenizer:
    """A tokenizer that encodes the same and shares the model's vocabulary."""
    from tokenizers import Tokenizer

    copy = Tokenizer(tokenizer.model)
    if tokenizer.normalizer is not None:
        copy.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        copy.pre_tokenizer = tokenizer.pre_tokenizer
    added = tokenizer.get_added_tokens_decoder()
    # In the order of their ids, which gives each the same id again.
    copy.add_tokens([token for _, token in sorted(added.items())])
    assert all(copy.token_to_id(token.content) == token_id for token_id, token in added.items())
    return copy


def texts_of(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_of(item)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {change(key): _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(item, change) for item in value]
    return value
