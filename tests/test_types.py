"""Sampling parameters are checked when made."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from mini_sglang.errors import InvalidValueError
from mini_sglang.types import SamplingParams

BAD = {
    "max_new_tokens": [0, -1, 1.0, "5", None, True, 10**9],
    "min_new_tokens": [-1, 129, None],
    "temperature": [-0.1, 2.1, float("nan"), float("inf"), 10**400, "1", None, True],
    "top_k": [-1, 1.5, None],
    "top_p": [0, 0.0, 1.1, float("nan"), 10**400, None],
    "min_p": [-0.1, 1.1, float("nan")],
    "repetition_penalty": [0, 5e-324, 0.0099, 10.1, -1, float("inf"), float("nan"), 10**400],
    "presence_penalty": [-2.1, 2.1, float("nan")],
    "frequency_penalty": [-2.1, 2.1, "0"],
    "logit_bias": [{1: 101}, {1: float("nan")}, {1: 10**400}, {-1: 0}, {"x": 0}, {1: True}, [1], None,
                   dict.fromkeys(range(2000), 1.0)],
    "seed": [1.5, "x", 2**63, True],
    "stop": ["", ["a", ""], ["x"] * 17, [1], None, "x" * 2000, ["a"] * 10_000],
    "stop_token_ids": [[-1], [1.0], [True], list(range(65)), "12", None],
    "ignore_eos": [1, "true", None],
    "logprobs": [1, None],
    "prompt_logprobs": [1, None],
    "top_logprobs": [-1, 21, True, 5],
}  # fmt: skip


@pytest.mark.parametrize("name, value", [(n, v) for n, values in BAD.items() for v in values])
def test_a_bad_value_is_one_sentence(name: str, value: object) -> None:
    with pytest.raises(InvalidValueError) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(f"{name} is ") and "must be" in message and len(message) < 500


@pytest.mark.parametrize("name", ["temperature", "max_new_tokens", "seed", "stop_token_ids"])
def test_a_number_too_long_to_write_down_is_one_sentence_too(name: str) -> None:
    value = [10**5000] if name == "stop_token_ids" else 10**5000
    with pytest.raises(InvalidValueError, match=f"^{name} is .* too long to show; it must be"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_an_unknown_parameter_is_refused() -> None:
    with pytest.raises(TypeError):
        SamplingParams(temprature=1)  # type: ignore[call-arg]


def test_values_are_normalised_and_frozen() -> None:
    params = SamplingParams(stop="END", stop_token_ids=[7], logit_bias={"5": 1}, temperature=1)  # type: ignore[arg-type]
    assert params.stop == ("END",) and params.stop_token_ids == (7,)
    assert dict(params.logit_bias) == {5: 1.0} and isinstance(params.temperature, float)
    with pytest.raises(FrozenInstanceError):
        params.temperature = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        params.logit_bias[5] = 2.0  # type: ignore[index]


def test_what_a_caller_changes_later_does_not_reach_the_parameters() -> None:
    stops, bias = ["a"], {1: 1.0}
    params = SamplingParams(stop=stops, logit_bias=bias)  # type: ignore[arg-type]
    stops.append("b")
    bias[2] = 2.0
    assert params.stop == ("a",) and dict(params.logit_bias) == {1: 1.0}


def test_edges_are_allowed() -> None:
    SamplingParams(max_new_tokens=1, temperature=2, top_p=1, min_p=1, presence_penalty=-2, seed=-1)
    SamplingParams(repetition_penalty=0.01)
    SamplingParams(repetition_penalty=10)
    SamplingParams(stop=["x"] * 16, top_logprobs=20, logprobs=True)  # type: ignore[arg-type]
