"""The oracle is llama.cpp: ``data/llamacpp_ids.json`` is a recording of it, made by make_llamacpp_ids.py."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from mini_sglang.backend.loading.gguf import read_gguf
from mini_sglang.errors import ModelLoadError
from mini_sglang.text import gguf_tokenizer
from mini_sglang.text.gguf_regexes import PRE_TOKENIZERS
from mini_sglang.text.gguf_tokenizer import GGUFTokenizer, convert_tokenizer, load_gguf_tokenizer

FIXTURE = json.loads((Path(__file__).parent / "data" / "llamacpp_ids.json").read_text())
TEXTS: list[str] = FIXTURE["texts"]
KINDS = list(FIXTURE["kinds"])


@pytest.fixture(scope="module")
def starter_metadata(starter_gguf: Path) -> dict[str, Any]:
    with read_gguf(starter_gguf) as file:
        return dict(file.metadata)


@pytest.fixture(scope="module")
def starter(starter_metadata: dict[str, Any]) -> GGUFTokenizer:
    return convert_tokenizer(starter_metadata)


def small_metadata(kind: str) -> dict[str, Any]:
    if kind.startswith("sentencepiece"):
        metadata: dict[str, Any] = {"tokenizer.ggml.model": "llama"}
        vocab = FIXTURE["vocabs"]["sentencepiece"]
        if kind.endswith("without-prefix"):
            metadata |= {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    else:
        vocab = FIXTURE["vocabs"]["byte_level"]
        end = vocab["tokens"].index("<|endoftext|>")
        metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": kind}
        metadata |= {"tokenizer.ggml.bos_token_id": end, "tokenizer.ggml.eos_token_id": end}
    return metadata | {f"tokenizer.ggml.{name}": list(values) for name, values in vocab.items()}


def disagreements(tokenizer: Tokenizer, expected: dict[str, Any]) -> Iterator[tuple[bool, str, Any, Any]]:
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    for index, ids in enumerate(expected["special"]):
        plain_ids = expected["plain"].get(str(index), ids)
        for special, ours, wanted in ((True, tokenizer, ids), (False, plain, plain_ids)):
            got = ours.encode(TEXTS[index]).ids
            if got != wanted:
                yield special, TEXTS[index], got, wanted


def test_starter_ids_equal_llamacpp(starter: GGUFTokenizer) -> None:
    assert len(FIXTURE["starter"]["special"]) == len(TEXTS) > 400
    assert list(disagreements(starter.tokenizer, FIXTURE["starter"])) == []


def test_starter_facts(starter: GGUFTokenizer, starter_metadata: dict[str, Any]) -> None:
    expected = FIXTURE["starter"]
    assert list(starter.eos_ids) == expected["eos_ids"]
    assert (starter.bos_id, starter.eos_id) == (expected["bos_id"], expected["eos_id"])
    assert (starter.bos_token, starter.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert starter.add_bos == expected["add_bos"]
    assert starter.chat_template == starter_metadata["tokenizer.chat_template"]


def test_starter_decodes_what_it_encodes(starter: GGUFTokenizer) -> None:
    missing = set("\x04\x06\x13\x14\x16\x1d")  # bytes without a token
    for text in TEXTS:
        if missing.isdisjoint(text) and not any(0x40000 <= ord(char) < 0xC0000 for char in text):
            ids = starter.tokenizer.encode(text).ids
            assert starter.tokenizer.decode(ids, skip_special_tokens=False) == text


def test_control_tokens_are_special(starter: GGUFTokenizer) -> None:
    ids = starter.tokenizer.encode("<|im_start|>Hi<|im_end|>").ids
    assert ids[0] == starter.bos_id and ids[-1] == starter.eos_id
    assert starter.tokenizer.decode(ids) == "Hi"


@pytest.mark.parametrize("kind", KINDS)
def test_small_vocabulary_ids_equal_llamacpp(kind: str) -> None:
    result = convert_tokenizer(small_metadata(kind))
    expected = FIXTURE["kinds"][kind]
    assert list(disagreements(result.tokenizer, expected)) == []
    assert list(result.eos_ids) == expected["eos_ids"]
    assert (result.bos_id, result.eos_id) == (expected["bos_id"], expected["eos_id"])
    assert result.add_bos == expected["add_bos"]


def test_every_pre_tokenizer_differs_from_the_others_somewhere() -> None:
    """Else the fixture would not show a name that stands for the wrong expression."""
    recorded = [json.dumps(FIXTURE["kinds"][kind]["special"]) for kind in KINDS]
    assert len(set(recorded)) == len(KINDS)
    recorded_ones = {PRE_TOKENIZERS[kind] for kind in KINDS if kind in PRE_TOKENIZERS}
    assert recorded_ones == set(PRE_TOKENIZERS.values())


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-without-prefix"])
def test_sentencepiece_decodes_what_it_encodes(kind: str) -> None:
    tokenizer = convert_tokenizer(small_metadata(kind)).tokenizer
    for text in TEXTS:
        if "▁" not in text:  # the same as a space to SentencePiece
            pieces = tokenizer.encode(text, add_special_tokens=False).tokens
            joined = tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)
            prefixes = ("<s> ", "<s>") if kind == "sentencepiece" else ("",)
            if not {"<s>", "</s>", "<unk>", "<tool>", "\t\t", "<|im_end|>"} & set(pieces):
                assert joined.removeprefix(prefixes[0]).removeprefix(prefixes[-1]) == text


def test_user_defined_tokens_are_not_special() -> None:
    tokenizer = convert_tokenizer(small_metadata("gpt-2")).tokenizer
    ids = tokenizer.encode("a<tool>b<unk>c<|im_end|>").ids
    assert tokenizer.decode(ids) == "a<tool>bc"


def test_prompts_are_framed_as_the_file_says() -> None:
    metadata = small_metadata("gpt-2")
    bare = convert_tokenizer(metadata)
    ids = bare.tokenizer.encode("Hi").ids
    metadata |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    metadata["tokenizer.ggml.bos_token_id"] = bos = metadata["tokenizer.ggml.tokens"].index("<|im_start|>")
    framed = convert_tokenizer(metadata)
    assert (framed.add_bos, framed.add_eos) == (True, True)
    assert framed.tokenizer.encode("Hi").ids == [bos, *ids, framed.eos_id]
    assert framed.tokenizer.encode("Hi", add_special_tokens=False).ids == ids


def test_metadata_is_not_changed() -> None:
    metadata = small_metadata("gpt-2")
    before = json.dumps(metadata)
    convert_tokenizer(metadata)
    assert json.dumps(metadata) == before


def test_an_unnamed_pre_tokenizer_is_the_default_one_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    metadata = small_metadata("default")
    del metadata["tokenizer.ggml.pre"]
    with caplog.at_level(logging.WARNING):
        result = convert_tokenizer(metadata)
    assert "pre-tokenizer" in caplog.text
    assert list(disagreements(result.tokenizer, FIXTURE["kinds"]["default"])) == []


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"model": "bert"}, "'bert'; it must be gpt2 or llama"),
    "kind type": ({"model": 3}, "must be a text"),
    "pre": ({"pre": "from-the-future"}, "'from-the-future'; known are"),
    "no tokens": ({"tokens": None}, "tokens is missing"),
    "empty": ({"tokens": []}, "tokens is empty"),
    "number as token": ({"tokens": ["a", 3]}, "not a list of the right type"),
    "token twice": ({"tokens": ["a", "b", "a"]}, "the token 'a' twice"),
    "few types": ({"token_type": [1, 1]}, "token_type has 2 entries for"),
    "no merges": ({"merges": None}, "merges is missing"),
    "no scores": ({"model": "llama"}, "scores is missing"),
    "flag": ({"add_bos_token": "yes"}, "must be true or false"),
    "lone surrogate": ({"tokens": ["a", "\ud800"], "token_type": [1, 1]}, "cannot be used"),
    "no eos": ({"add_eos_token": True, "eos_token_id": None}, "eos_token_id"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_metadata_is_one_sentence(name: str) -> None:
    changes, message = BAD[name]
    metadata = small_metadata("gpt-2")
    for key, value in changes.items():
        metadata.pop(f"tokenizer.ggml.{key}", None)
        if value is not None:
            metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(ModelLoadError) as caught:
        convert_tokenizer(metadata)
    assert message in str(caught.value)
    assert str(caught.value).count("The GGUF file") == 1
    assert len(str(caught.value)) < 900


def test_scores_with_a_nan_are_refused() -> None:
    metadata = small_metadata("sentencepiece")
    metadata["tokenizer.ggml.scores"][7] = float("nan")
    with pytest.raises(ModelLoadError, match="NaN"):
        convert_tokenizer(metadata)


def test_ids_out_of_the_vocabulary_and_unusable_merges_are_told(caplog: pytest.LogCaptureFixture) -> None:
    metadata = small_metadata("gpt-2")
    metadata["tokenizer.ggml.bos_token_id"] = 1 << 31
    metadata["tokenizer.ggml.merges"] += ["nosuch token", "x"]
    with caplog.at_level(logging.WARNING):
        result = convert_tokenizer(metadata)
    assert result.bos_id is None and result.bos_token is None
    assert "bos_token_id is 2147483648" in caplog.text
    assert "2 merges" in caplog.text
    assert list(disagreements(result.tokenizer, FIXTURE["kinds"]["gpt-2"])) == []


def test_end_texts_of_other_families() -> None:
    metadata = small_metadata("gpt-2")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    tokens += ["<|end|>", "<|return|>", "<|call|>", "<|start|>", "</s>", "<|tool_response>"]
    types += [3] * 6
    result = convert_tokenizer(metadata)
    ends = {tokens[i] for i in result.eos_ids}
    assert {"<|return|>", "<|call|>", "<|tool_response>"} <= ends
    assert not {"<|end|>", "</s>"} & ends
    ids = result.tokenizer.encode("<|start|><|end|><|return|>").ids
    assert result.tokenizer.decode(ids) == "<|start|><|end|>"


# The cache


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"stands for a model")
    return path


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with each conversion."""
    calls: list[str] = []

    def counted(metadata: dict[str, Any]) -> GGUFTokenizer:
        calls.append(metadata["tokenizer.ggml.model"])
        return convert_tokenizer(metadata)

    monkeypatch.setattr(gguf_tokenizer, "convert_tokenizer", counted)
    return calls


