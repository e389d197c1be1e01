from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models

from mini_sglang.text.decoder_stages import byte_level_alphabet
from mini_sglang.text.detokenizer import WindowedDetokenizer, detokenizer_factory
from tests.text.tiny_tokenizers import (
    CORPUS,
    TEXTS,
    bare_words,
    end_of_word_bpe,
    id_of,
    llama2_like,
    llama3_like,
    metaspace_unigram,
    mistral_like,
    qwen_like,
    word_piece,
)

KINDS = [
    qwen_like,
    llama3_like,
    llama2_like,
    mistral_like,
    word_piece,
    end_of_word_bpe,
    metaspace_unigram,
    bare_words,
]


def pieces_of(tokenizer: Tokenizer, ids: list[int], cuts: random.Random | None = None) -> list[str]:
    """Stream ``ids``, one by one or in steps of random size; the pieces, the last from ``finish``."""
    detokenizer = detokenizer_factory(tokenizer)()
    pieces = []
    start = 0
    while start < len(ids):
        step = cuts.randint(0, 5) if cuts else 1
        pieces.append(detokenizer.push(ids[start : start + step]))
        start += step
    return [*pieces, detokenizer.finish()]


def assert_joins(tokenizer: Tokenizer, ids: list[int], cuts: random.Random | None = None) -> None:
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    pieces = pieces_of(tokenizer, ids, cuts)
    assert "".join(pieces) == whole, (ids, pieces)
    if "\ufffd" not in whole:
        assert not any("\ufffd" in piece for piece in pieces)


def random_ids(tokenizer: Tokenizer, rng: random.Random) -> list[int]:
    """Any ids: words, special tokens, halves of characters, ids that do not exist."""
    size = tokenizer.get_vocab_size()
    broken = [token_id for token_id in range(size) if "\ufffd" in tokenizer.decode([token_id])]
    draws: list[Callable[[], list[int]]] = [
        lambda: [rng.randrange(size)],
        lambda: [rng.choice(broken or [0]) for _ in range(rng.randint(1, 6))],
        lambda: tokenizer.encode(rng.choice("😀今é👍🏽 ก็\u0301"), add_special_tokens=False).ids,
        lambda: tokenizer.encode(rng.choice(CORPUS)[:20], add_special_tokens=False).ids,
        lambda: [size + rng.randrange(50)],
    ]
    weights = [5, 2, 3, 1, 0.3]
    return [i for _ in range(rng.randint(0, 12)) for i in rng.choices(draws, weights)[0]()]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_pieces_of_random_ids_join_to_the_decoded_whole(kind: Callable[[], Tokenizer]) -> None:
    tokenizer, rng = kind(), random.Random(1)
    for round_ in range(600):
        assert_joins(tokenizer, random_ids(tokenizer, rng), rng if round_ % 2 else None)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_pieces_of_real_text_join_to_the_decoded_whole(kind: Callable[[], Tokenizer]) -> None:
    tokenizer = kind()
    for text in [*CORPUS[:6], *TEXTS]:
        assert_joins(tokenizer, tokenizer.encode(text).ids)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_list_of_ids_joins(data: st.DataObject) -> None:
    tokenizer = data.draw(st.sampled_from(KINDS))()
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=30))
    assert_joins(tokenizer, ids)


def test_every_kind_of_broken_utf8_is_replaced_as_the_rust_library_does() -> None:
    char_of = {byte: char for char, byte in byte_level_alphabet().items()}
    tokenizer = Tokenizer(models.WordLevel({char_of[b]: b for b in range(256)}, unk_token=char_of[0]))
    tokenizer.decoder = decoders.ByteLevel()
    edges = [0x41, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC1, 0xC2, 0xE0, 0xE1, 0xED, 0xEF, 0xF0, 0xF4, 0xF5]
    for length in (1, 2, 3):
        for ids in itertools.product(edges, repeat=length):
            assert_joins(tokenizer, list(ids))
    rng = random.Random(2)
    for _ in range(3000):
        assert_joins(tokenizer, rng.choices(edges, k=rng.randint(4, 9)))


def test_byte_level_text_comes_with_the_token_that_completes_it() -> None:
    tokenizer = qwen_like()
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        detokenizer = detokenizer_factory(tokenizer)()
        sent = ""
        for count, token_id in enumerate(ids, 1):
            sent += detokenizer.push([token_id])
            assert sent == tokenizer.decode(ids[:count]).rstrip("\ufffd")


