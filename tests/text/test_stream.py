from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from tokenizers import Tokenizer as RustTokenizer

from mini_sglang.text.stream import TextStream
from mini_sglang.text.tokenizer import Tokenizer
from mini_sglang.types import FinishReason, SamplingParams, TokenEvent
from tests.text.tiny_tokenizers import CORPUS, llama2_like, qwen_like, word_piece

KINDS = [qwen_like, llama2_like, word_piece]


def run(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    params: SamplingParams | None = None,
    *,
    per_step: int = 1,
    finish: FinishReason = FinishReason.LENGTH,
    matched: int | None = None,
) -> tuple[list[str], TextStream]:
    """Stream ``ids`` as an engine would; the pieces up to the end or the stop string."""
    stream = TextStream(tokenizer, params or SamplingParams())
    pieces = []
    steps = [tuple(ids[i : i + per_step]) for i in range(0, len(ids), per_step)] or [()]
    for index, step in enumerate(steps):
        last = index == len(steps) - 1
        event = TokenEvent(
            "r", step, finish=finish if last else None, matched_token_id=matched if last else None
        )
        pieces.append(stream.push(event))
        if stream.stopped:
            break
    return pieces, stream


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_pieces_join_to_the_decoded_whole(kind: Callable[[], RustTokenizer]) -> None:
    tokenizer, rng = Tokenizer(kind()), random.Random(5)
    for _ in range(400):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randint(0, 20))]
        pieces, stream = run(tokenizer, ids, per_step=rng.randint(1, 4))
        assert "".join(pieces) == tokenizer.decode(ids)
        assert stream.matched_stop is None
        assert not stream.stopped


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_any_part_of_the_text_stops_it_there(kind: Callable[[], RustTokenizer]) -> None:
    tokenizer, rng = Tokenizer(kind()), random.Random(6)
    for _ in range(300):
        ids = tokenizer.encode(rng.choice(CORPUS), add_special=False)
        whole = tokenizer.decode(ids)
        start = rng.randrange(len(whole) - 1)
        stop = whole[start : start + rng.randint(1, 12)]
        pieces, stream = run(tokenizer, ids, SamplingParams(stop=(stop,)), per_step=rng.randint(1, 3))
        assert "".join(pieces) == whole[: whole.index(stop)]
        assert stream.matched_stop == stop
        assert stream.stopped
        # Steps that were already under way are dropped.
        assert stream.push(TokenEvent("r", (ids[0],), finish=FinishReason.ABORT)) == ""
        assert stream.matched_stop == stop


def test_a_stop_string_that_is_only_begun_is_text() -> None:
    tokenizer = Tokenizer(qwen_like())
    ids = tokenizer.encode("The capital of France")
    pieces, stream = run(tokenizer, ids, SamplingParams(stop=("France is", "xyz")))
    assert "".join(pieces) == "The capital of France"
    assert "France" not in "".join(pieces[:-1])
    assert not stream.stopped


def test_a_stop_string_completed_by_the_last_flush() -> None:
    tokenizer = Tokenizer(qwen_like())
    half = tokenizer.encode("😀")[:1]
    stop = SamplingParams(stop=("\ufffd",))
    pieces, stream = run(tokenizer, [*tokenizer.encode("Hi"), *half], stop)
    assert "".join(pieces) == "Hi"
    assert stream.matched_stop == "\ufffd"


def test_the_token_that_ends_the_answer_gives_no_text() -> None:
    tokenizer = Tokenizer(qwen_like())
    hello, dog = tokenizer.encode("Hello the"), tokenizer.encode(" dog")
    assert len(dog) == 1
    for per_step in (1, 50):
        pieces, stream = run(
            tokenizer, hello + dog, per_step=per_step, finish=FinishReason.STOP, matched=dog[0]
        )
        assert "".join(pieces) == "Hello the"
        assert stream.matched_stop == dog[0]
        assert not stream.stopped  # the engine ended it itself


def test_a_stop_string_before_the_ending_token_wins() -> None:
    tokenizer = Tokenizer(qwen_like())
    ids, end = tokenizer.encode("Hello the"), tokenizer.encode("<|im_end|>")
    params = SamplingParams(stop=("lo th",))
    pieces, stream = run(tokenizer, ids + end, params, per_step=50, finish=FinishReason.STOP, matched=end[0])
    assert ("".join(pieces), stream.matched_stop) == ("Hel", "lo th")


@pytest.mark.parametrize("finish", [FinishReason.ABORT, FinishReason.ERROR, FinishReason.LENGTH])
def test_every_other_end_gives_the_text_that_was_held(finish: FinishReason) -> None:
    tokenizer = Tokenizer(llama2_like())
    smile = tokenizer.encode("😀", add_special=False)[-4:]
    stream = TextStream(tokenizer, SamplingParams(stop=("abc",)))
    assert stream.push(TokenEvent("r", tuple(smile))) == ""
    assert stream.push(TokenEvent("r", finish=finish)) == "😀"
    assert stream.push(TokenEvent("r", tuple(smile), finish=finish)) == ""
