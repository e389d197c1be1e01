"""What is got ready in the background at the start, so that the first grammar does not wait for it."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil
import pytest

from mini_sglang.api.loading import prepare_quietly
from mini_sglang.backend.grammar import GrammarCompiler
from mini_sglang.errors import ModelLoadError
from mini_sglang.text.tokenizer import Tokenizer, load_tokenizer
from mini_sglang.types import SamplingParams, Vocabulary
from tests.api.serving import Client, serving, settle


def helpers() -> set[int]:
    """Processes that compile grammars."""
    found = set()
    for child in psutil.Process().children():
        try:
            if "mini_sglang.backend.grammar_check" in child.cmdline():
                found.add(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture
def tokenizer(tiny_model: Path, tmp_path: Path) -> Tokenizer:
    return load_tokenizer(tiny_model, cache_dir=tmp_path)


def test_the_server_prepares_for_grammars_that_nobody_has_asked_for_yet(tiny_model: Path) -> None:
    before = helpers()

    def prepared(client: Client) -> bool:
        grammars = client.service._grammars
        assert grammars is not None
        return grammars._checker is not None and bool(grammars._checker._idle)

    with serving(tiny_model) as client:
        settle(lambda: prepared(client), "the helper")
        assert helpers() - before
        assert client.ask(prompt="Hi", regex="a{3}", max_new_tokens=9)["text"] == "aaa"
    settle(lambda: not helpers() - before, "the end of the helpers")


def test_closing_in_the_midst_of_it_leaves_no_helper(tokenizer: Tokenizer) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def slow() -> Vocabulary:
        begun.set()
        assert go_on.wait(30)
        return tokenizer.vocabulary()

    before = helpers()
    grammars = GrammarCompiler(slow, tokenizer.vocab_size, tokenizer.eos_ids)
    preparing = threading.Thread(target=prepare_quietly, args=(grammars,))
    preparing.start()
    assert begun.wait(30)
    closing = threading.Thread(target=grammars.close)
    closing.start()
    go_on.set()
    for thread in (preparing, closing):
        thread.join(60)
        assert not thread.is_alive()
    settle(lambda: not helpers() - before, "the end of the helpers")


def test_closed_before_it_begins_it_leaves_no_helper(tokenizer: Tokenizer) -> None:
    before = helpers()
    grammars = GrammarCompiler(tokenizer.vocabulary, tokenizer.vocab_size, tokenizer.eos_ids)
    grammars.close()
    prepare_quietly(grammars)
    settle(lambda: not helpers() - before, "the end of the helpers", limit=20)


def test_a_tokenizer_that_fits_no_grammar_is_told_to_the_request_that_has_one() -> None:
    def none() -> Vocabulary:
        raise ModelLoadError("No grammar can be followed.")

    grammars = GrammarCompiler(none, 10)
    prepare_quietly(grammars)
    with pytest.raises(ModelLoadError):
        grammars.new(SamplingParams(regex="a"))


def test_closing_does_not_wait_for_a_helper_that_hangs_while_it_starts(tokenizer: Tokenizer) -> None:
    before = helpers()
    grammars = GrammarCompiler(tokenizer.vocabulary, tokenizer.vocab_size, tokenizer.eos_ids)
    preparing = threading.Thread(target=prepare_quietly, args=(grammars,))
    preparing.start()
    settle(lambda: bool(helpers() - before), "a helper")
    for pid in helpers() - before:
        psutil.Process(pid).suspend()
    grammars.close()
    preparing.join(30)
    assert not preparing.is_alive()
    settle(lambda: not helpers() - before, "the end of the helpers")
