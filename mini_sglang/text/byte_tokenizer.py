"""A stand-in for the tokenizer of a model that has none: a token for each byte."""

from __future__ import annotations

from mini_sglang.text.decoder_stages import byte_level_alphabet
from mini_sglang.text.tokenizer import Tokenizer


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """Ids 0 to 255 are the bytes, as far as the vocabulary goes; ids beyond have no text."""
    from tokenizers import Tokenizer as RustTokenizer
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {character: byte for character, byte in byte_level_alphabet().items() if byte < vocab_size}
    rust = RustTokenizer(models.BPE(vocab=vocabulary, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rust.decoder = decoders.ByteLevel()
    return Tokenizer(rust)
