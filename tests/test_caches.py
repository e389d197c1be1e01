"""The caches over real, tiny models: what a warm engine answers is what a cold one does, id by id."""

from __future__ import annotations

import logging
import random
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from mini_sglang import CacheFileError, Engine, InvalidValueError, SamplingParams
from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.loading.fingerprint import weights_fingerprint
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from tests.backend.kernels.twins import VARIANTS
from tests.backend.loading.model_files import tiny_model, write_gguf
from tests.backend.transformers_models.families import PAGED, VOCAB_SIZE, save
from tests.backend.transformers_models.families import tiny_model as tiny_transformers_model
from tests.backend.transformers_models.request_families import CASES
from tests.tiny_folders import tiny_folder

EOS = frozenset({2})
MODELS: dict[str, dict[str, object]] = {
    "float32": {},
    "reference": {"kernels": "reference"},
    "blocks": {"gguf_dequantize": 0},
}
if VARIANTS[-1] != "generic":
    MODELS["bfloat16"] = {"dtype": "bf16"}
    MODELS["blocks, KV in 8 bits"] = {"gguf_dequantize": 0, "kv_dtype": "int8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blocks") / "tiny.gguf"
    return write_gguf(path, tiny_model("llama-tied"), "llama", gguf.GGMLQuantizationType.Q4_1)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, folder: Path, blocks: Path) -> tuple[Path, dict[str, object]]:
    return (blocks if "blocks" in request.param else folder), MODELS[request.param]


def core(path: Path, **settings: object) -> EngineCore:
    resolved = Settings.resolve({"dtype": "fp32", "device": "cpu", "kv_token_budget": 2048, **settings})
    return EngineCore(load_backend(path, resolved), resolved, EOS)


Asked = tuple[list[int], SamplingParams]


def answers(engine: EngineCore, requests: list[Asked], *, together: bool = False) -> list[tuple[Any, ...]]:
    """Ids, logprobs and cached tokens of each."""
    got: list[list[Any]] = [[[], [], 0] for _ in requests]
    for index, (prompt, params) in enumerate(requests):
        engine.add(engine.make_request(str(index), prompt, params))
        while engine.has_work and (not together or index == len(requests) - 1):
            for event in engine.step():
                assert event.error is None
                ids, logprobs, _ = got[int(event.request_id)]
                ids.extend(event.token_ids)
                logprobs.extend(event.logprobs)
                got[int(event.request_id)][2] = event.cached_tokens
            engine.check()
    return [tuple(one) for one in got]


def requests_of(prompt: list[int]) -> list[Asked]:
    """One prompt, asked in every way a first token can be chosen."""
    ways: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": 1},
        {"temperature": 0.9, "seed": 2, "top_k": 20, "top_p": 0.9},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4},
        {"logit_bias": {40: 5.0, 50: -100.0}},
        {"logprobs": True, "top_logprobs": 3},
        {"temperature": 1.2, "seed": 5, "min_p": 0.05, "min_new_tokens": 4},
    ]
    return [(prompt, SamplingParams(max_new_tokens=6, ignore_eos=True, **way)) for way in ways]


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("length", [1, 31, 32, 50])
def test_a_prompt_seen_before_answers_as_cold(
    model: tuple[Path, dict[str, object]], page_size: int, length: int
) -> None:
    path, settings = model
    draw = random.Random(length)
    requests = requests_of([draw.randrange(3, 90) for _ in range(length)])
    # With torch's operators the last bits of logprobs depend on the number of rows.
    compared = 1 if settings.get("kernels") == "reference" else 2
    cold = core(path, page_size_tokens=page_size, prefix_cache=False, **settings)
    expected = [answer[:compared] for answer in answers(cold, requests)]
    for together in (False, True):
        engine = core(path, page_size_tokens=page_size, **settings)
        answers(engine, requests[:1])
        steps = engine.counters.prefill_tokens
        warm = answers(engine, requests, together=together)
        assert [answer[:compared] for answer in warm] == expected
        assert [answer[2] for answer in warm] == [length] * len(requests)
        assert engine.counters.prefill_tokens == steps, "nothing of the prompt was computed again"


