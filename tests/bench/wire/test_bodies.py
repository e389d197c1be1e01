"""What each dialect sends, against what its server takes: our own server's forms are the oracle of ours."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mini_sglang.api.native import GENERATE
from mini_sglang.api.schemas import sampling_from
from mini_sglang.bench.wire import DIALECTS, Ask, WireError, dialect

ASK = {"new_tokens": 7, "temperature": 0.0, "seed": 3, "priority": 2, "model": "m"}


def body(name: str, **fields: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dialect(name).body(Ask(**{**ASK, **fields}))))


def test_our_own_form_takes_ours() -> None:
    values = GENERATE.read(body("ours", ids=(1, 2)))
    params = sampling_from(values)
    assert values["prompt"] == [1, 2] and values["stream"] and values["return_token_ids"]
    assert (params.max_new_tokens, params.temperature, params.seed) == (7, 0.0, 3)
    assert params.ignore_eos and params.priority == 2
    assert GENERATE.read(body("ours", messages=[{"role": "user", "content": "x"}]))["messages"]


@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_streams_and_names_the_tokens_wanted(name: str) -> None:
    form = dialect(name).takes[0]
    prompt = {"ids": [5, 6], "text": "hello", "messages": [{"role": "user", "content": "hello"}]}[form]
    made = body(name, **{form: prompt})
    assert made["stream"] is True
    assert prompt in made.values()
    limits = [made, made.get("sampling_params", {}), made.get("options", {})]
    names = ("max_new_tokens", "max_tokens", "n_predict", "num_predict")
    assert [one[key] for one in limits for key in names if key in one] == [7]


@pytest.mark.parametrize("name", [name for name in DIALECTS if "text" in DIALECTS[name].takes])
def test_a_text_is_taken_where_ids_are_not_given(name: str) -> None:
    assert "hello" in json.dumps(body(name, text="hello"))


@pytest.mark.parametrize("name", DIALECTS)
def test_extra_fields_win(name: str) -> None:
    assert body(name, text="hello", extra={"stream": False, "x": 1})["stream"] is False


def test_end_of_text_is_ignored_only_where_it_is_asked_for() -> None:
    assert body("openai", text="a")["ignore_eos"] is True
    # OpenAI's own servers refuse what they do not know.
    assert "ignore_eos" not in body("openai", text="a", ignore_eos=False)
    assert body("sglang", text="a")["sampling_params"]["ignore_eos"] is True
    assert json.loads(body("transformers", text="a")["generation_config"])["eos_token_id"] == [-1]


def test_a_prompt_of_the_wrong_form_is_refused() -> None:
    with pytest.raises(WireError, match="must be given as text"):
        dialect("ollama").body(Ask(1, ids=[1]))


def test_an_unknown_dialect_is_refused_with_those_there_are() -> None:
    with pytest.raises(WireError, match=r"no dialect 'soap'; there are ours, openai"):
        dialect("soap")
