"""Recorded steps of whole models, interpreted: decodes of every number, prompts of every length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from mini_sglang.backend.kernels.triton import few_rows
from mini_sglang.backend.kernels.triton.few_rows import product
from mini_sglang.backend.step import SampleSpec, SequenceStep
from mini_sglang.types import SamplingParams
from tests.backend.graphs.comparing import (
    SMALL,
    assert_same,
    batch_of,
    fill,
    ids,
    load_recorded,
    program_of,
)
from tests.backend.graphs.recorder import FaithfulRecorder
from tests.backend.harness import greedy, load, page_ranges, step
from tests.backend.tiny_models import save_tiny_model
from tests.backend.transformers_models.families import PAGED
from tests.backend.transformers_models.families import save as save_family
from tests.backend.transformers_models.families import tiny_model as tiny_family


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path, "qwen3", **SMALL)


@pytest.mark.usefixtures("even_products")
def test_decodes_of_every_number(folder: Path, recorder: FaithfulRecorder) -> None:
    """Mixed lengths, over steps in which tables grow and sequences come and go."""
    backend = load_recorded(folder, enable_cuda_graph=False)
    lengths = [30, 1, 47, 16, 15]
    tables = page_ranges(backend, [length + 8 for length in lengths])
    fill(backend, [ids(length, i) for i, length in enumerate(lengths)], tables)
    replayed = recorder.replayed
    for turn, count in enumerate((1, 2, 3, 4, 5, 3)):
        chosen = [(turn + i) % 5 for i in range(count)]
        steps = [step([9 + turn + i], lengths[i], tables[i], sample=True) for i in chosen]
        assert_same(backend, steps)
        for i in chosen:
            lengths[i] += 1
    assert recorder.replayed == replayed + 6


@pytest.mark.usefixtures("even_products")
def test_decodes_of_few_rows(
    folder: Path, recorder: FaithfulRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision, where their products have kernels of their own; three have not."""
    rows_of = []

    def noting(x: Tensor, *args: Any, **given: Any) -> Tensor:
        rows_of.append(len(x))
        return product(x, *args, **given)

    monkeypatch.setattr(few_rows, "product", noting)
    backend = load_recorded(folder, enable_cuda_graph=False, dtype="fp16")
    assert set(rows_of) == {1, 2}
    lengths = [30, 1, 17, 16]
    tables = page_ranges(backend, [length + 1 for length in lengths])
    fill(backend, [ids(length, i) for i, length in enumerate(lengths)], tables)
    replayed = recorder.replayed
    for count in (1, 2, 3):
        assert_same(backend, [step([9 + i], lengths[i], tables[i], sample=True) for i in range(count)])
    assert recorder.replayed == replayed + 3


@pytest.mark.usefixtures("even_products")
def test_prompts_of_every_length(folder: Path, recorder: FaithfulRecorder) -> None:
    """Whole ones, and ones of which some is there already; on torch's operators, attention apart."""
    settings = {"kernels": "reference", "attn_impl": "triton", "enable_decode_cuda_graph": False}
    backend = load_recorded(folder, **settings, cuda_graph_max_seq_len=35)
    (table,) = page_ranges(backend, [100])
    replayed = recorder.replayed
    cases = [(count, 0) for count in range(2, 36)] + [(2, 40), (16, 17), (33, 3), (35, 64), (20, 5)]
    for turn, (count, start) in enumerate(cases):
        fill(backend, [ids(start, turn)], [table])
        assert_same(backend, [step(ids(count, 1), start, table, sample=turn % 3 > 0)])
    assert recorder.replayed == replayed + len(cases)


@pytest.mark.usefixtures("even_products")
def test_prompts_on_triton_s_operations(folder: Path, recorder: FaithfulRecorder) -> None:
    backend = load_recorded(folder, enable_decode_cuda_graph=False)
    (table,) = page_ranges(backend, [100])
    for count, start in ((2, 0), (17, 30)):
        fill(backend, [ids(start, 5)], [table])
        assert_same(backend, [step(ids(count, 1), start, table, sample=True)])


