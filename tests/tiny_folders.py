"""Whole tiny model folders, weights and tokenizer, for tests of the public engine."""

from __future__ import annotations

import json
from pathlib import Path

from tests.backend.tiny_models import save_tiny_model

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_folder(folder: Path, family: str = "llama", *, seed: int = 0, **overrides: object) -> Path:
    """A random model with a byte-level tokenizer of 256 bytes and three special tokens.

    Ids 0 to 2 are ``<|endoftext|>``, ``<|im_start|>`` and ``<|im_end|>`` (end of text), the rest bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    save_tiny_model(folder, family, seed=seed, vocab_size=len(vocab), **overrides)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "bos_token": None, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
