"""``from mini_sglang import Engine``: what the docstrings promise, on a tiny model."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mini_sglang import (
    ContextLengthError,
    Engine,
    EngineError,
    FinishReason,
    InvalidValueError,
    SamplingParams,
)
from tests.tiny_folders import tiny_folder

CHAT = [{"role": "user", "content": "Hi there"}]
LONG = SamplingParams(max_new_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine(str(folder), dtype="fp32", kv_token_budget=4096) as engine:
        yield engine


def greedy(count: int, **more: object) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, ignore_eos=True, **more)  # type: ignore[arg-type]


def test_one_text_gives_what_transformers_gives(engine: Engine, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = engine.tokenizer.encode("Hello world")
    expected = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=20,
        min_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )[0, len(ids) :].tolist()
    output = engine.generate("Hello world", greedy(20))
    assert list(output.token_ids) == expected
    assert output.text == engine.tokenizer.decode(expected)
    assert output.finish_reason is FinishReason.LENGTH
    assert output.usage.prompt_tokens == len(ids) and output.usage.completion_tokens == 20


def test_text_ids_and_messages_are_all_prompts(engine: Engine) -> None:
    text = engine.generate("Hello", greedy(5))
    ids = engine.generate(engine.tokenizer.encode("Hello"), greedy(5))
    assert text.token_ids == ids.token_ids
    rendered = "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n"
    assert engine.generate(CHAT, greedy(5)).token_ids == engine.generate(rendered, greedy(5)).token_ids


def test_many_prompts_come_back_in_order_each_with_its_own_parameters(engine: Engine) -> None:
    outputs = engine.generate(["a", [5, 6, 7], CHAT], [greedy(3), greedy(9), greedy(1)])
    assert [len(o.token_ids) for o in outputs] == [3, 9, 1]
    assert outputs[1].token_ids == engine.generate([5, 6, 7], greedy(9)).token_ids
    assert [len(o.token_ids) for o in engine.generate(["a", "b"], greedy(4))] == [4, 4]


@pytest.mark.parametrize(
    "prompts, params",
    [
        ("", None),
        ([], None),
        (["a", ""], None),
        ([1, "a"], None),
        ([1, True], None),
        ([10**9], None),
        ([-1], None),
        (7, None),
        (None, None),
        (b"bytes", None),
        ([{"role": "user"}, "a"], None),
        (["a", "b"], [SamplingParams()]),
        ("a", {"temperature": 1}),
        ("\ud800", None),
        ("a", SamplingParams(stop_token_ids=(10**6,))),
        ("a", SamplingParams(logit_bias={10**6: 1.0})),
    ],
)
def test_bad_prompts_are_refused_with_a_sentence(engine: Engine, prompts: object, params: object) -> None:
    with pytest.raises(InvalidValueError, match=r"must be .*\.$"):
        engine.generate(prompts, params)  # type: ignore[call-overload]
    assert len(engine.generate("still fine", greedy(2)).token_ids) == 2


def test_a_prompt_as_long_as_the_context_is_refused(engine: Engine) -> None:
    with pytest.raises(ContextLengthError, match="512"):
        engine.generate([5] * 512)
    with pytest.raises(ContextLengthError):
        engine.stream([5] * 10_000)


def test_deltas_join_to_the_whole(engine: Engine) -> None:
    whole = engine.generate("stream me", greedy(60))
    deltas = list(engine.stream("stream me", greedy(60)))
    assert "".join(d.text for d in deltas) == whole.text
    assert tuple(i for d in deltas for i in d.token_ids) == whole.token_ids
    assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + [FinishReason.LENGTH]
    assert deltas[-1].usage is not None and deltas[-1].usage.completion_tokens == 60
    assert all(d.usage is None for d in deltas[:-1])


def test_a_stop_string_ends_the_answer_and_the_request(engine: Engine) -> None:
    whole = engine.generate("stop here", greedy(80)).text
    stop = whole[20:23]
    cut = whole.index(stop)
    output = engine.generate("stop here", greedy(80, stop=(stop,)))
    assert output.text == whole[:cut]
    assert output.finish_reason is FinishReason.STOP and output.matched_stop == stop
    assert len(output.token_ids) < 80
    with engine.stream("stop here", greedy(400, stop=(stop,))) as stream:
        assert list(stream)[-1].finish_reason is FinishReason.STOP
    assert engine.stats()["running"] == 0


def test_a_stop_token_ends_the_answer_and_is_not_in_the_text(engine: Engine) -> None:
    whole = engine.generate("token stop", greedy(30))
    stop_id = whole.token_ids[10]
    first = whole.token_ids.index(stop_id)
    output = engine.generate("token stop", greedy(30, stop_token_ids=(stop_id,)))
    assert output.token_ids == whole.token_ids[: first + 1]
    assert output.text == engine.tokenizer.decode(whole.token_ids[:first])
    assert output.finish_reason is FinishReason.STOP and output.matched_stop == stop_id


def test_logprobs_are_those_of_the_model(engine: Engine, folder: Path) -> None:
    ids = engine.tokenizer.encode("score this")
    params = greedy(4, logprobs=True, top_logprobs=3, prompt_logprobs=True)
    output = engine.generate(ids, params)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sequence = ids + list(output.token_ids)
    with torch.inference_mode():
        expected = model(torch.tensor([sequence])).logits[0].log_softmax(-1)
    entries = list(output.prompt_logprobs) + list(output.logprobs)
    assert len(entries) == len(sequence) - 1
    for position, entry in enumerate(entries):
        assert entry.token_id == sequence[position + 1]
        assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=1e-4)
        top = expected[position].topk(3)
        assert [i for i, _ in entry.top] == top.indices.tolist()


def test_closing_a_stream_aborts_its_request(engine: Engine) -> None:
    stream = engine.stream("run on", LONG)
    next(stream)
    assert engine.stats()["running"] == 1
    stream.close()
    assert engine.stats()["running"] == 0
    assert list(stream) == []
    stream = engine.stream("run on", LONG)
    next(stream)
    del stream
    gc.collect()
    assert engine.stats()["running"] == 0


def test_leaving_a_for_loop_early_leaves_nothing_running(engine: Engine) -> None:
    for delta in engine.stream("run on", LONG):
        if delta.token_ids:
            break
    del delta
    gc.collect()
    assert engine.stats()["running"] == 0


def test_async_twins_answer_the_same_and_cancel(engine: Engine) -> None:
    async def run() -> None:
        alone = [engine.generate(f"async {i}", greedy(10)).token_ids for i in range(8)]
        together = await asyncio.gather(*(engine.agenerate(f"async {i}", greedy(10)) for i in range(8)))
        assert [o.token_ids for o in together] == alone
        many = await engine.agenerate(["async 0", "async 1"], greedy(10))
        assert [o.token_ids for o in many] == alone[:2]
        text = "".join([delta.text async for delta in engine.astream("async 0", greedy(10))])
        assert text == engine.tokenizer.decode(alone[0])
        task = asyncio.create_task(engine.agenerate("run on", LONG))
        while not engine.stats()["running"]:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.stats()["running"] == 0
        async with engine.astream("run on", LONG) as stream:
            await stream.__anext__()
        assert engine.stats()["running"] == 0

    asyncio.run(run())


def test_threads_share_one_engine(engine: Engine) -> None:
    expected = {i: engine.generate(f"thread {i}", greedy(15)).token_ids for i in range(12)}
    got: dict[int, tuple[int, ...]] = {}

    def work(index: int) -> None:
        got[index] = engine.generate(f"thread {index}", greedy(15)).token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected


def test_insert_prefix_makes_the_next_prompt_start_from_it(engine: Engine) -> None:
    engine.clear_cache()
    prefix = "A long system prompt that many requests share. " * 3
    assert engine.generate(prefix + "One", greedy(1)).usage.cached_tokens == 0
    engine.clear_cache()
    tokens = engine.insert_prefix(prefix)
    page = engine.settings.page_size_tokens
    assert engine.generate(prefix + "Two", greedy(1)).usage.cached_tokens == tokens // page * page
    engine.clear_cache()
    system = [{"role": "system", "content": prefix}]
    tokens = engine.insert_prefix(system)
    assert engine.generate([*system, *CHAT], greedy(1)).usage.cached_tokens == tokens // page * page
    with pytest.raises(InvalidValueError, match="PREFIX_CACHE_MAX_TOKENS"):
        engine.insert_prefix([5] * 5000)


def test_a_second_turn_computes_only_what_is_new(engine: Engine) -> None:
    engine.clear_cache()
    first = engine.generate(CHAT, greedy(40))
    ids = engine.encode(CHAT) + list(first.token_ids)
    second = engine.generate([*ids, *engine.tokenizer.encode("And more?")], greedy(1))
    page = engine.settings.page_size_tokens
    # The KV of the very last token was never computed: nothing came after it.
    assert second.usage.cached_tokens == (len(ids) - 1) // page * page


def test_settings_are_keywords_and_unknown_ones_are_refused(folder: Path) -> None:
    with Engine(
        str(folder), dtype="fp32", page_size_tokens=4, prefix_cache=False, kv_token_budget=256
    ) as engine:
        assert engine.settings.page_size_tokens == 4
        assert engine.description["kv_tokens"] == 256
        engine.generate("twice the same", greedy(2))
        assert engine.generate("twice the same", greedy(2)).usage.cached_tokens == 0
        with pytest.raises(InvalidValueError, match="PREFIX_CACHE"):
            engine.insert_prefix("abc")
    with pytest.raises(InvalidValueError, match="page_size"):
        Engine(str(folder), page_size=4)
    with pytest.raises(InvalidValueError, match="prefix_cache_policy"):
        Engine(str(folder), prefix_cache_policy="mru")


def test_a_closed_engine_says_so_and_ends_what_ran(folder: Path) -> None:
    engine = Engine(str(folder), dtype="fp32", kv_token_budget=1024)
    stream = engine.stream("run on", LONG)
    next(stream)
    engine.close()
    engine.close()
    assert list(stream)[-1].finish_reason is FinishReason.ABORT
    with pytest.raises(EngineError, match="closed"):
        engine.generate("more")
    with pytest.raises(EngineError, match="closed"):
        engine.stats()


def test_the_log_follows_one_request(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mini_sglang"):
        output = engine.generate("log me", greedy(3))
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("prefill ") and "cached=" in line for line in lines)
    decodes = [line for line in lines if line.startswith("decode ")]
    assert [f"token={i} " in line for i, line in zip(output.token_ids, decodes, strict=True)] == [True] * 3
    assert any(line.startswith("chunk ") for line in lines)
    done = [line for line in lines if line.startswith("done ")]
    assert len(done) == 1 and "tokens=3" in done[0] and "ttft=" in done[0] and "tokens/s=" in done[0]
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="mini_sglang"):
        engine.generate("log me", greedy(3))
    assert not caplog.records


def test_a_cut_by_load_or_context_is_told(folder: Path) -> None:
    with Engine(str(folder), dtype="fp32", kv_token_budget=4096, adaptive_max_new_tokens=True) as engine:
        one, two, three = engine.generate(["a", "b", "c"], greedy(10))
        assert [len(output.token_ids) for output in (one, two, three)] == [10, 8, 8]
        assert [output.usage.capped_by for output in (one, two, three)] == [None, "load", "load"]
        with engine.stream("d", greedy(10)) as stream:
            *_, last = stream
        assert last.usage is not None and last.usage.capped_by is None
        room = engine.stats()["kv_tokens_total"]
        assert engine.generate("e", SamplingParams(max_new_tokens=2 * room)).usage.capped_by == "context"
        stats = engine.stats()
        assert (stats["capped_by_load"], stats["capped_by_context"]) == (2, 1)


def test_a_priority_changes_no_answer(engine: Engine) -> None:
    prompts = [f"prompt {number}" for number in range(6)]
    params = [greedy(12, temperature=1.0, seed=n, priority=p) for n, p in enumerate([0, 9, -9, 100, -100, 3])]
    alone = [engine.generate(prompt, greedy(12, temperature=1.0, seed=n)) for n, prompt in enumerate(prompts)]
    together = engine.generate(prompts, params)
    assert [output.token_ids for output in together] == [output.token_ids for output in alone]