@pytest.mark.parametrize("page_size", [1, 16])
def test_pages_from_the_host_answer_as_cold(model: tuple[Path, dict[str, object]], page_size: int) -> None:
    path, settings = model
    draw = random.Random(page_size)
    stems = [[draw.randrange(3, 90) for _ in range(48)] for _ in range(6)]
    # 2 s of every stem, in an order that drops each before it comes again.
    requests = [
        ([*stem, *tail], SamplingParams(max_new_tokens=8, temperature=0.8, seed=turn, ignore_eos=True))
        for turn in range(2)
        for stem in stems
        for tail in ([turn + 5, 7],)
    ]
    cold = core(path, page_size_tokens=page_size, prefix_cache=False, **settings)
    expected = [answer[:2] for answer in answers(cold, requests)]
    engine = core(path, page_size_tokens=page_size, kv_token_budget=128, page_token_budget=1024, **settings)
    warm = answers(engine, requests)
    assert [answer[:2] for answer in warm] == expected
    assert [answer[2] for answer in warm[6:]] == [48] * 6
    stats = engine.stats()
    assert stats["host_hits"] == 6 and stats["host_restored_tokens"] >= 5 * 48
    assert answers(engine, requests, together=True) and engine.stats()["host_hits"] > 6


@pytest.mark.parametrize("background", [False, True])
def test_the_thread_that_copies_gives_the_same_pages(
    folder: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    monkeypatch.setattr("mini_sglang.engine.host_link.INLINE_BYTES", 0 if background else 1 << 40)
    draw = random.Random(3)
    requests: list[Asked] = []
    for turn in range(30):
        stem = [3 + (turn * 7) % 5] * 60
        tail = [draw.randrange(3, 90) for _ in range(draw.randrange(1, 30))]
        params = SamplingParams(
            max_new_tokens=draw.randrange(1, 20), temperature=0.7, seed=turn, ignore_eos=True
        )
        requests.append(([*stem, *tail], params))
    expected = [answer[0] for answer in answers(core(folder, prefix_cache=False), requests)]
    engine = core(folder, kv_token_budget=320, page_token_budget=2048, max_batch_size=4)
    for together in (True, False, True):
        assert [answer[0] for answer in answers(engine, requests, together=together)] == expected
    assert engine.stats()["host_hits"] > 0


def test_a_host_tier_larger_than_memory_is_refused(folder: Path) -> None:
    with pytest.raises(
        InvalidValueError, match=r"PAGE_TOKEN_BUDGET is 2147483632; it must be at most \d+: so many"
    ):
        core(folder, page_token_budget=2147483647)


def test_a_saved_cache_answers_as_cold(model: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    path, settings = model
    draw = random.Random(9)
    stem = [draw.randrange(3, 90) for _ in range(70)]
    requests: list[Asked] = [
        ([*stem[:cut], 5, 6], SamplingParams(max_new_tokens=10, ignore_eos=True)) for cut in (70, 33, 64)
    ]
    first = core(path, **settings)
    expected = [answer[0] for answer in answers(first, requests)]
    saved = first.cache.save(tmp_path / "c")
    second = core(path, **settings)
    assert second.cache.load(tmp_path / "c") == saved
    warm = answers(second, requests)
    assert [answer[0] for answer in warm] == expected
    assert warm[0][2] == 64
    computed = {"kernels": "reference", "kv_dtype": "auto"}
    for other, word in (
        ({"page_size_tokens": 8}, "layout"),
        ({"dtype": "bf16"} if settings == {"kernels": "reference"} else computed, "(kv_dtype|dtype|kernels)"),
    ):
        with pytest.raises(CacheFileError, match=f"another model or other settings: its {word}"):
            core(path, **{**settings, **other}).cache.load(tmp_path / "c")


def test_weights_that_differ_in_one_small_tensor_are_another_model(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "renamed"
    shutil.copytree(folder, copy)
    assert weights_fingerprint(copy) == weights_fingerprint(folder)
    file = copy / "model.safetensors"
    seen = {weights_fingerprint(folder)}
    for name in ("model.norm.weight", "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"):
        weights = load_file(folder / "model.safetensors")
        weights[name] = weights[name] + 0.01
        save_file(weights, file)
        seen.add(weights_fingerprint(copy))
    assert len(seen) == 4


def test_gguf_weights_have_a_fingerprint(blocks: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other name.gguf"
    shutil.copy(blocks, copy)
    assert weights_fingerprint(copy) == weights_fingerprint(blocks)
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    assert weights_fingerprint(copy) != weights_fingerprint(blocks)


PAGED_BY_TYPE = {family.model_type: family for family in PAGED}


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "deepseek_v2"])
def test_models_of_transformers_over_our_pages_have_every_cache(family: str, tmp_path: Path) -> None:
    path = save(tiny_transformers_model(PAGED_BY_TYPE[family]), tmp_path / "model")
    draw = random.Random(4)
    stems = [[draw.randrange(3, VOCAB_SIZE) for _ in range(18)] for _ in range(4)]
    requests: list[Asked] = [
        (stem, SamplingParams(max_new_tokens=6, temperature=0.8 * (turn > 0), seed=turn, ignore_eos=True))
        for turn in range(2)
        for stem in stems
    ]
    small = {"page_size_tokens": 4, "prefill_cache_size": 2, "page_token_budget": 400}
    expected = [answer[0] for answer in answers(core(path, prefix_cache=False), requests)]
    engine = core(path, kv_token_budget=64, **small)
    assert [answer[0] for answer in answers(engine, requests)] == expected
    assert [answer[0] for answer in answers(engine, requests[:1] * 2)] == expected[:1] * 2
    stats = engine.stats()
    assert stats["host_hits"] > 0 and stats["prefill_cache_hits"] > 0
    engine.cache.save(tmp_path / "c")
    again = core(path, **small)
    assert again.cache.load(tmp_path / "c") > 0
    assert [answer[0] for answer in answers(again, requests)] == expected
    assert again.stats()["prefix_hits"] > 0


def test_a_model_with_one_cache_per_request_refuses_them(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.family.model_type == "mamba2")
    path = save(tiny_transformers_model(case.family), tmp_path / "model")
    with pytest.raises(InvalidValueError, match="PAGE_TOKEN_BUDGET is 64; it must be 0 for a model whose KV"):
        core(path, page_token_budget=64)
    engine = core(path)
    with pytest.raises(InvalidValueError, match="one cache per request, which shares no prefix"):
        engine.insert_prefix([5, 6, 7])
    with pytest.raises(InvalidValueError, match="PREFIX_CACHE is 0; it must be on to be saved or loaded"):
        engine.cache.save(tmp_path / "c")


# The public engine and its settings.

GREEDY = SamplingParams(max_new_tokens=8, ignore_eos=True)
SYSTEM = "You are a very patient helper who answers in few words. "
OTHER = "Translate every line that follows into French, and no more. "


def engine_of(folder: Path, **settings: object) -> Engine:
    return Engine(str(folder), dtype="fp32", kv_token_budget=4096, num_threads=1, **settings)


def test_warm_prefixes_are_there_before_the_first_request(folder: Path) -> None:
    for warm, expected in ((None, 0), (f"{SYSTEM}||{OTHER}", 48)):
        with engine_of(folder, warm_prefixes=warm) as engine:
            for text in (SYSTEM, OTHER):
                usage = engine.generate(f"{text}Hello", GREEDY).usage
                assert usage.cached_tokens == (len(text) // 16 * 16 if expected else 0)
            assert engine.stats()["warm_prefixes_done"] == (2 if expected else 0)


def test_warm_prefixes_in_the_background(folder: Path) -> None:
    with engine_of(folder, warm_prefixes=f"{SYSTEM}||{OTHER}", async_prefill_queue=True) as engine:
        answer = engine.generate("Hello", GREEDY).token_ids
        while engine.stats()["warm_prefixes_done"] < 2:
            pass
        assert engine.generate(f"{OTHER}Hello", GREEDY).usage.cached_tokens == len(OTHER) // 16 * 16
    with engine_of(folder) as engine:
        assert engine.generate("Hello", GREEDY).token_ids == answer


def test_the_background_begins_after_the_start(folder: Path) -> None:
    for background, expected in ((False, 1), (True, 0)):
        resolved = Settings.resolve(
            {"model": str(folder), "dtype": "fp32", "kv_token_budget": 4096, "warm_prefixes": SYSTEM,
             "async_prefill_queue": background}, {}
        )  # fmt: skip
        from mini_sglang.api.loading import find_model, load_core
        from mini_sglang.api.warming import fill_caches

        found = find_model(resolved, lambda line: None)
        made, grammars = load_core(found, resolved, lambda line: None)
        fill_caches(made, found.tokenizer, resolved, lambda line: None)
        assert made.stats()["warm_prefixes_done"] == expected and made.has_work is background
        grammars.close()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"warm_prefixes": "a||"},
            "WARM_PREFIXES is 'a||'; it must be texts with || between, none of them empty.",
        ),
        ({"warm_prefixes": " || b"}, "none of them empty"),
        (
            {"warm_prefixes": "x" * 5000},
            "A prefix of WARM_PREFIXES is '5000 tokens'; it must be at most 4096",
        ),
        (
            {"warm_prefixes": "a", "prefix_cache": False},
            "WARM_PREFIXES is 'a'; it must be unset where PREFIX_CACHE is off.",
        ),
        (
            {"prefix_cache_file": "/nowhere/at/all"},
            "PREFIX_CACHE_FILE is '/nowhere/at/all'; it must be a file in a",
        ),
        ({"prefix_cache_file": "c", "prefix_cache": False}, "unset where PREFIX_CACHE is off"),
    ],
)
def test_what_cannot_be_stops_the_start(folder: Path, settings: dict[str, object], sentence: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        engine_of(folder, **settings)
    assert sentence in str(caught.value) and str(caught.value).count(".") <= 2


def test_the_engine_saves_and_loads(folder: Path, tmp_path: Path) -> None:
    with engine_of(folder) as engine:
        cold = engine.generate(f"{SYSTEM}Hello", GREEDY)
        saved = engine.save_prefix_cache(tmp_path / "c")
        assert saved == (len(SYSTEM) + 5 + 7) // 16 * 16
    with engine_of(folder) as engine:
        assert engine.load_prefix_cache(str(tmp_path / "c")) == saved
        warm = engine.generate(f"{SYSTEM}Hello", GREEDY)
        assert warm.token_ids == cold.token_ids and warm.usage.cached_tokens > 0
        with pytest.raises(CacheFileError):
            engine.load_prefix_cache(tmp_path / "none")


def test_the_setting_saves_at_the_end_and_loads_at_the_start(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    lines: list[str] = []
    with engine_of(folder, prefix_cache_file=path, notify=lines.append) as engine:
        cold = engine.generate(f"{SYSTEM}Hello", GREEDY)
        assert not path.exists()
    with engine_of(folder, prefix_cache_file=path, notify=lines.append) as engine:
        assert any(line.startswith("The prefix cache begins with 64 tokens of") for line in lines), lines
        warm = engine.generate(f"{SYSTEM}Hello", GREEDY)
        assert warm.token_ids == cold.token_ids and warm.usage.cached_tokens == 48
    # Another model starts empty, says so, and has its own cache in the file afterwards.
    other = tiny_folder(tmp_path / "other", "qwen3", seed=1)
    lines.clear()
    for expected in (0, 48):
        with engine_of(other, prefix_cache_file=path, notify=lines.append) as engine:
            assert engine.generate(f"{SYSTEM}Hello", GREEDY).usage.cached_tokens == expected
        if not expected:
            assert any(
                "belongs to another model" in line and line.endswith("begins empty.") for line in lines
            )


def test_a_file_that_is_no_cache_survives_the_setting(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    lines: list[str] = []
    with engine_of(folder, prefix_cache_file=path, notify=lines.append) as engine:
        engine.generate("Hello", GREEDY)
    assert path.read_text() == "mine"
    assert any("is not a saved prefix cache" in line for line in lines)


def test_the_log_tells_each_caches_hits_and_misses(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with engine_of(folder) as engine, caplog.at_level(logging.INFO, "mini_sglang"):
        for prompt in ("x" * 40, "x" * 40, "x" * 39 + "y"):
            engine.generate(prompt, GREEDY)
    done = [line.message for line in caplog.records if line.message.startswith("done")]
    assert [line.partition(" prefix_hit")[2] for line in done] == [
        "_tokens=0 prefix_miss_tokens=40 prefill_cache=miss",
        "_tokens=0 prefix_miss_tokens=0 prefill_cache=hit",
        "_tokens=32 prefix_miss_tokens=8 prefill_cache=miss",
    ]


def test_the_pages_of_every_layer_are_copied(folder: Path) -> None:
    engine = core(folder, page_size_tokens=4, page_token_budget=40)
    backend = engine._backend
    assert isinstance(backend, ModelBackend)
    store, data = backend.store, backend.kv.data
    data.copy_(torch.randn(data.shape))
    before = data.clone()

    def page(tensor: torch.Tensor, number: int) -> torch.Tensor:
        return tensor[:, 4 * number : 4 * number + 4]

    store.copy([3, 4], [10, 12])
    store.spill([5, 6, 9], [2, 3, 0])
    data[:, 4 * 5 : 4 * 10] = 0
    for background in (False, True):
        transfer = store.restore([2, 3, 0], [20, 22, 21], background=background)
        transfer.wait()
        assert transfer.done
        for source, target in ((3, 10), (4, 12), (5, 20), (6, 22), (9, 21)):
            assert torch.equal(page(data, target), page(before, source))
        data[:, 4 * 20 : 4 * 23] = 0
    (one, two) = store.read([3], [0])
    assert len(one) == len(two) == store.page_bytes == page(data, 3).nbytes
    store.write(30, two)
    store.write_host(1, one)
    store.restore([1], [31], background=False)
    assert torch.equal(page(data, 30), page(before, 9)) and torch.equal(page(data, 31), page(before, 3))
    assert all(torch.equal(page(data, n), page(before, n)) for n in range(13, 20))
