"""The messages between processes: what goes in comes out, and nothing else is taken."""

from __future__ import annotations

import dataclasses
import pickle
import typing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_sglang.engine.handle import Work
from mini_sglang.engine.wire import (
    Abort,
    AdapterLoaded,
    Close,
    Codec,
    Command,
    Failed,
    Hello,
    LoadAdapter,
    Message,
    Notice,
    Ready,
    Report,
    Setup,
    Submit,
    UnloadAdapter,
)
from mini_sglang.types import Adapter, FinishReason, SamplingParams, TokenEvent, TokenLogprob

from .fake_backend import examples
from .fake_handles import INFO

IDS = st.integers(0, 2**31 - 1)
LOGPROBS = st.builds(
    TokenLogprob,
    IDS,
    st.floats(max_value=0, allow_nan=False),
    st.lists(st.tuples(IDS, st.floats(-1e6, 0)), max_size=3).map(tuple),
)
EVENTS = st.builds(
    TokenEvent,
    st.text(max_size=40),
    st.lists(IDS, max_size=4).map(tuple),
    st.lists(LOGPROBS, max_size=4).map(tuple),
    st.none() | st.sampled_from(FinishReason),
    st.none() | IDS,
    st.none() | st.text(max_size=20),
    st.integers(0, 1 << 24),
    st.integers(0, 1 << 24),
    st.lists(LOGPROBS, max_size=4).map(tuple),
    st.none() | st.sampled_from(["timeout", "engine_died"]),
)
PARAMS = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 1000),
    temperature=st.floats(0, 2),
    top_k=st.integers(0, 1 << 30),
    top_p=st.floats(0.01, 1),
    logit_bias=st.dictionaries(IDS, st.floats(-100, 100), max_size=5),
    seed=st.integers(-(1 << 63), (1 << 63) - 1),
    stop=st.lists(st.text(min_size=1, max_size=9), max_size=3).map(tuple),
    stop_token_ids=st.lists(IDS, max_size=3).map(tuple),
    logprobs=st.booleans(),
)


@examples(80)
@given(
    st.lists(EVENTS, max_size=8), st.none() | st.dictionaries(st.text(max_size=9), st.integers(0, 1 << 60))
)
def test_events_come_out_as_they_went_in(events: list[TokenEvent], stats: dict[str, int] | None) -> None:
    codec = Codec()
    report = codec.message(codec.encode(Report(events, stats)))
    assert isinstance(report, Report) and report.stats == stats
    assert report.events == events
    assert [type(event.finish) for event in report.events] == [type(event.finish) for event in events]


@examples(80)
@given(PARAMS, st.lists(IDS, min_size=1, max_size=300), st.text(max_size=9), st.booleans())
def test_work_comes_out_as_it_went_in(
    params: SamplingParams, prompt: list[int], namespace: str, prefill_only: bool
) -> None:
    codec = Codec()
    work = Work("a\n\x00ü", tuple(prompt), params, 7, prefill_only, namespace)
    submit = codec.command(codec.submit(3, work))
    assert isinstance(submit, Submit) and (submit.serial, submit.request_id) == (3, work.request_id)
    assert codec.work(submit) == work


def test_every_sampling_parameter_is_carried() -> None:
    """Fields added later are too: each is set to something else than its default."""
    others = {
        "max_new_tokens": 9, "min_new_tokens": 2, "temperature": 0.5, "top_k": 4, "top_p": 0.5, "min_p": 0.5,
        "repetition_penalty": 1.5, "presence_penalty": 1.0, "frequency_penalty": 1.0, "logit_bias": {3: 1.0},
        "seed": 5, "stop": ("x",), "stop_token_ids": (3,), "ignore_eos": True, "logprobs": True,
        "top_logprobs": 2, "prompt_logprobs": True, "json_schema": '{"type": "object"}',
        "priority": -7,
        "speculative": "off",
    }  # fmt: skip
    exclusive = {"regex": "a+", "ebnf": 'start: "a"', "json_object": True}  # only one grammar at a time
    names = {spec.name for spec in dataclasses.fields(SamplingParams)}
    codec = Codec()
    for name, value in [*others.items(), *exclusive.items()]:
        if name not in names:
            continue
        more = {"logprobs": True} if name == "top_logprobs" else {}
        params = SamplingParams(**{name: value, **more})  # type: ignore[arg-type]
        submit = codec.command(codec.submit(0, Work("r", (1,), params, 1)))
        assert isinstance(submit, Submit)
        back = codec.work(submit).params
        assert getattr(back, name) == getattr(params, name) != getattr(SamplingParams(), name)


COMMANDS: list[Command] = [
    Setup(
        1,
        2,
        {"dtype": "fp32", "num_threads": 1, "queue_timeout": 0.5, "prefix_cache": True},
        {"a": 1},
    ),
    Abort("r", FinishReason.STOP),
    LoadAdapter(3, Adapter("a", "/adapters/a", "f1"), True),
    UnloadAdapter("a@f1"),
    Close(),
]
MESSAGES: list[Message] = [
    Hello("ipc:///x"),
    Notice("Loading …"),
    Ready(INFO),
    Failed("out of memory"),
    Report([]),
    AdapterLoaded(3),
    AdapterLoaded(4, "It is damaged."),
]


def test_the_other_messages_come_out_as_they_went_in() -> None:
    codec = Codec()
    for command in COMMANDS:
        assert codec.command(codec.encode(command)) == command
    for message in MESSAGES:
        assert codec.message(codec.encode(message)) == message
    assert set(map(type, COMMANDS)) | {Submit} == set(typing.get_args(Command))
    assert set(map(type, MESSAGES)) == set(typing.get_args(Message))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        pickle.dumps(Close),
        msgspec.msgpack.encode(["submit", "x", "r", b""]),
        msgspec.msgpack.encode(["abort", "r", "never"]),
        msgspec.msgpack.encode(["eval", "1"]),
        msgspec.msgpack.encode({"type": "close"}),
    ],
)
def test_what_is_not_a_message_is_refused(data: bytes) -> None:
    for decode in (Codec().command, Codec().message):
        with pytest.raises(msgspec.MsgspecError):
            decode(data)


def test_work_out_of_range_is_refused_by_itself() -> None:
    codec = Codec()
    params = {"temperature": 9.0}
    raw = msgspec.msgpack.encode(
        {"request_id": "r", "prompt_ids": [1], "params": params, "max_new_tokens": 1}
    )
    submit = codec.command(codec.encode(Submit(0, "r", msgspec.Raw(raw))))
    assert isinstance(submit, Submit)
    with pytest.raises(msgspec.ValidationError, match="temperature"):
        codec.work(submit)


def test_a_value_of_another_type_is_not_sent() -> None:
    with pytest.raises(NotImplementedError, match="_Odd cannot be sent"):
        Codec().encode(Report([], _Odd()))  # type: ignore[arg-type]


class _Odd:
    """Neither a message nor a part of one."""
