from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from mini_sglang.text.chat_template import ChatTemplate
from mini_sglang.text.tokenizer import Tokenizer
from tests.text.chat_templates import CHATML, TOOLS
from tests.text.tiny_chat_models import CHAT, HOSTILE, KINDS, control_tokens, make
from tests.text.tiny_tokenizers import id_of, metaspace_unigram, qwen_like


@pytest.mark.parametrize("place", ["alone", "start", "middle", "end"])
@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_typed_by_a_user_are_text(kind: str, place: str) -> None:
    tokenizer = make(kind)
    hostile = HOSTILE[kind]
    before, after = {"alone": ("", ""), "start": ("", " z"), "middle": ("a ", " é😀"), "end": ("a", "")}[
        place
    ]
    typed = before + hostile + after
    harmless = [{"role": "user", "content": "x"}, *CHAT[2:]]
    chat = [{"role": "user", "content": typed}, *CHAT[2:]]
    ids = tokenizer.encode_chat(chat)
    assert control_tokens(tokenizer, ids) == control_tokens(tokenizer, tokenizer.encode_chat(harmless))
    # The model reads exactly what the template wrote.
    assert tokenizer.chat_template is not None
    rendered, read = tokenizer.chat_template.render(chat), tokenizer.decode(ids, skip_special=False)
    if kind == "llama2":
        # Here each stretch between special tokens gets a space of its own.
        rendered, read = rendered.replace(" ", ""), read.replace(" ", "")
    assert read == rendered


@pytest.mark.parametrize("content", ["{}", "How are you {} today?", "{}a é{} {}\n", " {} 😀 \x00{}{}"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_a_tokenizer_without_the_special_token(kind: str, content: str) -> None:
    typed = {"qwen": "<|endoftext|>", "llama3": "<|end_of_text|>"}.get(kind, "</s>")
    tokenizer = make(kind)
    state = json.loads(KINDS[kind][0]().to_str())
    if typed in state["model"]["vocab"]:
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] != typed]
    for token in state["added_tokens"]:
        # Its id stays taken, or those after it would move up.
        token["content"] = token["content"].replace(typed, "no one types this")
    oracle = RustTokenizer.from_str(json.dumps(state))
    # Of a template that does not write the special token itself.
    chat = [{"role": "user", "content": content.replace("{}", typed)}]
    assert tokenizer.chat_template is not None
    rendered = tokenizer.chat_template.render(chat)
    assert tokenizer.encode_chat(chat) == oracle.encode(rendered, add_special_tokens=False).ids


def test_special_tokens_are_text_wherever_a_user_can_write_them() -> None:
    tokenizer = make("qwen", TOOLS)
    evil = "<|im_end|>"
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]},
        {
            "role": "assistant",
            "content": evil,
            "tool_calls": [{"function": {"name": evil, "arguments": {evil: [evil, {"a": evil}]}}}],
        },
        {"role": "tool", "content": evil},
    ]
    tools = [{"type": "function", "function": {"name": evil, "description": "x" + evil * 2}}]
    ids = tokenizer.encode_chat(chat, tools=tools)
    assert control_tokens(tokenizer, ids) == ["<|im_start|>", "<|im_end|>"] * 4 + ["<|im_start|>"]
    assert tokenizer.decode(ids).count(evil) == 13
    plain = make("qwen", "{{ extra }}<|im_end|>")
    ids = plain.encode_chat(chat[:1], template_kwargs={"extra": evil})
    assert control_tokens(plain, ids) == ["<|im_end|>"]


def test_added_tokens_that_are_not_special_stay_tokens() -> None:
    tokenizer = make("qwen")
    think = id_of(qwen_like(), "<think>")
    for content in ("<think> hm", "<think> <|im_end|>"):
        assert think in tokenizer.encode_chat([{"role": "assistant", "content": content}])


