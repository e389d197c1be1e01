"""Adapters through ``Engine``: PEFT's own answers, beside each other, and the same under any load."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest

from mini_sglang import Engine, InvalidValueError, SamplingParams
from mini_sglang.backend.lora.files import open_adapter
from mini_sglang.errors import ModelLoadError
from tests.backend.loading.model_files import tiny_model as tiny_llama
from tests.backend.loading.model_files import write_gguf
from tests.backend.lora.tiny_adapters import peft_greedy, save_tiny_adapter
from tests.backend.tiny_models import tiny_model
from tests.test_same_answer import FAST, core, workload
from tests.tiny_folders import tiny_folder

GREEDY = SamplingParams(max_new_tokens=8, ignore_eos=True)
LONG = "The same long beginning of every prompt, which the prefix cache would share. "


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and adapters ``a``, ``b`` and ``other`` of it."""
    root = tmp_path_factory.mktemp("lora")
    tiny_folder(root / "model", "qwen3")
    model = tiny_model("qwen3", vocab_size=259)
    for seed, name in enumerate(("a", "b", "other")):
        save_tiny_adapter(root / name, model, seed=seed, r=4 * (seed + 1))
    return root


@pytest.fixture(scope="module")
def reference() -> Any:
    return tiny_model("qwen3", vocab_size=259)


@pytest.fixture
def engine(root: Path) -> Iterator[Engine]:
    adapters = f"a={root / 'a'},{root / 'b'}"
    with Engine(
        str(root / "model"), dtype="fp32", kv_token_budget=4096, lora_adapters=adapters, max_loras=3
    ) as engine:
        yield engine


@pytest.mark.parametrize("chunked", [False, True])
def test_answers_are_those_of_peft_also_from_the_cache(root: Path, reference: Any, chunked: bool) -> None:
    settings = {
        "dtype": "fp32",
        "kv_token_budget": 4096,
        "chunked_prefill": chunked,
        "prefill_chunk_size": 24,
    }
    adapters = f"a={root / 'a'},b={root / 'b'}"
    with Engine(str(root / "model"), lora_adapters=adapters, **settings) as engine:
        prompts = [LONG + end for end in ("One", "Two", "Three", "One")]
        loras = ["a", None, "b", "b"]
        ids = [engine.encode(prompt) for prompt in prompts]
        expected = [
            peft_greedy(reference, None if lora is None else root / lora, one, 8)
            for lora, one in zip(loras, ids, strict=True)
        ]
        for warm in (False, True):
            outputs = engine.generate(prompts, GREEDY, lora=loras)
            assert [list(output.token_ids) for output in outputs] == expected
            assert not warm or all(output.usage.cached_tokens > 60 for output in outputs)


def test_ways_to_ask(engine: Engine) -> None:
    expected = engine.generate(LONG, GREEDY, lora="b").token_ids
    assert expected != engine.generate(LONG, GREEDY).token_ids
    assert engine.insert_prefix(LONG, lora="b") == len(engine.encode(LONG))
    assert engine.stream(LONG, GREEDY, lora="b").output().token_ids == expected
    assert [one.token_ids for one in engine.generate([LONG, LONG], GREEDY, lora="b")] == [expected] * 2

    async def ask() -> None:
        assert (await engine.agenerate(LONG, GREEDY, lora="b")).token_ids == expected
        assert (await engine.astream(LONG, GREEDY, lora="b").output()).token_ids == expected

    asyncio.run(ask())
    assert engine.stats()["lora_requests"] == 7 and engine.stats()["loras"] == 2


