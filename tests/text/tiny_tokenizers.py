"""Small tokenizers of the common kinds, trained on the spot."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on; it isn't bothered at all.",
    "def main():\n    return [x ** 2 for x in range(10)]\n\n\tprint('done!')  # 12345 times",
    "Grüße aus Zürich! Où est la bibliothèque? ¿Dónde está el niño? Привет, мир.",
    "今天天气很好，我们去公园散步吧。東京は日本の首都です。안녕하세요 세계",
    "emoji 😀 👍🏽 👨‍👩‍👧‍👦 🇨🇭 and marks é ñ ก็ नमस्ते",
    "Hello, how are you? I am fine. What is the capital of France? The capital of France is Paris.",
] * 3
TEXTS = [
    "Hello world",
    " leading space and trailing ",
    "the dog isn't   here\n\n\n  indented\ttab",
    "Grüße 今天天气 😀👍🏽 नमस्ते e\u0301 \u200b zero",
    "12345678 + 3.14159 = ?",
    "",
    "\x00 NUL and \r\n line ends",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 and ﷽ rare",
]
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


def id_of(tokenizer: Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None
    return token_id


def _byte_level(special: list[str], vocab_size: int = 400) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return tokenizer


@cache
def qwen_like() -> Tokenizer:
    """Byte-level BPE without beginning-of-text, with added tokens that are not special."""
    tokenizer = _byte_level(QWEN_SPECIAL)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False) for text in ("<think>", "</think>", "<tool_call>")]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


@cache
def llama3_like() -> Tokenizer:
    """Byte-level BPE whose post-processor puts beginning-of-text first."""
    tokenizer = _byte_level(LLAMA3_SPECIAL)
    bos = LLAMA3_SPECIAL[0]
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def _sentencepiece_bpe() -> Tokenizer:
    special = ["<unk>", "<s>", "</s>"]
    base = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    # The trainer's own limit picks among characters that are equally frequent by chance.
    counts = Counter("".join(CORPUS))
    common = set(sorted(counts, key=lambda char: (-counts[char], char))[:60])
    texts = ["".join(char for char in text if char in common) for text in CORPUS]
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    vocab = {text: index for index, text in enumerate(base)}
    for text, _ in sorted(learned["vocab"].items(), key=lambda item: item[1]):
        vocab.setdefault(text, len(vocab))
    vocab.setdefault("▁", len(vocab))
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


@cache
def llama2_like() -> Tokenizer:
    """SentencePiece-like BPE; every stretch between special tokens gets a leading space."""
    tokenizer = _sentencepiece_bpe()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


@cache
def mistral_like() -> Tokenizer:
    """The same, but only the start of the whole prompt gets a leading space."""
    tokenizer = _sentencepiece_bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    return tokenizer


@cache
def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=250, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@cache
def end_of_word_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=250, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@cache
def metaspace_unigram() -> Tokenizer:
    """Unigram with its special tokens as words of the vocabulary itself, as T5 has them."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=250, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@cache
def bare_words() -> Tokenizer:
    """No decoder at all."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "bb": 1, "c c": 2, "": 3, "é": 4}, unk_token="a"))
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def write_folder(folder: Path, tokenizer: Tokenizer, config: dict[str, Any], /, **files: Any) -> Path:
    """A model folder: ``tokenizer.json``, ``tokenizer_config.json``, and ``name=object`` as ``name.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    for name, value in {"tokenizer_config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder
