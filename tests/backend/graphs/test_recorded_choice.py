"""The choice of tokens recorded with the steps, interpreted: the tokens of the sampler in torch."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mini_sglang.backend import device_sampling
from mini_sglang.backend.batch import Batch
from mini_sglang.backend.device_sampling import Chosen, DeviceSampler
from mini_sglang.backend.graphs import program as programs
from mini_sglang.backend.graphs.choosing import RecordedChoosing
from mini_sglang.backend.kernels.triton.choosing import TritonChooser
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.overlap import DeviceSubmitter
from mini_sglang.backend.sampling import Sampler
from mini_sglang.backend.step import Flight, SampleSpec, SequenceResult, SequenceStep
from tests.backend.graphs.comparing import SMALL, batch_of, ids, load_recorded, plain, program_of
from tests.backend.graphs.recorder import FaithfulRecorder
from tests.backend.harness import load, page_ranges, step
from tests.backend.sampling_oracle import spec
from tests.backend.tiny_models import save_tiny_model
from tests.backend.transformers_models.families import PAGED
from tests.backend.transformers_models.families import save as save_family
from tests.backend.transformers_models.families import tiny_model as tiny_family

LENGTHS = (9, 20, 3, 30, 14)
ONE_LAYER: dict[str, Any] = {**SMALL, "num_hidden_layers": 1}
# Torch's operations are quicker to interpret; choosing is Triton's all the same.
SETTINGS: dict[str, Any] = {"enable_cuda_graph": False}
KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8},
    {"temperature": 1.5, "min_p": 0.05},
    {"temperature": 0.3},
    {"temperature": 1.0},
)
MORE: dict[str, Any] = {"temperature": 0.9, "top_p": 0.8, "logprobs": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path, "qwen3", **ONE_LAYER)


def on_device(backend: ModelBackend) -> ModelBackend:
    backend.sampler = DeviceSampler(backend.vocab_size, kernels=True)
    return backend


def start(backend: ModelBackend) -> list[array[int]]:
    """KV of five prompts."""
    tables = page_ranges(backend, [length + 20 for length in LENGTHS])
    plain(backend, [step(ids(n, i), 0, t) for i, (n, t) in enumerate(zip(LENGTHS, tables, strict=True))])
    return tables


def decodes(
    tables: Sequence[array[int]], rows: Sequence[int], index: int, specs: Sequence[SampleSpec]
) -> list[SequenceStep]:
    return [
        SequenceStep([9 + row + index], LENGTHS[row] + index, tables[row], one)
        for row, one in zip(rows, specs, strict=True)
    ]


def specs_of(rows: Sequence[int], index: int) -> list[SampleSpec]:
    return [spec(row, index, **KINDS[row]) for row in rows]


@torch.inference_mode()
def expected_of(backend: ModelBackend, steps: Sequence[SequenceStep]) -> list[SequenceResult]:
    """By the decoder itself and the sampler of a CPU; writes the KV that the step writes."""
    batch = batch_of(backend, steps)
    logits = backend.decoder.logits(backend.decoder.forward(batch, backend.kv, backend.attention))
    results = [SequenceResult() for _ in steps]
    chosen = Sampler(backend.vocab_size).sample(logits, batch.specs)
    for (place, _), result in zip(batch.samples, chosen, strict=True):
        results[place] = result
    return results


class Choices:
    """Counts the recorded choices that are replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[tuple[int, int]] = []
        replay = RecordedChoosing.replay

        def counted(self_: RecordedChoosing, rows: int, count: int, place: int) -> tuple[Tensor, Tensor]:
            self.rows.append((rows, count))
            return replay(self_, rows, count, place)

        monkeypatch.setattr(RecordedChoosing, "replay", counted)


