"""What is asked: openings that share nothing, one history for all, room in the context."""

from __future__ import annotations

from pathlib import Path

import pytest

from mini_sglang.bench.conversation import SCRIPT, SUITE, Conversation, answer_text, check_room
from mini_sglang.errors import ContextLengthError
from mini_sglang.text.tokenizer import Tokenizer, load_tokenizer
from tests.tiny_folders import CHAT_TEMPLATE, tiny_folder

# As templates do that know no system message.
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return _tokenizer(tmp_path_factory.mktemp("chat"), CHAT_TEMPLATE)


def _tokenizer(folder: Path, template: str | None) -> Tokenizer:
    import json

    tiny_folder(folder)
    config = folder / "tokenizer_config.json"
    fields = json.loads(config.read_text())
    fields["chat_template"] = template
    config.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return load_tokenizer(folder, cache_dir=folder / "cache")


def shared(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, NO_SYSTEM + CHAT_TEMPLATE, None])
def test_rounds_share_no_more_than_the_template_writes_first(template: str | None, tmp_path: Path) -> None:
    tokenizer = _tokenizer(tmp_path, template)
    conversation = Conversation(SUITE)
    firsts = [conversation.prompt(tokenizer, number, 0) for number in range(12)]
    # A byte a token here: "<|im_start|>system\n" or "user\n", and the first digit of two numbers.
    assert max(shared(a, b) for a in firsts for b in firsts if a is not b) <= 9
    for turn, text in enumerate(SUITE):
        shown = tokenizer.decode(conversation.prompt(tokenizer, 3, turn))
        assert text in shown and "3. conversation." in shown
        assert all(asked in shown for asked in SUITE[:turn])


def test_a_turn_begins_with_the_turns_before_it_and_their_answers(tokenizer: Tokenizer) -> None:
    conversation = Conversation(SUITE)
    before = conversation.prompt(tokenizer, 1, 0)
    after = conversation.prompt(tokenizer, 1, 1)
    assert after[: len(before)] == before
    assert tokenizer.decode(after[len(before) :]).startswith(SCRIPT[0])
    assert conversation.prompt(tokenizer, 1, 2)[: len(after)] == after


def test_history_is_the_reference_answer_to_its_first_end_of_text(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("Yes, it is."), 2, *tokenizer.encode("and so on")]
    assert answer_text(tokenizer, ids) == "Yes, it is."
    conversation = Conversation(SUITE).with_answers(tokenizer, [ids])
    shown = tokenizer.decode(conversation.prompt(tokenizer, 1, 1))
    assert "Yes, it is." in shown and "and so on" not in shown and SCRIPT[0] not in shown
    assert answer_text(tokenizer, [2]) == ""


def test_one_prompt_is_one_turn(tokenizer: Tokenizer) -> None:
    ids = Conversation(("What is a tree?",)).prompt(tokenizer, 1, 0)
    assert tokenizer.decode(ids, skip_special=False).endswith(
        "<|im_start|>user\nWhat is a tree?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_room_is_that_of_the_longest_turn(tokenizer: Tokenizer) -> None:
    conversation = Conversation(("Hello",))
    needed = check_room(conversation, tokenizer, 10, None)
    longest = max(len(conversation.prompt(tokenizer, number, 0)) for number in range(30))
    assert longest + 10 <= needed
    assert check_room(conversation, tokenizer, 10, needed + 16) == needed
    with pytest.raises(ContextLengthError, match="the prompt's length in tokens is"):
        check_room(conversation, tokenizer, 10, needed + 15)
    with pytest.raises(ContextLengthError, match="max_new_tokens is 1000"):
        check_room(conversation, tokenizer, 1000, 512)
    suite = Conversation(SUITE)
    assert check_room(suite, tokenizer, 600, None) > len(suite.prompt(tokenizer, 1, 2)) + 600
    with pytest.raises(ContextLengthError, match="max_new_tokens is 600"):
        check_room(suite, tokenizer, 600, 2048)