def same(a: GGUFTokenizer, b: GGUFTokenizer) -> bool:
    names = ("chat_template", "bos_token", "eos_token", "bos_id", "eos_id", "add_bos", "add_eos", "eos_ids")
    return a.tokenizer.to_str() == b.tokenizer.to_str() and all(
        getattr(a, name) == getattr(b, name) for name in names
    )


def test_the_cache_gives_the_same_without_the_metadata(
    model_file: Path, tmp_path: Path, conversions: list[str]
) -> None:
    for kind in ("llama-bpe", "smollm", "sentencepiece"):
        metadata = small_metadata(kind) | {"tokenizer.chat_template": "{{ 'täst' }}\n"}
        model_file.write_bytes(kind.encode() * 2)
        made = load_gguf_tokenizer(model_file, metadata, tmp_path / "cache")
        # The file is no GGUF: reading its metadata would fail.
        again = load_gguf_tokenizer(model_file, None, tmp_path / "cache")
        assert same(made, again)
        assert list(disagreements(again.tokenizer, FIXTURE["kinds"][kind])) == []
    assert len(conversions) == 3
    assert len(list((tmp_path / "cache" / "tokenizers").iterdir())) == 1


def test_starter_comes_from_its_file_and_then_from_the_cache(
    starter_gguf: Path, starter: GGUFTokenizer, tmp_path: Path, conversions: list[str]
) -> None:
    first = load_gguf_tokenizer(starter_gguf, None, tmp_path)
    second = load_gguf_tokenizer(starter_gguf, None, tmp_path)
    assert len(conversions) == 1
    assert same(first, starter) and same(second, starter)
    assert list(disagreements(second.tokenizer, FIXTURE["starter"])) == []


