"""Backends whose device runs out of memory: said by one exception, and answers go on as they would have."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.memory import is_out_of_memory, says_out_of_memory
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.step import OUT_OF_MEMORY
from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from mini_sglang.errors import EngineError, OutOfMemoryError
from mini_sglang.types import SamplingParams
from tests.backend.harness import load, page_ranges, step
from tests.backend.tiny_models import save_tiny_model
from tests.backend.transformers_models.families import save, tiny_model
from tests.backend.transformers_models.request_families import CASES

pytestmark = pytest.mark.usefixtures("past_set_aside")

PROMPTS = [
    [(i * 37 + j * 11) % 180 + 5 for j in range(length)] for i, length in enumerate((40, 3, 17, 1, 29))
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (EngineError("out of memory"), False),
    ],
)
def test_what_says_out_of_memory(error: Exception, is_one: bool) -> None:
    class Device:
        @says_out_of_memory()
        def run(self) -> None:
            raise error

    assert is_out_of_memory(error) is is_one
    with pytest.raises(OutOfMemoryError if is_one else type(error)) as caught:
        Device().run()
    assert is_one or caught.value is error


def test_what_a_failed_call_had_made_is_free_when_it_has_failed() -> None:
    made: list[weakref.ref[Tensor]] = []

    class Device:
        @says_out_of_memory()
        def run(self) -> None:
            self.deeper()

        def deeper(self) -> None:
            held = torch.zeros(8)
            made.append(weakref.ref(held))
            raise torch.OutOfMemoryError("no room")

    with pytest.raises(OutOfMemoryError) as caught:
        Device().run()
    assert made[0]() is None and caught.value.__context__ is None


def tight(backend: ModelBackend, most: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the decoder of a backend run out of memory, half way, in steps of more than so many tokens."""
    plain, sizes = backend.decoder.forward, []

    def forward(batch: Any, kv: Any, *rest: Any) -> Tensor:
        sizes.append(len(batch.token_ids))
        hidden = plain(batch, kv, *rest)
        if len(batch.token_ids) > most:
            kv.data[:, batch.slot_mapping] = torch.nan
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return hidden

    monkeypatch.setattr(backend.decoder, "forward", forward)
    return sizes


def answers(core: EngineCore, prompts: Sequence[Sequence[int]], **params: Any) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        given = {"max_new_tokens": 12, "ignore_eos": True, "seed": index, **params}
        core.add(core.make_request(str(index), prompt, SamplingParams(**given)))
        found[str(index)] = []
    while core.has_work:
        for event in core.step():
            assert event.error is None, event.error
            found[event.request_id].extend(event.token_ids)
        core.check()
    return list(found.values())


WAYS: tuple[dict[str, Any], ...] = ({"temperature": 0.9}, {"speculative": "on"})


def plain_core(folder: Path, overlap: str) -> EngineCore:
    backend = load(folder, kernels="reference", overlap_schedule=overlap)
    settings = Settings.resolve({"prefill_chunk_size": 64}, {})
    return EngineCore(backend, settings, frozenset(backend.eos_ids))


@pytest.fixture(scope="module", params=["0", "1"])
def at_once(request: pytest.FixtureRequest, folder: Path) -> tuple[str, list[list[list[int]]]]:
    """Whether steps overlap, and what memory for all gives in each of the ways."""
    overlap: str = request.param
    return overlap, [answers(plain_core(folder, overlap), PROMPTS, **params) for params in WAYS]


@pytest.mark.parametrize("most", [2, 40])
def test_a_model_gives_the_same_tokens_in_parts(
    folder: Path, most: int, at_once: tuple[str, list[list[list[int]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    overlap, whole = at_once
    for params, expected in zip(WAYS, whole, strict=True):
        small = plain_core(folder, overlap)
        assert isinstance(small._backend, ModelBackend)
        sizes = tight(small._backend, most, monkeypatch)
        assert answers(small, PROMPTS, **params) == expected
        assert max(sizes) > most and small.stats()["out_of_memory"] > 0 and small.stats()["failed"] == 0
        # Prompts that were computed before, whole: from their kept logits.
        assert answers(small, PROMPTS[:2], **params) == expected[:2]


def test_a_step_out_of_memory_raises_its_own_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load(folder, kernels="reference")
    tight(backend, 2, monkeypatch)
    (table,) = page_ranges(backend, [3])
    with pytest.raises(OutOfMemoryError, match=r"CUDA out of memory\.") as caught:
        backend.run([step([5, 6, 7], 0, table, sample=True)])
    assert not caught.value.past_lost
    backend.free_memory()


def request_core(folder: Path, **settings: object) -> tuple[EngineCore, Any]:
    given = {"dtype": "fp32", "device": "cpu", "context_length": 128, "max_batch_size": 8, **settings}
    resolved = Settings.resolve(given, {})
    backend = load_backend(folder, resolved)
    return EngineCore(backend, resolved, frozenset({2}), backend.describe()), backend


def own_cache_folder(model_type: str, folder: Path) -> Path:
    case = next(case for case in CASES if case.family.model_type == model_type)
    return save(tiny_model(case.family), folder)


@pytest.fixture(scope="module", params=[("mamba2", 1), ("falcon_h1", 5)], ids=str)
def own_cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, int, list[list[int]]]:
    """A model, how many tokens fit, and what memory for all gives."""
    model_type, most = request.param
    folder = own_cache_folder(model_type, tmp_path_factory.mktemp(model_type))
    return folder, most, answers(request_core(folder)[0], PROMPTS)


@pytest.mark.parametrize("overlap", ["0", "1"])
def test_one_cache_per_request_gives_the_same_tokens_in_parts(
    own_cache: tuple[Path, int, list[list[int]]], overlap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, most, expected = own_cache
    core, backend = request_core(folder, overlap_schedule=overlap)
    plain: Callable[..., Any] = backend._runner.forward
    failures = []

    def forward(ids: Sequence[Sequence[int]], *rest: Any) -> Any:
        done = plain(ids, *rest)
        if len(ids) * len(ids[0]) > most:
            failures.append(len(ids))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return done

    monkeypatch.setattr(backend._runner, "forward", forward)
    assert answers(core, PROMPTS) == expected and failures


def test_a_generate_out_of_memory_ends_its_request_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = own_cache_folder("falcon_h1", tmp_path)
    expected = answers(request_core(folder, engine_fast_decode=True)[0], PROMPTS[1:3])
    core, backend = request_core(folder, engine_fast_decode=True)
    plain = backend._model.forward

    def forward(*args: Any, **given: Any) -> Any:
        if given["input_ids"].shape[1] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(*args, **given)

    forward.__signature__ = inspect.signature(plain)  # type: ignore[attr-defined]
    monkeypatch.setattr(backend._model, "forward", forward)
    core.add(core.make_request("long", PROMPTS[0], SamplingParams(max_new_tokens=5)))
    (event,) = core.step()
    assert event.error_kind == OUT_OF_MEMORY and "CUDA out of memory" in (event.error or "")
    assert answers(core, PROMPTS[1:3]) == expected
