from __future__ import annotations

import time
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mini_sglang.errors import InvalidValueError, ModelLoadError
from mini_sglang.text import chat_template
from mini_sglang.text.chat_template import ChatTemplate, plain_messages
from tests.text.chat_templates import CHATML, GENERATION, LLAMA3, MISTRAL, TOOLS
from tests.text.tiny_tokenizers import qwen_like

OracleTokenizer: Any = PreTrainedTokenizerFast
SPECIAL = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}

USER = {"role": "user", "content": "What is  <b>2 + 2</b> & 'why'?\n"}
TURNS = [
    {"role": "system", "content": " Be brief. "},
    USER,
    {"role": "assistant", "content": " Four, 四, 😀 "},
    {"role": "user", "content": "More"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Zählt <zusammen>",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
    },
}
CALLS: list[dict[str, Any]] = [
    USER,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"a": 1.5, "é": [None]}}}
        ],
    },
    {"role": "tool", "name": "add", "content": "4"},
]

CASES: list[tuple[str, str, list[dict[str, Any]], dict[str, Any]]] = [
    ("chatml", CHATML, TURNS, {}),
    ("chatml one turn", CHATML, [USER], {}),
    ("llama 3", LLAMA3, TURNS, {}),
    ("llama 3 without system", LLAMA3, TURNS[1:], {"date_string": "26 Jul 2024"}),
    ("llama 3 tool result", LLAMA3, [USER, {"role": "tool", "content": 'a "quoted" é'}], {}),
    ("mistral", MISTRAL, TURNS, {}),
    ("tools", TOOLS, CALLS, {"tools": [TOOL]}),
    ("tools unused", TOOLS, TURNS, {}),
    ("template variable", TOOLS, TURNS, {"enable_thinking": False}),
    ("generation tag", GENERATION, TURNS, {}),
]


@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_renders_what_transformers_renders(
    case: tuple[str, str, list[dict[str, Any]], dict[str, Any]], generation_prompt: bool
) -> None:
    _, source, messages, extra = case
    variables = dict(extra)
    tools = variables.pop("tools", None)
    oracle = OracleTokenizer(tokenizer_object=qwen_like(), **SPECIAL).apply_chat_template(
        messages, chat_template=source, tools=tools, tokenize=False,
        add_generation_prompt=generation_prompt, **variables,
    )  # fmt: skip
    ours = ChatTemplate(source, SPECIAL).render(
        plain_messages(messages),
        tools=tools,
        add_generation_prompt=generation_prompt,
        template_kwargs=variables,
    )
    assert ours == oracle


@pytest.mark.parametrize(
    "source", [CHATML, LLAMA3, MISTRAL, TOOLS], ids=["chatml", "llama", "mistral", "tools"]
)
@pytest.mark.parametrize("text", ["Four", "Four, 四, 😀", "Four. Four", "## What is"])
def test_goes_on_with_the_last_message_as_transformers_does(source: str, text: str) -> None:
    messages = [USER, {"role": "assistant", "content": text}]
    oracle = OracleTokenizer(tokenizer_object=qwen_like(), **SPECIAL).apply_chat_template(
        messages, chat_template=source, tokenize=False, continue_final_message=True
    )
    template = ChatTemplate(source, SPECIAL)
    plain = plain_messages(messages)
    ours = template.render(plain, add_generation_prompt=False, continue_final_message=True)
    assert ours == oracle and ours.endswith(text)
    assert plain == plain_messages(messages)


def test_white_space_at_the_end_is_gone_on_with_too() -> None:
    """Also where the template strips: it is where the model was stopped."""
    messages = plain_messages([USER, {"role": "assistant", "content": " Four \n"}])
    options: Any = {"add_generation_prompt": False, "continue_final_message": True}
    stripping = ChatTemplate("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}", {})
    assert stripping.render(messages, **options).endswith("[Four \n")
    silent = ChatTemplate("{% for m in messages %}{{ m.content | length }}{% endfor %}", {})
    with pytest.raises(InvalidValueError, match="does not show the last message"):
        silent.render(messages, **options)