def test_a_changed_model_is_converted_again(
    model_file: Path, tmp_path: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = small_metadata("gpt-2")
    load_gguf_tokenizer(model_file, metadata, tmp_path)
    status = model_file.stat()
    os.utime(model_file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))
    load_gguf_tokenizer(model_file, metadata, tmp_path)
    assert len(conversions) == 2
    monkeypatch.setattr(gguf_tokenizer, "CONVERSION_VERSION", -1)
    load_gguf_tokenizer(model_file, metadata, tmp_path)
    assert len(conversions) == 3
    load_gguf_tokenizer(model_file, None, tmp_path)
    assert len(conversions) == 3


@pytest.mark.parametrize("damage", ["empty", "half", "flip head", "flip body", "text", "folder"])
def test_a_damaged_cached_file_is_made_again(
    model_file: Path, tmp_path: Path, conversions: list[str], damage: str
) -> None:
    metadata = small_metadata("gpt-2")
    made = load_gguf_tokenizer(model_file, metadata, tmp_path)
    (cached,) = (tmp_path / "tokenizers").iterdir()
    content = cached.read_bytes()
    flip = content.find({"flip head": b"conversion", "flip body": b"unreachable"}.get(damage, b""))
    cached.unlink()
    if damage == "folder":
        cached.mkdir()
    else:
        flipped = content[:flip] + bytes([content[flip] ^ 1]) + content[flip + 1 :]
        half = content[: len(content) // 2]
        cached.write_bytes({"empty": b"", "half": half, "text": b"no\nsuch\nthing"}.get(damage, flipped))
    again = load_gguf_tokenizer(model_file, metadata, tmp_path)
    assert same(made, again)
    assert len(conversions) == 2
    if damage != "folder":
        assert cached.read_bytes() == content
        load_gguf_tokenizer(model_file, None, tmp_path)
    assert [path.name for path in (tmp_path / "tokenizers").iterdir()] == [cached.name]


def test_a_cache_that_cannot_be_written_costs_only_time(
    model_file: Path, tmp_path: Path, conversions: list[str]
) -> None:
    # A file where the folder should be refuses even root.
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    for _ in range(2):
        load_gguf_tokenizer(model_file, small_metadata("gpt-2"), blocked)
    assert len(conversions) == 2


def test_a_missing_model_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"nothing\.gguf cannot be read: No such file"):
        load_gguf_tokenizer(tmp_path / "nothing.gguf", None, tmp_path)


def test_a_conversion_that_fails_leaves_nothing_in_the_cache(model_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError):
        load_gguf_tokenizer(model_file, {"tokenizer.ggml.model": "gpt2"}, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
