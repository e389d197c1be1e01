"""The pre-tokenizers that a GGUF file names in ``tokenizer.ggml.pre``, as regular expressions.

A pre-tokenizer cuts text into the words that byte-level BPE works on. The file holds only its name; which
name means which cut is llama.cpp's convention (its ``llm_tokenizer_bpe``), followed here to the letter. The
expressions are for Oniguruma, the engine of the ``tokenizers`` library.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from types import MappingProxyType

from mini_sglang.errors import ModelLoadError, shorten

logger = logging.getLogger(__name__)

# Letters, digits, marks and punctuation that came with Unicode 16. Oniguruma knows them, llama.cpp's tables
# end with Unicode 15.1 and take them for symbols.
_UNKNOWN = (
    r"\x{897}\x{1B4E}\x{1B4F}\x{1B7F}\x{1C89}\x{1C8A}\x{A7CB}-\x{A7CD}\x{A7DA}-\x{A7DC}\x{105C0}-\x{105FF}"
    r"\x{10D40}-\x{10D8F}\x{10EC2}-\x{10EC4}\x{10EFC}\x{11380}-\x{113FF}\x{116D0}-\x{116FF}\x{11BC0}-\x{11BFF}"
    r"\x{11F5A}\x{13460}-\x{143FF}\x{16100}-\x{1613F}\x{16D40}-\x{16D7F}\x{18CFF}\x{1CC00}-\x{1CCFF}"
    r"\x{1E5D0}-\x{1E5FF}"
)
_LETTER = rf"[\p{{L}}&&[^{_UNKNOWN}]]"
_NUMBER = rf"[\p{{N}}&&[^{_UNKNOWN}]]"
_WORD = rf"[\p{{L}}\p{{N}}&&[^{_UNKNOWN}]]"
_PUNCTUATION = rf"[\p{{P}}&&[^{_UNKNOWN}]]"
# llama.cpp knows case only in ASCII: every other letter may stand for either.
_UPPER = rf"[\p{{L}}&&[^a-z{_UNKNOWN}]]"
_LOWER = rf"[\p{{L}}&&[^A-Z{_UNKNOWN}]]"

_SPACES = r"\s+(?!\S)|\s+"
_LINES_AND_SPACES = rf"\s*[\r\n]+|{_SPACES}"
_OTHER = rf" ?[^\s{_WORD}]+"
# Spelled out, because a case-insensitive "s" also matches U+017F.
_SUFFIX = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_LED_WORD = rf"[^\r\n{_WORD}]?{_LETTER}+"
_CASED_START = rf"[^\r\n{_WORD}]?"


def _cased(suffix: str) -> str:
    return rf"{_CASED_START}{_UPPER}*{_LOWER}+{suffix}|{_CASED_START}{_UPPER}+{_LOWER}*{suffix}"


_GPT2 = rf"'s|'t|'re|'ve|'m|'ll|'d| ?{_LETTER}+| ?{_NUMBER}+|{_OTHER}|{_SPACES}"
_CL100K = rf"{_SUFFIX}|{_LED_WORD}|{_NUMBER}{{1,3}}|{_OTHER}[\r\n]*|{_LINES_AND_SPACES}"
_QWEN2 = rf"{_SUFFIX}|{_LED_WORD}|{_NUMBER}|{_OTHER}[\r\n]*|{_LINES_AND_SPACES}"
_MINICPM5 = rf"{_SUFFIX}|{_LED_WORD}|{_NUMBER}+|{_OTHER}[\r\n]*|{_LINES_AND_SPACES}"
_SEED_CODER = rf"{_SUFFIX}|{_LED_WORD}|{_NUMBER}|{_OTHER}|{_LINES_AND_SPACES}"
_TEKKEN = rf"{_cased('')}|{_NUMBER}|{_OTHER}[\r\n/]*|{_LINES_AND_SPACES}"
_GPT4O = rf"{_cased(f'(?:{_SUFFIX})?')}|{_NUMBER}{{1,3}}|{_OTHER}[\r\n/]*|{_LINES_AND_SPACES}"
_THREE_DIGITS = "[0-9][0-9][0-9]"
_CJK = r"[[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]&&[^\s]]+"


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut into words before BPE.

    Attributes:
        regexes: applied one after another, each to the pieces the one before left; every match becomes a
            piece, and so does what lies between two.
        ignore_merges: a word that is a token is that token, whatever the merges would make of it.
        add_bos: whether a prompt begins with the begin-of-text token where the file does not say.
    """

    regexes: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_DEFAULT = PreTokenizer((rf"[{_PUNCTUATION}$+<=>^~|]+", _GPT2, rf"{_NUMBER}+", _THREE_DIGITS))

_GROUPS: tuple[tuple[PreTokenizer, str], ...] = (
    (_DEFAULT, "default"),
    (PreTokenizer((_GPT2,)), "gpt-2 phi-2 mpt olmo jais trillion gigachat a.x-4.0 mellum exaone4"),
    (
        PreTokenizer((_NUMBER, _GPT2)),
        "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2",
    ),
    (
        PreTokenizer((_CL100K,), ignore_merges=True, add_bos=True),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2",
    ),
    (PreTokenizer((_CL100K,)), "smaug-bpe dbrx glm4 chatglm-bpe"),
    (
        PreTokenizer((_QWEN2,)),
        "qwen2 deepseek-r1-qwen stablelm2 hunyuan solar-open megrez kormo grok-2",
    ),
    (PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True), "tekken"),
    (PreTokenizer((_GPT4O,)), "gpt-4o llama4 kanana2"),
    (PreTokenizer((_SEED_CODER,)), "seed-coder"),
    (PreTokenizer((rf"{_NUMBER}{{1,3}}", _MINICPM5), ignore_merges=True), "minicpm5"),
    (PreTokenizer((rf"[{_PUNCTUATION}$+<=>^~|`]+", _GPT2, _THREE_DIGITS)), "falcon"),
    (
        PreTokenizer((r"[\r\n]", rf"\s?{_LETTER}+", rf"\s?{_PUNCTUATION}+", _CJK, _NUMBER)),
        "deepseek-coder",
    ),
)
PRE_TOKENIZERS = MappingProxyType({name: pre for pre, names in _GROUPS for name in names.split()})


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """The pre-tokenizer of a ``tokenizer.ggml.pre``; the default one, with a warning, for an empty name.

    Raises:
        ModelLoadError: a name that is not known. A guess would give wrong tokens without a word.
    """
    if not name:
        logger.warning("The GGUF file does not name its pre-tokenizer; the default one may cut text wrongly.")
        return _DEFAULT
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise ModelLoadError(
            f"The GGUF file's pre-tokenizer (tokenizer.ggml.pre) is {shorten(name)}; known are {known}."
        )
    return PRE_TOKENIZERS[name]