def test_loading_and_unloading(engine: Engine, root: Path, reference: Any) -> None:
    ids = engine.encode(LONG)
    engine.load_lora("c", root / "other")
    assert list(engine.generate(LONG, GREEDY, lora="c").token_ids) == peft_greedy(
        reference, root / "other", ids, 8
    )
    with pytest.raises(InvalidValueError, match="MAX_LORAS"):
        engine.load_lora("d", root / "other")
    with pytest.raises(InvalidValueError, match="lora_name is 'c'"):
        engine.load_lora("c", root / "other")
    with pytest.raises(ModelLoadError, match="not a folder"):
        engine.load_lora("e", root / "nothing")
    # Another adapter under the name meets nothing of the old one's KV.
    engine.unload_lora("c")
    engine.load_lora("c", root / "a")
    output = engine.generate(LONG, GREEDY, lora="c")
    assert list(output.token_ids) == peft_greedy(reference, root / "a", ids, 8)
    assert output.usage.cached_tokens == 0
    # One that runs goes on to its end.
    with engine.stream(LONG, SamplingParams(max_new_tokens=100, ignore_eos=True), lora="c") as stream:
        next(stream)
        engine.unload_lora("c")
        assert len(stream.output().token_ids) == 100
    assert engine.stats()["loras"] == 2
    for name in ("c", "nobody", ""):
        with pytest.raises(InvalidValueError, match=r"name of a loaded adapter \(a, b\)"):
            engine.generate(LONG, GREEDY, lora=name)
    with pytest.raises(InvalidValueError, match="one name, or a list of one for each of 1"):
        engine.generate(LONG, GREEDY, lora=["a"])  # type: ignore[call-overload]


def test_a_model_of_transformers_code_takes_none(tmp_path: Path) -> None:
    model = tiny_model("olmo2", vocab_size=259)
    adapter = save_tiny_adapter(tmp_path / "a", model)
    folder = tiny_folder(tmp_path / "model", "olmo2")
    with Engine(str(folder), dtype="fp32", kv_token_budget=1024) as engine:
        assert engine.generate(LONG, GREEDY).token_ids
        with pytest.raises(InvalidValueError, match="natively served model families only"):
            engine.load_lora("a", adapter)
    with pytest.raises(InvalidValueError, match="natively served"):
        Engine(str(folder), dtype="fp32", kv_token_budget=1024, lora_adapters=f"a={adapter}")


@pytest.mark.parametrize("name", ["float32", "bfloat16", "blocks"])
def test_the_same_answer_under_any_load(tmp_path: Path, name: str) -> None:
    """Adapters mixed in batches that also retract and chunk, against each request alone."""
    settings: dict[str, object] = {"num_threads": 2}
    if name == "blocks":
        model = tiny_llama("llama-tied")
        path = write_gguf(tmp_path / "m.gguf", model, "llama", gguf.GGMLQuantizationType.Q4_1)
        settings["gguf_dequantize"] = 0
    else:
        path = tiny_folder(tmp_path / "model", "qwen3")
        model = tiny_model("qwen3", vocab_size=259)
        if name == "bfloat16":
            settings["dtype"] = "bf16" if FAST else "fp32"
    adapters = [
        open_adapter(f"a{seed}", save_tiny_adapter(tmp_path / f"a{seed}", model, seed=seed, r=3 + 7 * seed))
        for seed in range(3)
    ]
    draw = random.Random(3)
    requests = [
        ([id % 90 + 3 for id in prompt], params, draw.choice([None, *adapters]))
        for prompt, params in workload(11, 24)
    ]

    def run(together: bool, **more: object) -> tuple[list[list[int]], Any]:
        engine = core(path, **settings, **more)
        for adapter in adapters:
            engine.adapters.load(adapter)
        answers: list[list[int]] = [[] for _ in requests]
        for index, (prompt, params, adapter) in enumerate(requests):
            engine.add(engine.make_request(str(index), prompt, params, adapter=adapter))
            while engine.has_work and not (together and index < len(requests) - 1):
                for event in engine.step():
                    assert event.error is None
                    answers[int(event.request_id)].extend(event.token_ids)
                engine.check()
        return answers, engine

    expected, _ = run(False, prefix_cache=False, kv_token_budget=512)
    retractions = 0
    for batch, budget, chunked in (*((8, tight, True) for tight in (176, 192)), (24, 8192, False)):
        found, engine = run(
            True,
            max_batch_size=batch,
            kv_token_budget=budget,
            chunked_prefill=chunked,
            prefill_chunk_size=24,
        )
        assert found == expected
        retractions += engine.scheduler.num_retractions
        assert engine.counters.prefix_hit_tokens > 0
    assert retractions > 0
