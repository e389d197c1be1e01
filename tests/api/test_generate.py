"""``/generate``, ``/tokenize``, ``/detokenize``: what comes out, in each of its forms."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.serving import CONTEXT, Client

CHAT = [{"role": "user", "content": "Hi"}]


def joined(lines: list[dict[str, Any]], index: int | None = None) -> tuple[str, list[int], dict[str, Any]]:
    """Text, ids and the terminal line of one answer; asserts that its order is right and its end one."""
    own = [line for line in lines if line.get("index") == index]
    *deltas, last = own
    assert last.get("event") in ("done", "error")
    assert all("event" not in delta and set(delta) >= {"text_delta"} for delta in deltas)
    ids = [token_id for delta in deltas for token_id in delta.get("token_ids", [])]
    return "".join(delta["text_delta"] for delta in deltas), ids, last


def test_lines_are_as_the_contract_says(client: Client) -> None:
    lines = client.lines(prompt="Hi", max_new_tokens=4, ignore_eos=True)
    assert all(set(line) == {"text_delta"} for line in lines[:-1]) and len(lines) >= 2
    assert lines[-1]["event"] == "done" and lines[-1]["finish_reason"] == "length"
    assert lines[-1]["prompt_tokens"] == 2 and lines[-1]["completion_tokens"] == 4


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 0.8, "seed": 1, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"logit_bias": {"100": 5.5}},
    ],
)
def test_the_ledger_streamed_whole_and_usage_agree(client: Client, sampling: dict[str, Any]) -> None:
    body = {"prompt": "The ledger", "max_new_tokens": 40, "return_token_ids": True, **sampling}
    text, ids, done = joined(client.lines(**body))
    whole = client.ask(**body)
    assert (text, ids) == (whole["text"], whole["token_ids"])
    assert len(ids) == done["completion_tokens"] == whole["completion_tokens"]
    assert done["finish_reason"] == whole["finish_reason"]
    assert client.ask("/detokenize", tokens=ids)["text"] == text or whole["matched_stop"] is not None


def test_a_cached_prompt_gives_the_same_and_says_so(client: Client) -> None:
    body = {"prompt": "x" * 64, "max_new_tokens": 8, "return_token_ids": True}
    cold, warm = client.ask(**body), client.ask(**body)
    assert warm["cached_tokens"] >= 48 and cold["cached_tokens"] == 0
    assert warm["token_ids"] == cold["token_ids"]


def test_a_salt_keeps_prefixes_apart(client: Client) -> None:
    body = {"prompt": "y" * 64, "max_new_tokens": 1}
    assert client.ask(**body, cache_salt="a")["cached_tokens"] == 0
    assert client.ask(**body, cache_salt="b")["cached_tokens"] == 0
    assert client.ask(**body)["cached_tokens"] == 0
    assert client.ask(**body, cache_salt="a")["cached_tokens"] >= 48


def test_sse_has_the_same_events(client: Client) -> None:
    body = {"prompt": "Hi", "max_new_tokens": 4, "stream": True, "return_token_ids": True}
    response = client.post("/generate", json=body, headers={"accept": "text/event-stream"})
    assert response.headers["content-type"].startswith("text/event-stream")
    frames = response.text.split("\n\n")
    assert frames.pop() == ""
    events = [json.loads(frame.removeprefix("data: ")) for frame in frames]
    plain = client.lines(prompt="Hi", max_new_tokens=4, return_token_ids=True)
    assert joined(events)[:2] == joined(plain)[:2]


def test_many_prompts_each_with_its_index_and_end(client: Client) -> None:
    prompts = ["One", [70, 71, 72], "Three"]
    body = {"max_new_tokens": 12, "return_token_ids": True}
    alone = [client.ask(prompt=prompt, **body) for prompt in prompts]
    lines = client.lines(prompt=prompts, **body)
    assert sum("event" in line for line in lines) == 3
    outputs = client.ask(prompt=prompts, **body)["outputs"]
    for index, one in enumerate(alone):
        text, ids, done = joined(lines, index)
        assert (text, ids) == (one["text"], one["token_ids"])
        assert outputs[index]["token_ids"] == ids and outputs[index]["index"] == index
        assert done["completion_tokens"] == len(ids)


def test_messages_are_the_chat_template_and_a_prompt_is_not(client: Client) -> None:
    ids = client.ask("/tokenize", messages=CHAT)["tokens"]
    body = {"max_new_tokens": 6, "return_token_ids": True}
    chat = client.ask(messages=CHAT, **body)
    assert chat["prompt_tokens"] == len(ids)
    assert chat["token_ids"] == client.ask(prompt=ids, **body)["token_ids"]
    assert client.ask(prompt="Hi", **body)["prompt_tokens"] == 2


def test_a_special_token_spelled_in_a_message_is_text_and_in_a_prompt_a_token(client: Client) -> None:
    hostile = [{"role": "user", "content": "<|im_end|>"}]
    assert client.ask("/tokenize", prompt="<|im_end|>")["tokens"] == [2]
    assert client.ask("/tokenize", messages=hostile)["tokens"].count(2) == 1


def test_a_stop_string_ends_the_answer_before_it(client: Client) -> None:
    whole = client.ask(prompt="Stop", max_new_tokens=30, ignore_eos=True)["text"]
    stop = whole[4:6]
    text, _, done = joined(client.lines(prompt="Stop", max_new_tokens=30, ignore_eos=True, stop=stop))
    assert text == whole[: whole.index(stop)]
    assert done["finish_reason"] == "stop" and done["matched_stop"] == stop


def test_a_stop_token_is_told(client: Client) -> None:
    ids = client.ask(prompt="Stop", max_new_tokens=9, ignore_eos=True, return_token_ids=True)["token_ids"]
    end = ids[5]
    body = {"max_new_tokens": 9, "ignore_eos": True, "return_token_ids": True, "stop_token_ids": [end]}
    answer = client.ask(prompt="Stop", **body)
    assert answer["matched_stop"] == end and answer["token_ids"] == ids[: ids.index(end) + 1]


def test_logprobs_come_with_each_token(client: Client) -> None:
    body = {"prompt": "Hi", "max_new_tokens": 5, "logprobs": True, "top_logprobs": 2, "prompt_logprobs": True}
    lines = client.lines(**body, return_token_ids=True)
    _, ids, done = joined(lines)
    told = [one for line in lines[:-1] for one in line["logprobs"]]
    assert [one["token_id"] for one in told] == ids
    assert all(len(one["top"]) == 2 and one["logprob"] <= 0 for one in told)
    assert len(done["prompt_logprobs"]) == 1
    assert client.ask(**body)["logprobs"] == told


def test_max_new_tokens_is_capped_to_the_context_and_the_response_says_so(client: Client) -> None:
    prompt = list(range(100, 200)) * 40
    answer = client.ask(prompt=prompt, max_new_tokens=1000, ignore_eos=True)
    assert answer["max_new_tokens"] == answer["completion_tokens"] == CONTEXT - len(prompt) - 16


def test_text_goes_through_unharmed(client: Client) -> None:
    for text in ("NUL \x00 and \r\n", "emoji 👩‍👩‍👧 今天 e\u0301", "\u200b\ufeff", "a" * 3000):
        ids = client.ask("/tokenize", prompt=text)["tokens"]
        assert client.ask("/detokenize", tokens=ids)["text"] == text
        assert client.ask(prompt=text, max_new_tokens=1)["prompt_tokens"] == len(ids)


def test_an_empty_text_has_no_tokens(client: Client) -> None:
    assert client.ask("/tokenize", prompt="") == {"tokens": [], "count": 0, "max_model_len": CONTEXT}


def test_structured_output_is_of_its_form(client: Client) -> None:
    answer = client.ask(prompt="n", regex="[0-9]{3}", max_new_tokens=20)
    assert answer["text"].isdecimal() and len(answer["text"]) == 3
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    told = client.ask(prompt="n", json_schema=schema, max_new_tokens=200, temperature=0)["text"]
    assert json.loads(told) == {"a": 1}
