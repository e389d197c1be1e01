"""The benchmark's random model: its folder and its GGUF file are the same model, which others read too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.random_model import Shape, logits, make
from mini_sglang.text.tokenizer import load_tokenizer

SHAPE = Shape(
    hidden_size=128,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=49_200,
)
IDS = [19556, 905, 28, 49_199, 49_152, 5, 6]
TEXT = "Hello world, how are you?\n<|im_end|> It's  fine…"


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_folder_and_file_are_one_model(quantization: str, starter_gguf: Path, tmp_path: Path) -> None:
    folder, file = make(tmp_path, quantization, seed=1, shape=SHAPE)
    found = logits(folder, IDS, quantization=quantization)
    assert torch.equal(found, logits(file, IDS))
    plain = logits(folder, IDS)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
            torch.tensor([IDS])
        ).logits[0]
    assert (plain - expected).abs().max() < 1e-3
    assert 1 < plain.std() < 4
    assert 0 < (found - plain).std() < (0.05 if quantization == "int8" else 0.4) * plain.std()
    starter = load_tokenizer(starter_gguf, cache_dir=tmp_path)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == sorted(starter.eos_ids)
    for path in (folder, file):
        tokenizer = load_tokenizer(path, cache_dir=tmp_path)
        assert tokenizer.encode(TEXT) == starter.encode(TEXT)
        assert tokenizer.decode([49_199]) == " [49199]"
    assert AutoTokenizer.from_pretrained(folder).encode(TEXT) == list(starter.encode(TEXT))