@pytest.mark.usefixtures("even_products")
def test_decodes_of_every_number(
    folder: Path, recorder: FaithfulRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy rows beside drawn ones, padded and not, at once and launched."""
    backend = on_device(load_recorded(folder, **SETTINGS))
    tables, choices = start(backend), Choices(monkeypatch)
    # Not what a step before left behind.
    monkeypatch.setattr(backend.decoder, "head", None)
    for turn, count in enumerate((1, 2, 3, 4, 5, 3)):
        rows = random.Random(turn).sample(range(5), count)
        steps = decodes(tables, rows, turn, specs_of(rows, turn))
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(backend.decoder, "head")
            expected = expected_of(backend, steps)
        # Launched steps take turns.
        for _ in range(1 + count % 2):
            draw, places = backend.launch(steps, None)
            assert isinstance(draw, Chosen) and places == list(range(count))
            assert draw.results() == expected
        assert draw.ids.tolist() == [result.token_id for result in expected]
        assert backend.run(steps) == expected
    sizes = [1, 2, 4, 4, 5, 4]
    wanted = [
        (size, count)
        for size, count in zip(sizes, (1, 2, 3, 4, 5, 3), strict=True)
        for _ in range(2 + count % 2)
    ]
    assert choices.rows == wanted


@pytest.mark.usefixtures("even_products")
@pytest.mark.parametrize("width", ["bf16", "fp32"])
def test_the_answers_of_other_ways_beside_it(
    width: str, folder: Path, recorder: FaithfulRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps with other specs, with kept logits, or that choose for some alone, take the way they took."""
    backend = on_device(load_recorded(folder, **SETTINGS, dtype=width))
    tables, choices = start(backend), Choices(monkeypatch)
    rows = [3, 0, 1]
    specs = specs_of(rows, 1)
    both = decodes(tables, rows, 0, specs)
    kinds = {
        "plain": both,
        "mixed": decodes(tables, rows, 0, [specs[0], spec(0, 1, **MORE), specs[2]]),
        "kept": [replace(both[0], keep_logits=4), *both[1:]],
        "some": [both[0], replace(both[1], sample=None), both[2]],
    }
    for name, steps in kinds.items():
        count = len(choices.rows)
        expected = expected_of(backend, steps)
        draw, places = backend.launch(steps, None)
        assert draw is not None
        found = [replace(one, revised=False) for one in draw.results()]
        assert found == [expected[place] for place in places]
        assert [replace(one, revised=False) for one in backend.run(steps)] == expected, name
        assert (len(choices.rows) - count == 2) == (name == "plain")
    kept = replace(both[0], token_ids=[], from_logits=4)
    assert backend.run([kept])[0].token_id == expected_of(backend, both)[0].token_id
    assert backend._kept._rows[4].dtype == torch.float32


@pytest.mark.usefixtures("even_products")
@pytest.mark.parametrize("kernels", ["reference", "triton"])
def test_a_prompt_s_token_is_chosen_like_that_of_one_decode(
    kernels: str, folder: Path, recorder: FaithfulRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"kernels": kernels, "attn_impl": "triton", "enable_decode_cuda_graph": kernels == "triton"}
    backend = on_device(load_recorded(folder, **given))
    (table,), choices = page_ranges(backend, [40]), Choices(monkeypatch)
    steps = [SequenceStep(ids(11, 1), 0, table, spec(5, 0, temperature=1.3))]
    assert backend.run(steps) == expected_of(backend, steps)
    # A chunk of one chooses nothing.
    chunk = [SequenceStep(ids(11, 1), 0, table, None)]
    assert backend.run(chunk) == [SequenceResult()]
    # PyTorch's operators are asked for: they choose, too.
    assert choices.rows == ([(1, 1)] if kernels == "triton" else [])
    assert ("tokens chosen" in str(backend.describe()["cuda_graphs"])) == (kernels == "triton")


class Transfers:
    """Counts what is sent to the device beside a step's inputs: tables, and rows of tokens that are there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        fill, send = Batch.fill, device_sampling.to_device

        def filled(batch: Batch, token_ids: Tensor) -> None:
            self.count += batch.followed is not None
            fill(batch, token_ids)

        def sent(values: Tensor, device: torch.device) -> Tensor:
            self.count += 1
            return send(values, device)

        monkeypatch.setattr(Batch, "fill", filled)
        monkeypatch.setattr(device_sampling, "to_device", sent)


@pytest.mark.usefixtures("even_products")
@pytest.mark.parametrize("mixed", [(), (2, 3, 6)])
def test_steps_that_follow_launched_ones(
    mixed: Sequence[int], folder: Path, recorder: FaithfulRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another order every time, as many under way as there may be; ``mixed`` ones go other ways."""
    backend = on_device(load_recorded(folder, **SETTINGS))
    tables, draw, choices = start(backend), random.Random(3), Choices(monkeypatch)
    kinds = [[dict(KINDS[row], **(MORE if row == 1 and turn in mixed else {})) for row in range(5)]
             for turn in range(9)]  # fmt: skip
    orders = [draw.sample(range(5), draw.choice((3, 5, 4))) for _ in range(9)]
    tokens, lengths = [9 + row for row in range(5)], list(LENGTHS)
    expected: list[list[SequenceResult]] = []
    before: list[int] = []
    for turn, order in enumerate(orders):
        # One that was not in the step before has the token that it had.
        specs = [spec(row, turn, **kinds[turn][row]) for row in order]
        steps = [
            SequenceStep([tokens[row]], lengths[row], tables[row], one)
            for row, one in zip(order, specs, strict=True)
        ]
        expected.append(expected_of(backend, steps))
        for row, result in zip(order, expected[-1], strict=True):
            tokens[row], lengths[row] = result.token_id or 0, lengths[row] + 1
    submitter, transfers = DeviceSubmitter(backend), Transfers(monkeypatch)
    known, lengths = [9 + row for row in range(5)], list(LENGTHS)
    flights: list[Flight] = []
    for turn, order in enumerate(orders):
        steps = []
        for row in order:
            follows = before.index(row) if row in before else None
            last = next((t for t in range(turn - 1, -1, -1) if row in orders[t]), None)
            token = known[row] if last is None else expected[last][orders[last].index(row)].token_id or 0
            steps.append(
                SequenceStep(
                    [token if follows is None else 0],
                    lengths[row],
                    tables[row],
                    spec(row, turn, **kinds[turn][row]),
                    follows=follows,
                )
            )
            lengths[row] += 1
        flights.append(submitter.submit(steps))
        before = order
        if len(flights) > 1:
            flights[-2].wait()
        if turn == 4:
            # What runs beside them, and is waited for at once, harms none.
            aside = decodes(tables, [0], 30, [spec(temperature=1.0)])
            aside[0].pages = array("i", [backend.num_pages - 1] * 4)
            backend.run(aside)
    for flight, wanted in zip(flights, expected, strict=True):
        assert [replace(one, revised=False) for one in flight.wait()] == wanted
    assert (len(choices.rows), transfers.count) == (10, 0) if not mixed else transfers.count > 0


def test_what_was_chosen_stays_until_the_step_after_next(folder: Path, recorder: FaithfulRecorder) -> None:
    backend = on_device(load_recorded(folder, **SETTINGS))
    tables = start(backend)
    flying: list[tuple[Chosen, list[int]]] = []
    for turn in range(6):
        steps = decodes(tables, range(5), turn, [spec(row, turn, temperature=2.0) for row in range(5)])
        if turn % 2:
            backend.run(steps)
        draw, _ = backend.launch(steps, None)
        assert isinstance(draw, Chosen)
        flying.append((draw, draw.ids.tolist()))
        for one, kept in flying[-2:]:
            assert one.ids.tolist() == kept
        backend.run(steps)
        assert draw.ids.tolist() == flying[-1][1]
    assert flying[0][1] != flying[1][1]


@pytest.mark.usefixtures("even_products")
def test_a_row_without_a_token_is_told_and_harms_nobody(folder: Path, recorder: FaithfulRecorder) -> None:
    backend = on_device(load_recorded(folder, **SETTINGS))
    tables = start(backend)
    backend.kv.data[:, tables[1][0] * backend.page_size] = math.nan
    rows = [0, 1, 2]
    steps = decodes(tables, rows, 0, specs_of(rows, 0))
    expected = expected_of(backend, steps)
    submitter = DeviceSubmitter(backend)
    first = submitter.submit(steps)
    after = [
        replace(one, token_ids=[0], start=one.start + 1, follows=place) for place, one in enumerate(steps)
    ]
    second = submitter.submit(after)
    assert first.wait() == expected and expected[1].error is not None
    assert [result.error is None for result in second.wait()] == [True, False, True]


@pytest.mark.usefixtures("even_products")
def test_a_model_of_transformers(tmp_path: Path, recorder: FaithfulRecorder) -> None:
    """Whose step gives logits."""
    family = next(family for family in PAGED if family.model_type == "stablelm")
    folder = save_family(tiny_family(family), tmp_path)
    backend = on_device(load_recorded(folder, enable_cuda_graph=False, attn_impl="triton"))
    assert "tokens chosen" in str(backend.describe()["cuda_graphs"])
    tables = start(backend)
    steps = decodes(tables, [0, 1, 2], 0, specs_of([0, 1, 2], 0))
    assert program_of(backend).choosing is not None
    assert backend.run(steps) == expected_of(backend, steps)


@pytest.mark.parametrize("what", ["recording", "later recording", "ids", "logits"])
def test_where_it_fails_the_steps_are_recorded_without_it(
    what: str,
    folder: Path,
    recorder: FaithfulRecorder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    record, choose, count = RecordedChoosing.record, TritonChooser.choose, [0]

    def refused(hidden: Tensor) -> Tensor:
        raise RuntimeError("no room for the product")

    def failing(self: RecordedChoosing, rows: int, recorder_: Any) -> None:
        count[0] += 1
        if what == "recording" or count[0] > 5:
            monkeypatch.setattr(self, "_head", refused)
        record(self, rows, recorder_)

    def late(self: TritonChooser, logits: Tensor, *rest: Tensor) -> None:
        """One token too high, but for the twin's."""
        choose(self, logits, *rest)
        rest[1].add_(1)

    if "recording" in what:
        monkeypatch.setattr(RecordedChoosing, "record", failing)
    elif what == "ids":
        monkeypatch.setattr(TritonChooser, "choose", late)
    else:
        own = recorder.record

        def other(step_: Any) -> Any:
            replay = own(step_)
            return (lambda: None) if "choose" in step_.__qualname__ else replay

        monkeypatch.setattr(recorder, "record", other)
    given = {"kv_token_budget": 0} if what == "recording" else {}
    backend = load_recorded(folder, **SETTINGS, **given)
    monkeypatch.undo()
    assert caplog.text.count("CUDA graphs end before the choice of tokens") == 1
    assert "tokens chosen" not in str(backend.describe()["cuda_graphs"])
    assert program_of(backend).choosing is None
    on_device(backend)
    tables = start(backend)
    steps = decodes(tables, [0, 1], 0, specs_of([0, 1], 0))
    assert [one.token_id for one in backend.run(steps)] == [
        one.token_id for one in expected_of(backend, steps)
    ]


def _is_head(weight: Any) -> bool:
    """Whether it has a row for each token of ``SMALL``."""
    return bool(weight.shape == (200, 32))


def test_blocks_that_torch_multiplies_are_not_recorded(
    folder: Path, recorder: FaithfulRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mini_sglang.backend.graphs.setup._in_blocks", _is_head)
    backend = load_recorded(folder, **SETTINGS)
    assert program_of(backend).choosing is None


def test_its_memory_is_counted(folder: Path, recorder: FaithfulRecorder) -> None:
    """One recording more for every number of rows."""
    load_recorded(folder, **SETTINGS, kernels="triton")
    with_it = recorder.recorded
    recorder.recorded = 0
    load(folder, kernels="reference", attn_impl="triton", max_batch_size=5, kv_token_budget=1024, **SETTINGS)
    assert with_it == 2 * recorder.recorded
    assert programs.GraphProgram.max_rows is None