def test_tools_choose_the_template_made_for_them() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "with {{ tools | length }}"}, {})
    assert template.render([USER]) == "plain"
    assert template.render([USER], tools=[]) == "plain"
    assert template.render([USER], tools=[TOOL]) == "with 1"
    with pytest.raises(ModelLoadError, match="named rag, but none named default"):
        ChatTemplate({"rag": "x"}, {}).render([USER])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (MISTRAL, "Roles must alternate"),
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'"),
        ("{{ messages[0].content + 1 }}", "concatenate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
    ],
)
def test_what_the_template_refuses_becomes_a_sentence(source: str, reason: str) -> None:
    messages = plain_messages([USER, USER])
    with pytest.raises(InvalidValueError, match=reason):
        ChatTemplate(source, SPECIAL).render(messages)
    assert len(messages) == 2


def test_a_damaged_template_becomes_a_sentence() -> None:
    with pytest.raises(ModelLoadError, match="chat template is damaged"):
        ChatTemplate("{% for x in %}", {}).render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "{% set r = range(9999) %}{% for a in r %}{% for b in r %}{% for c in r %}" + "{% endfor %}" * 3,
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(90) }}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.05)
    with pytest.raises(InvalidValueError, match=r"more than 0\.05 seconds"):
        ChatTemplate(source, {}).render([USER])


def test_the_clock_starts_anew_with_each_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.2)
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    assert template.render([USER])
    time.sleep(0.25)
    assert template.render([USER]) == USER["content"]


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages is .*at least one message"),
        ("hello", "messages is .*at least one message"),
        ({"role": "user"}, "messages is .*at least one message"),
        ([["user", "hello"]], "objects with role and content"),
        ([{"content": "x"}], "role is None; it must be one of system"),
        ([{"role": "wizard", "content": "x"}], "role is 'wizard'"),
        ([{"role": 7, "content": "x"}], "role is 7"),
        ([{"role": ["user"], "content": "x"}], r"role is \['user'\]"),
        ([{"role": "user"}], "content is None; it must be a text in a message of role user"),
        ([{"role": "user", "content": None}], "content is None"),
        ([{"role": "user", "content": 5}], "content is 5"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "a text or a list of text parts"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "reads text only"),
        ([{"role": "user", "content": ["x"]}], "reads text only"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}], "reads text only"),
        ([{"role": "user", "content": "x", "extra": object()}], "JSON data"),
        ([{"role": "user", "content": "x", "extra": {1: 2}}], "whose keys are texts"),
    ],
)
def test_messages_that_are_not_allowed_become_a_sentence(messages: Any, sentence: str) -> None:
    with pytest.raises(InvalidValueError, match=sentence):
        plain_messages(messages)


def test_deep_nesting_becomes_a_sentence() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InvalidValueError, match="nested at most 64 deep"):
        plain_messages([{"role": "user", "content": "x", "extra": deep}])


def test_content_becomes_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    assert plain_messages(
        [
            {"role": "user", "content": parts, "name": None},
            {"role": "assistant", "content": None},
            {"role": "assistant", "content": None, "tool_calls": calls},
        ]
    ) == [
        {"role": "user", "content": "a b"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "tool_calls": calls},
    ]


def test_the_template_sees_plain_types_only() -> None:
    class Spy(str):
        def leak(self) -> str:
            return "leaked"

    messages = plain_messages([{"role": "user", "content": Spy("x"), "more": [Spy("y")]}])
    with pytest.raises(InvalidValueError, match="leak"):
        ChatTemplate("{{ messages[0].content.leak() }}", {}).render(messages)
    with pytest.raises(InvalidValueError, match="leak"):
        ChatTemplate("{{ messages[0].more[0].leak() }}", {}).render(messages)


def test_template_variables_cannot_replace_arguments() -> None:
    with pytest.raises(InvalidValueError, match="template_kwargs is 'tools'"):
        ChatTemplate("x", {}).render([USER], template_kwargs={"tools": []})
    assert ChatTemplate("{{ bos_token }}", {"bos_token": "<s>"}).render(
        [USER], template_kwargs={"bos_token": "<other>"}
    ) == "<other>"  # fmt: skip
