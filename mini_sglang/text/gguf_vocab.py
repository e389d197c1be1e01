"""The vocabulary of a GGUF file: its tokens, what each is, and which of them end an answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from mini_sglang.errors import ModelLoadError, shorten

logger = logging.getLogger(__name__)

PREFIX = "tokenizer.ggml."

# Texts by which llama.cpp knows a token that ends an answer, whatever type the file gives it.
_END_TEXTS = (
    "<|eot_id|> <|im_end|> <|end|> <|return|> <|call|> <|flush|> <|calls|> <end_of_turn> <|endoftext|> </s> "
    "<|eom_id|> <EOT> _<EOT> [EOT] [EOS] <|end_of_text|> <end_of_utterance> <eos> <turn|> <|tool_response> "
    "<｜end▁of▁sentence｜> [e~["
)
# The tokens of fill-in-the-middle, by key and by text; the last three end an answer too.
_FILL_TEXTS = {
    "fim_pre": "<|fim_prefix|> <fim-prefix> <fim_prefix> <｜fim▁begin｜> <PRE> ▁<PRE> <|code_prefix|> "
    "<|prefix|>",
    "fim_suf": "<|fim_suffix|> <fim-suffix> <fim_suffix> <｜fim▁hole｜> <SUF> ▁<SUF> <|code_suffix|> "
    "<|suffix|>",
    "fim_mid": "<|fim_middle|> <fim-middle> <fim_middle> <｜fim▁end｜> <MID> ▁<MID> <|code_middle|> "
    "<|middle|>",
    "fim_pad": "<|fim_pad|> <fim-pad> <fim_pad> <PAD> [PAD]",
    "fim_rep": "<|fim_repo|> <|repo_name|> <fim-repo> <REPO> <reponame>",
    "fim_sep": "<|file_sep|>",
}
_FILL_ENDS = ("fim_pad", "fim_rep", "fim_sep")
_HARMONY_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")


class TokenType(IntEnum):
    """The entries of ``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(slots=True)
class GGUFVocab:
    """The tokens in the order of their ids, what each is, and its score.

    Attributes:
        tokens: no two are equal.
        types: a ``TokenType`` per token.
        scores: one per token, or none.
        ids: the place of each token in ``tokens``.
    """

    tokens: list[str]
    types: list[int]
    scores: list[float]
    ids: dict[str, int]

    @classmethod
    def read(cls, metadata: Mapping[str, Any]) -> GGUFVocab:
        """Take the vocabulary out of a GGUF file's metadata.

        Raises:
            ModelLoadError: it is missing, incomplete or contradicts itself.
        """
        tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(list_value(metadata, "tokens", str))]
        if not tokens:
            raise ModelLoadError(f"The GGUF file has no vocabulary: {PREFIX}tokens is empty.")
        ids = {text: i for i, text in enumerate(tokens)}
        if len(ids) != len(tokens):
            twice = next(text for i, text in enumerate(tokens) if ids[text] != i)
            raise ModelLoadError(f"The GGUF file's vocabulary has the token {shorten(twice)} twice.")
        types: list[int] = [TokenType.NORMAL] * len(tokens)
        scores: list[float] = []
        if PREFIX + "token_type" in metadata:
            types = list(list_value(metadata, "token_type", int))
        if PREFIX + "scores" in metadata:
            scores = list(list_value(metadata, "scores", (int, float)))
        for name, values in (("token_type", types), ("scores", scores)):
            if values and len(values) != len(tokens):
                raise ModelLoadError(
                    f"The GGUF file's {PREFIX}{name} has {len(values)} entries for {len(tokens)} tokens."
                )
        return cls(tokens, types, scores, ids)

    def special_id(self, metadata: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
        """The id under ``<name>_token_id``, or the default; none where that is not in the vocabulary."""
        key = f"{PREFIX}{name}_token_id"
        value = metadata.get(key)
        if isinstance(value, int) and 0 <= value < len(self.tokens):
            return value
        if value is not None:
            logger.warning("%s is %s, which is not in the vocabulary; it is ignored.", key, shorten(value))
        return default if default is not None and default < len(self.tokens) else None

    def settle_types(self, metadata: Mapping[str, Any], eos_id: int | None) -> tuple[int, ...]:
        """Correct the types that the tokens' texts contradict, as llama.cpp does.

        Returns:
            The ids that end an answer, ascending.
        """
        ends = {eos_id, self.special_id(metadata, "eot"), self.special_id(metadata, "eom")}
        for name, texts in _FILL_TEXTS.items():
            token_id = self.special_id(metadata, name)
            if token_id is None:
                token_id = next((self.ids[text] for text in texts.split() if text in self.ids), None)
                if token_id is not None:
                    self.types[token_id] = TokenType.CONTROL
            if name in _FILL_ENDS:
                ends.add(token_id)
        for text in self.ids.keys() & _END_TEXTS.split():
            ends.add(self.ids[text])
            self.types[self.ids[text]] = TokenType.CONTROL
        for text in _HARMONY_TEXTS:
            if text in self.ids:
                self.types[self.ids[text]] = TokenType.USER_DEFINED
        # In these families' vocabularies the text that ends another family's answers means something else.
        calls = self.ids.keys() & {"<|call|>", "<|calls|>"}
        if calls and self.ids.keys() & {"<|return|>", "<|flush|>"}:
            self._spare(ends, "<|end|>", TokenType.USER_DEFINED)
        if "<|tool_response>" in self.ids:
            self._spare(ends, "</s>", TokenType.NORMAL)
        return tuple(sorted(token_id for token_id in ends if token_id is not None))

    def _spare(self, ends: set[int | None], text: str, token_type: int) -> None:
        if text in self.ids:
            ends.discard(self.ids[text])
            self.types[self.ids[text]] = token_type

    def added_tokens(self) -> list[tuple[str, bool]]:
        """The tokens that are found in the raw text before anything else, and whether each is special."""
        return [
            (text, token_type != TokenType.USER_DEFINED)
            for text, token_type in zip(self.tokens, self.types, strict=True)
            if token_type in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED)
        ]


def list_value(metadata: Mapping[str, Any], name: str, kind: type | tuple[type, ...]) -> Sequence[Any]:
    """The list under ``tokenizer.ggml.<name>``; ``ModelLoadError`` where it is missing or of another type."""
    values = metadata.get(PREFIX + name)
    if not isinstance(values, (list, tuple)) or not all(isinstance(value, kind) for value in values):
        what = "missing" if values is None else f"not a list of the right type ({shorten(values)})"
        raise ModelLoadError(f"The GGUF file's tokenizer is incomplete: {PREFIX}{name} is {what}.")
    return values


def text_value(metadata: Mapping[str, Any], name: str) -> str:
    value = metadata.get(PREFIX + name, "")
    if not isinstance(value, str):
        raise ModelLoadError(f"The GGUF file's {PREFIX}{name} is {shorten(value)}; it must be a text.")
    return value


def flag_value(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(PREFIX + name, default)
    if not isinstance(value, bool):
        raise ModelLoadError(f"The GGUF file's {PREFIX}{name} is {shorten(value)}; it must be true or false.")
    return value