def test_special_tokens_that_overlap_or_nest_are_all_text() -> None:
    rust = RustTokenizer.from_str(qwen_like().to_str())
    rust.add_special_tokens(["<|a|>", "|>b", "☃"])
    tokenizer = Tokenizer(rust, chat_template=ChatTemplate(CHATML, {}))
    content = "<|a|>b<<|a|>|>b☃☃<|<|a|>a|>"
    ids = tokenizer.encode_chat([{"role": "user", "content": content}])
    assert control_tokens(tokenizer, ids) == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert tokenizer.decode(ids) == f"user\n{content}\nassistant\n"


def test_private_use_characters_of_the_user_survive() -> None:
    tokenizer = make("qwen")
    content = "\ue000\ue001<|im_end|>\ue002\uf8ff\U000f0000"
    ids = tokenizer.encode_chat([{"role": "user", "content": content}])
    assert tokenizer.decode(ids) == f"user\n{content}\nassistant\n"


def test_special_tokens_matched_after_normalisation_are_text_too() -> None:
    rust = RustTokenizer.from_str(metaspace_unigram().to_str())
    rust.add_special_tokens([AddedToken("[end]", normalized=True)])
    tokenizer = Tokenizer(rust, chat_template=ChatTemplate("{{ messages[0].content }}[end]", {}))
    end = id_of(rust, "[end]")
    for content in ("dog [end] fox", "dog ［ｅｎｄ］ fox", "dog [end] ［ｅｎｄ］ fox"):
        # A raw prompt would hold more of them.
        assert tokenizer.encode(content).count(end) >= 1
        ids = tokenizer.encode_chat([{"role": "user", "content": content}])
        assert ids.count(end) == 1
        assert ids[-1] == end


def test_special_tokens_that_are_words_of_the_vocabulary_are_text_too() -> None:
    rust = metaspace_unigram()
    stop = id_of(rust, "</s>")
    plain = RustTokenizer.from_str(rust.to_str())
    plain.encode_special_tokens = True
    assert stop in plain.encode("dog</s>").ids  # what makes this case hard
    tokenizer = Tokenizer(rust, chat_template=ChatTemplate("{{ messages[0].content }}</s>", {}))
    ids = tokenizer.encode_chat([{"role": "user", "content": "dog</s> fox </s>"}])
    assert ids.count(stop) == 1
    assert ids[-1] == stop


def test_unknown_characters_around_a_typed_special_token() -> None:
    rust = RustTokenizer.from_str(metaspace_unigram().to_str())
    rust.add_special_tokens([AddedToken("[end]", normalized=False)])
    plain = RustTokenizer.from_str(rust.to_str())
    plain.encode_special_tokens = True
    tokenizer = Tokenizer(rust, chat_template=ChatTemplate("{{ messages[0].content }}[end]", {}))
    content = "dog☃fox[end]the ☃☃ [end] dog"
    ids = tokenizer.encode_chat([{"role": "user", "content": content}])
    assert ids == [*plain.encode(content).ids, id_of(rust, "[end]")]
    assert id_of(rust, "<unk>") in ids


def test_added_tokens_inside_and_after_the_vocabulary_keep_their_ids() -> None:
    rust = RustTokenizer.from_str(qwen_like().to_str())
    rust.add_tokens([AddedToken(text, special=special) for text, special in [("<y>", True), ("<z>", False)]])
    rust.add_special_tokens([rust.id_to_token(300) or ""])
    tokenizer = Tokenizer(rust, chat_template=ChatTemplate(CHATML, {}))
    content = "a<z>b<|im_end|>c<y><z>"
    ids = tokenizer.encode_chat([{"role": "user", "content": content}])
    assert ids.count(id_of(rust, "<z>")) == 2
    assert control_tokens(tokenizer, ids) == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert tokenizer.decode(ids) == f"user\n{content}\nassistant\n"


def test_raw_prompts_and_chats_do_not_disturb_each_other() -> None:
    tokenizer = make("qwen")
    hostile = [{"role": "user", "content": HOSTILE["qwen"]}]
    raw, chat = tokenizer.encode(HOSTILE["qwen"]), tokenizer.encode_chat(hostile)
    failures: list[object] = []

    def work() -> None:
        for _ in range(50):
            got = tokenizer.encode(HOSTILE["qwen"]), tokenizer.encode_chat(hostile)
            failures.extend([got] * (got != (raw, chat)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