@pytest.mark.usefixtures("even_products")
def test_long_sequences_are_split(folder: Path, recorder: FaithfulRecorder, short_spans: None) -> None:
    """A few sequences have recordings for one part and for all; whichever runs gives the same bits."""
    backend = load_recorded(folder, kernels="reference", attn_impl="triton", cuda_graph_max_seq_len=16)
    lengths = [9, 100, 16, 17, 63]
    tables = page_ranges(backend, [length + 16 for length in lengths])
    fill(backend, [ids(length, i) for i, length in enumerate(lengths)], tables)
    levels = set()
    for chosen in ((0,), (1,), (0, 2), (0, 3), (4, 0, 2, 3, 1)):
        assert_same(backend, [step([9 + i], lengths[i], tables[i], sample=True) for i in chosen])
        levels.add(max(lengths[i] for i in chosen) >= 16)
    for i, count in ((0, 3), (1, 16), (3, 2)):
        assert_same(backend, [step(ids(count, i), lengths[i], tables[i], sample=True)])
    assert levels == {False, True}


@pytest.mark.usefixtures("even_products")
def test_windows(tmp_path: Path, recorder: FaithfulRecorder, short_spans: None) -> None:
    folder = save_tiny_model(tmp_path, "mistral", **SMALL, sliding_window=9)
    backend = load_recorded(folder, kernels="reference", attn_impl="triton")
    lengths = [70, 8, 9]
    tables = page_ranges(backend, [length + 20 for length in lengths])
    fill(backend, [ids(length, i) for i, length in enumerate(lengths)], tables)
    assert_same(backend, [step([9 + i], lengths[i], tables[i], sample=True) for i in range(3)])
    assert_same(backend, [step(ids(20, 2), lengths[1], tables[1], sample=True)])


@pytest.mark.parametrize("model_type", ["gemma2", "deepseek_v2"])
def test_beside_the_code_of_transformers(model_type: str, tmp_path: Path, recorder: FaithfulRecorder) -> None:
    """One has soft caps and windows, one values that are narrower than keys; logits come with the forward."""
    family = next(family for family in PAGED if family.model_type == model_type)
    folder = save_family(tiny_family(family), tmp_path)
    backend = load_recorded(folder, kernels="reference", attn_impl="triton", cuda_graph_max_seq_len=16)
    assert backend.describe()["implementation"] == "transformers paged"
    lengths = [20, 3, 33]
    tables = page_ranges(backend, [length + 20 for length in lengths])
    fill(backend, [ids(length, i) for i, length in enumerate(lengths)], tables)
    decodes = [step([9 + i], lengths[i], tables[i], sample=True) for i in range(3)]
    assert_same(backend, decodes, exactly=False)
    assert_same(backend, [step(ids(11, 2), lengths[1], tables[1], sample=True)], exactly=False)


def test_what_is_not_recorded_runs_plain(folder: Path, recorder: FaithfulRecorder) -> None:
    """Steps of several kinds at once, prompt logprobs, too many rows, too long a prompt: the ids of torch."""
    backend = load_recorded(folder, kernels="reference", attn_impl="triton")
    program, tables = program_of(backend), page_ranges(backend, [40] * 7)
    fill(backend, [ids(10, i) for i in range(7)], tables)
    decodes = [step([9], 10, table, sample=True) for table in tables]
    prompt = step(ids(20, 1), 10, tables[0], sample=True)
    wanted = SequenceStep(prompt.token_ids, 10, tables[0], prompt_targets=[5] * 20)
    spec = SampleSpec(SamplingParams(), 0, 0)
    drafts = SequenceStep([5, 6, 7], 10, tables[0], spec, draft_samples=[spec] * 2)
    assert program.takes(batch_of(backend, decodes[:5])) and program.takes(batch_of(backend, [prompt]))
    replayed = recorder.replayed
    for steps in (
        decodes[:6],
        [*decodes[1:3], prompt],
        [prompt, step(ids(3, 1), 10, tables[1], sample=True)],
        [step(ids(21, 1), 10, tables[0], sample=True)],
        [wanted],
        [drafts],
        [step([9], 10, tables[0], sample=False)],
    ):
        assert not program.takes(batch_of(backend, steps))
        backend.run(steps)
    assert recorder.replayed == replayed


def test_answers_of_one_run(folder: Path, recorder: FaithfulRecorder) -> None:
    prompts = [ids(length, i) for i, length in enumerate((1, 20, 7))]
    expected = greedy(load(folder, kernels="reference"), prompts, 4)
    backend = load_recorded(folder, kernels="reference", attn_impl="triton")
    replayed = recorder.replayed
    assert greedy(backend, prompts, 4) == expected
    assert recorder.replayed == replayed + 3, "the first step has prompts beside each other"
    (answer,) = greedy(backend, prompts[1:2], 4)
    assert answer == expected[1] and recorder.replayed == replayed + 7