def test_sentencepiece_text_waits_only_for_runs_of_byte_tokens() -> None:
    tokenizer = llama2_like()
    a, smile = id_of(tokenizer, "a"), [id_of(tokenizer, f"<0x{b:02X}>") for b in "😀".encode()]
    detokenizer = detokenizer_factory(tokenizer)()
    assert detokenizer.push([a]) == "a"
    assert [detokenizer.push([i]) for i in smile] == [""] * 4  # the next byte could break them all
    assert detokenizer.push([a]) == "😀a"
    assert detokenizer.push([smile[1]]) == "\ufffd"  # cannot begin a character: broken for good
    assert detokenizer.push(smile) == "\ufffd" * 4
    assert detokenizer.push([a, smile[0]]) == "a"
    assert detokenizer.finish() == "\ufffd"


CHAINS = {
    "empty sequence": decoders.Sequence([]),
    "nested": decoders.Sequence([decoders.Sequence([decoders.ByteFallback()]), decoders.Fuse()]),
    "byte fallback alone": decoders.ByteFallback(),
    "fuse alone": decoders.Fuse(),
    "strip each token": decoders.Sequence([decoders.Strip(" ", 2, 0), decoders.ByteFallback()]),
    "strip two of the whole": decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 2, 0)]),
    "regex": decoders.Sequence([decoders.Replace(Regex("[ab]+|^$"), "<>"), decoders.ByteFallback()]),
    "byte level in a chain": decoders.Sequence([decoders.Replace("b", "Ġ"), decoders.ByteLevel()]),
    "fallback then first": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("_")]),
    "never first": decoders.Metaspace("_", prepend_scheme="never"),
}


@pytest.mark.parametrize("name", CHAINS)
def test_other_chains_of_decoders_join_too(name: str) -> None:
    words = ["a", "b", " ", "  ", " a", "  b", "_", "_a", "b_", "Ġ", "é", "ä½", "ł", "", "<0xF0>", "<0x9F>"]
    words += ["<0x98>", "<0x80>", "<0x41>", "<0x+5>", "<0xé>", "<0x4>", "##a", "##", " ."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = CHAINS[name]
    rng = random.Random(3)
    for _ in range(400):
        assert_joins(
            tokenizer, [rng.randrange(tokenizer.get_vocab_size() + 1) for _ in range(rng.randint(0, 9))]
        )


def test_an_unknown_decoder_goes_through_the_window(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = Tokenizer.from_str(qwen_like().to_str())
    # A replacement over the fused text is not one that can be run token by token.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("\r", "")])
    make = detokenizer_factory(tokenizer)
    assert isinstance(make(), WindowedDetokenizer)
    assert "window" in caplog.text
    for text in [*CORPUS[:6], *TEXTS]:
        ids = tokenizer.encode(text).ids
        pieces = pieces_of(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        if text == CORPUS[0]:
            assert pieces[:-1] == [tokenizer.decode([token_id]) for token_id in ids]


def test_the_window_makes_up_what_is_missing_at_the_end() -> None:
    detokenizer = WindowedDetokenizer(lambda ids: "".join("xé"[i] for i in ids) + "!" * (len(ids) == 3))
    assert detokenizer.push([0]) == "x"
    assert detokenizer.push([1]) == "é"
    assert detokenizer.push([0]) + detokenizer.finish() == "x!"


def test_decoding_work_grows_linearly_with_the_answer() -> None:
    decoded = 0

    def decode(ids: list[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return "\ufffd" if any(i == 1 for i in ids) else "x" * len(ids)

    for ids in ([0] * 4000, [1] * 4000):
        decoded = 0
        detokenizer = WindowedDetokenizer(decode)
        for token_id in ids:
            detokenizer.push([token_id])
        assert decoded < 8 * len(ids)


def test_the_token_table_is_filled_only_as_needed() -> None:
    asked: list[int] = []

    class Counting:
        decoder = decoders.ByteLevel()

        def get_added_tokens_decoder(self) -> dict[int, object]:
            return {}

        def id_to_token(self, token_id: int) -> str:
            asked.append(token_id)
            return "a"

    make = detokenizer_factory(Counting())  # type: ignore[arg-type]
    assert asked == []
    assert make().push([5, 7, 5]) + make().push([7]) == "aaaa"
    assert asked == [5, 7]
