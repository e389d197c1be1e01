"""Every kind of bad input: its 4xx with a short sentence, and a server that is as it was."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.api.serving import CONTEXT, Client, settle

DEEP = 65


def refused(client: Client, status: int, **request: Any) -> dict[str, Any]:
    """Send it, check the refusal, then that a canary completes and nothing has leaked."""
    path = request.pop("path", "/generate")
    response = client.request(request.pop("method", "POST"), path, **request)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json" and response.headers["x-request-id"]
    assert len(response.text) < 1500
    error: dict[str, Any] = response.json()["error"]
    assert error["message"][-1] in ".!" and error["code"]
    assert "Traceback" not in response.text
    canary = client.ask(prompt="canary", max_new_tokens=2, ignore_eos=True)
    assert canary["completion_tokens"] == 2
    settle(lambda: client.service.in_flight == 0, "an idle server")
    stats = client.service.pool.stats()
    assert (stats.inflight, stats.queued, stats.reserved) == (0, 0, 0)
    counters = stats.engines[0].counters
    assert counters["kv_tokens_private"] == 0
    return error


JSON = {"content-type": "application/json"}
MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"prompt": "x"',
    "trailing": b'{"prompt": "x"} x',
    "two": b'{"prompt": "x"}{}',
    "single quotes": b"{'prompt': 'x'}",
    "comment": b'{"prompt": "x" /* no */}',
    "bom": b'\xef\xbb\xbf{"prompt": "x"}',
    "utf-16": '{"prompt": "x"}'.encode("utf-16"),
    "bad utf-8": b'{"prompt": "\xff\xfe"}',
    "bad utf-8 key": b'{"\xff": 1}',
    "overlong utf-8": b'{"prompt": "\xc0\xaf"}',
    "surrogate as utf-8": b'{"prompt": "\xed\xa0\x80"}',
    "lone high surrogate": rb'{"prompt": "\ud800"}',
    "lone low surrogate": rb'{"prompt": "a\udc00b"}',
    "swapped surrogates": rb'{"prompt": "\udc00\ud800"}',
    "control character": b'{"prompt": "a\nb"}',
    "nan": b'{"prompt": "x", "temperature": NaN}',
    "infinity": b'{"prompt": "x", "temperature": Infinity}',
    "minus infinity": b'{"prompt": "x", "temperature": -Infinity}',
    "1e400": b'{"prompt": "x", "temperature": 1e400}',
    "digits": b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}",
    "deep": b'{"prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "very deep": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_is_not_json(client: Client, name: str) -> None:
    error = refused(client, 400, content=MALFORMED[name], headers=JSON)
    assert error["code"] == "invalid_json"


@pytest.mark.parametrize("body", ["[]", '"x"', "null", "1", "true"])
def test_json_that_is_no_object(client: Client, body: str) -> None:
    refused(client, 400, content=body, headers=JSON)


HUGE = 10**400
FIELDS: list[tuple[str, Any]] = [
    *(
        ("prompt", value)
        for value in ("", None, [], {}, True, 1, 1.5, [[]], [""], ["a", None], [["a"]], [True])
    ),
    *(("prompt", value) for value in ([1.5], [-1], [1 << 31], [10**30], [1, "a"], ["a", 1], [None], [[[1]]])),
    ("prompt", [300]),  # past the vocabulary
    *(("max_new_tokens", value) for value in (0, -1, 1.0, True, "1", None, HUGE, 10**7)),
    *(("min_new_tokens", value) for value in (-1, True, 10**7)),
    *(("temperature", value) for value in (-0.1, 2.1, True, "1", None, [], HUGE)),
    *(("top_p", value) for value in (0, -1, 1.1, True, "x")),
    *(("top_k", value) for value in (-1, 1.5, 1 << 31, True)),
    *(("min_p", value) for value in (-0.1, 1.1)),
    *(("repetition_penalty", value) for value in (0, -1, 11)),
    *(("presence_penalty", value) for value in (-2.1, 2.1, None)),
    *(("frequency_penalty", value) for value in (-2.1, 2.1, "0")),
    *(("top_logprobs", value) for value in (-1, 21, True, 3)),  # 3: without logprobs
    *(("logprobs", value) for value in (1, "true", None)),
    *(("stream", value) for value in (1, "yes", None)),
    *(("ignore_eos", value) for value in (0, "no")),
    *(("seed", value) for value in (1.5, True, 1 << 63, -(1 << 63) - 1, "1", HUGE)),
    *(("stop", value) for value in ("", [""], ["a"] * 17, [1], 1, {}, ["x" * 2000], None)),
    *(("stop_token_ids", value) for value in ([-1], [1 << 31], ["1"], [True], [0] * 65, [300], 3)),
    *(
        ("logit_bias", value)
        for value in ({"x": 1}, {"1": 101}, {"1": True}, {"-1": 1}, {"300": 1}, [1], {"²": 1})
    ),
    ("logit_bias", {str(number): 1 for number in range(1025)}),
    ("logit_bias", {"9" * 300: 1}),
    *(("cache_salt", value) for value in ("x" * 257, 1, [])),
    *(("regex", value) for value in ("", "(", 5, "a" * 9000, "(a+)+$ [")),
    *(("json_schema", value) for value in ("{", 5, [], {"type": "nonsense"}, {"$ref": "#/nowhere"})),
    ("ebnf", "start: ("),
    ("json_object", 1),
    *((name, 1) for name in ("best_of", "model", "", "prompt ", "x" * 5000, "__class__")),
]


@pytest.mark.parametrize("name, value", FIELDS, ids=lambda value: f"{value!r:.40}")
def test_a_bad_field_is_named(client: Client, name: str, value: Any) -> None:
    body = {"prompt": "x", "max_new_tokens": 2, name: value}
    error = refused(client, 400, content=json.dumps(body), headers=JSON)
    assert name.strip()[:50] in error["message"]


@pytest.mark.parametrize("schema", [{"$ref": "#"}, {"properties": {"a": {"$ref": "#"}}}])
@pytest.mark.parametrize("regex", ["(a+)+$", ".{1,99999}"])
def test_a_hostile_grammar_is_compiled_or_refused(client: Client, schema: object, regex: str) -> None:
    for grammar in ({"json_schema": schema}, {"regex": regex}):
        response = client.post("/generate", json={"prompt": "x", "max_new_tokens": 2, **grammar})
        assert response.status_code in (200, 400), response.text


def test_two_grammars(client: Client) -> None:
    refused(client, 400, json={"prompt": "x", "regex": "a", "json_object": True})


@pytest.mark.parametrize(
    "messages",
    [
        [],
        {},
        "x",
        [1],
        [None],
        [{}],
        [{"role": "user"}],
        [{"role": "king", "content": "x"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": ["user"], "content": "x"}],
    ],
)
def test_bad_messages(client: Client, messages: Any) -> None:
    refused(client, 400, json={"messages": messages})


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"prompt": "x", "messages": [{"role": "user", "content": "x"}]},
        {"prompt": "x", "chat_template_kwargs": {"a": 1}},
        {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"messages": []}},
        {"prompt": "x", "min_new_tokens": 9, "max_new_tokens": 2},
        {"prompt": ["x"] * 129},
        {"prompt": [[1]] * 5000},
    ],
)
def test_fields_that_do_not_go_together(client: Client, body: dict[str, Any]) -> None:
    refused(client, 400, json=body)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_context(client: Client, stream: bool) -> None:
    error = refused(client, 400, json={"prompt": "x" * CONTEXT, "stream": stream})
    assert error["code"] == "context_length_exceeded" and str(CONTEXT) in error["message"]


def test_one_bad_prompt_of_many_refuses_all(client: Client) -> None:
    refused(client, 400, json={"prompt": ["fine", [299]], "stream": True})


def test_one_word_of_half_a_megabyte(client: Client) -> None:
    refused(client, 400, json={"prompt": "w" * (1 << 19)})


def test_an_error_echoes_at_most_two_hundred_characters(client: Client) -> None:
    error = refused(client, 400, json={"prompt": "x", "stop": ["Q" * 5000]})
    assert 100 < error["message"].count("Q") <= 200
    error = refused(client, 400, json={"prompt": "x", "Q" * 5000: 1})
    assert error["message"].count("Q") <= 200


@pytest.mark.parametrize(
    "body",
    [{}, {"tokens": []}, {"tokens": "x"}, {"tokens": [-1]}, {"tokens": [300]}, {"tokens": [1], "x": 1}],
)
def test_bad_ids_to_detokenize(client: Client, body: dict[str, Any]) -> None:
    refused(client, 400, path="/detokenize", json=body)


@pytest.mark.parametrize("body", [{}, {"prompt": 5}, {"prompt": "x", "messages": []}, {"prompt": None}])
def test_bad_text_to_tokenize(client: Client, body: dict[str, Any]) -> None:
    refused(client, 400, path="/tokenize", json=body)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/json", "content-encoding": "gzip"},
    ],
)
def test_another_content_type(client: Client, headers: dict[str, str]) -> None:
    refused(client, 415, content=b'{"prompt": "x"}', headers=headers)


def test_a_body_that_is_too_large_with_and_without_a_length(client: Client) -> None:
    large = b'{"prompt": "' + b"x" * (9 << 20) + b'"}'
    refused(client, 413, content=large, headers=JSON)
    pieces = (large[at : at + 65536] for at in range(0, len(large), 65536))
    refused(client, 413, content=pieces, headers=JSON)


@pytest.mark.parametrize("path", ["/nope", "/generate/", "/v2", "//generate", "/generate%2F"])
def test_no_such_path(client: Client, path: str) -> None:
    refused(client, 404, path=path, json={})


@pytest.mark.parametrize(
    "method, path", [("GET", "/generate"), ("PUT", "/generate"), ("POST", "/health"), ("DELETE", "/metrics")]
)
def test_another_method(client: Client, method: str, path: str) -> None:
    response = client.request(method, path, headers=JSON)
    assert response.status_code == 405 and response.headers["allow"]
    refused(client, 405, method=method, path=path, headers=JSON)


def test_headers_that_are_too_large(client: Client) -> None:
    refused(client, 431, json={"prompt": "x"}, headers={"x-large": "x" * 40000})


def test_the_openai_api_tells_it_in_its_own_shape(client: Client) -> None:
    for path, body, status in (("/v1/nope", b"{}", 404), ("/v1/completions", b"{", 400)):
        error = client.post(path, content=body, headers=JSON)
        assert error.status_code == status
        assert set(error.json()["error"]) == {"message", "type", "param", "code"}
