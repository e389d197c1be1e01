"""Steps submitted ahead give what the same steps give one at a time, on a device's queue and in a thread."""

from __future__ import annotations

import random
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_sglang.backend import device_sampling
from mini_sglang.backend.batch import Batch, Followed, Limits
from mini_sglang.backend.device_sampling import DeviceSampler
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.overlap import DeviceSubmitter, ThreadSubmitter, choose_submitter
from mini_sglang.backend.sampling import Sampler
from mini_sglang.backend.step import Flight, SequenceResult, SequenceStep, Submitter
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError
from tests.backend.harness import load, page_ranges, step
from tests.backend.sampling_oracle import spec
from tests.backend.test_device_sampling import Fetches, NoWaiting, random_logits
from tests.backend.test_sampling import random_spec
from tests.backend.tiny_models import VOCAB_SIZE, tiny_model

PROMPTS = [[5, 6, 7], list(range(20, 57)), [200, 3], list(range(100, 119))]
COUNT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("qwen3").save_pretrained(folder)
    return folder


@pytest.fixture(params=["reference", "auto"])
def backend(request: pytest.FixtureRequest, folder: Path) -> ModelBackend:
    return load(folder, kernels=request.param)


def on_device(backend: ModelBackend) -> Submitter:
    backend.sampler = DeviceSampler(VOCAB_SIZE)
    return DeviceSubmitter(backend)


WAYS: list[Callable[[ModelBackend], Submitter]] = [on_device, ThreadSubmitter]
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8},
    {"temperature": 1.2, "top_k": 7, "logprobs": True, "top_logprobs": 2},
    {"temperature": 0.9, "top_p": 0.8},
]


def decode(row: int, index: int, token: int, pages: array[int]) -> SequenceStep:
    """The step that chooses answer token number ``index`` from the one before it."""
    start = len(PROMPTS[row]) + index - 1
    return SequenceStep([token], start, pages, spec(seed=row, index=index, **KINDS[row]))


def first_steps(backend: ModelBackend) -> list[SequenceStep]:
    tables = page_ranges(backend, [len(prompt) + COUNT for prompt in PROMPTS])
    return [
        SequenceStep(prompt, 0, pages, spec(seed=row, **KINDS[row]))
        for row, (prompt, pages) in enumerate(zip(PROMPTS, tables, strict=True))
    ]


def one_at_a_time(backend: ModelBackend) -> list[list[SequenceResult]]:
    steps, answers = first_steps(backend), []
    tables = [one.pages for one in steps]
    for index in range(1, COUNT + 1):
        answers.append(backend.run(steps))
        steps = [
            decode(row, index, result.token_id or 0, tables[row]) for row, result in enumerate(answers[-1])
        ]
    return answers


@pytest.mark.parametrize("way", WAYS)
def test_steps_that_follow_give_what_they_give_one_at_a_time(
    backend: ModelBackend, way: Callable[[ModelBackend], Submitter]
) -> None:
    expected = one_at_a_time(backend)
    submitter, draw = way(backend), random.Random(3)
    steps = first_steps(backend)
    tables = [one.pages for one in steps]
    order = list(range(len(steps)))
    flights: list[tuple[list[int], Flight]] = [(order, submitter.submit(steps))]
    for index in range(1, COUNT):
        # In another order every time, so that a place is not a row.
        following = draw.sample(order, len(order))
        steps = [replace(decode(row, index, 0, tables[row]), follows=order.index(row)) for row in following]
        flights.append((following, submitter.submit(steps)))
        order = following
        if len(flights) > 2:
            flights[-3][1].wait()
    for (places, flight), answers in zip(flights, expected, strict=True):
        assert flight.wait() == [answers[row] for row in places]
        assert flight.wait() == flight.wait()
    submitter.close()


def test_the_device_is_not_waited_for_until_somebody_wants_to_know(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = load(folder)
    submitter, fetches = on_device(backend), Fetches(monkeypatch)
    steps = first_steps(backend)
    flights = [submitter.submit(steps)]
    for index in range(1, 4):
        following = [replace(decode(row, index, 0, s.pages), follows=row) for row, s in enumerate(steps)]
        flights.append(submitter.submit(following))
    assert fetches.count == 0
    for flight in flights:
        flight.wait()
    assert fetches.count == 4


def test_nothing_of_a_launch_or_of_what_follows_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    fetches = Fetches(monkeypatch, lambda numbers: [1.0] * numbers.numel())
    monkeypatch.setattr(device_sampling, "usable", lambda logits: logits)
    specs = [spec(temperature=0.6, top_p=0.9, logprobs=True), spec(), spec(temperature=0.6, top_k=5)]
    with NoWaiting(monkeypatch):
        draw = DeviceSampler(50_000).launch(torch.empty(3, 50_016, device="meta"), specs)
        assert fetches.count == 0 and draw.ids.device.type == "meta"
    assert [result.token_id for result in draw.results()] == [1, 1, 1]


@pytest.mark.parametrize(("vocab_size", "rounds", "rows"), [(37, 20, 9), (1501, 8, 30)])
def test_a_launch_gives_what_sample_gives_and_says_which_ids_were_others(
    vocab_size: int, rounds: int, rows: int
) -> None:
    rng, generator = random.Random(vocab_size), torch.Generator().manual_seed(vocab_size)
    revised = 0
    for _ in range(rounds):
        logits = random_logits(rng, generator, rows, vocab_size)
        specs = [random_spec(rng, vocab_size) for _ in range(rows)]
        own = Sampler(vocab_size).sample(logits.clone(), specs)
        draw = DeviceSampler(vocab_size).launch(logits.clone(), specs)
        taken = draw.ids.tolist()
        results = draw.results()
        for token, result in zip(taken, results, strict=True):
            assert 0 <= token < vocab_size
            assert result.revised is (result.token_id is not None and result.token_id != token)
            revised += result.revised
        assert repr([replace(result, revised=False) for result in results]) == repr(own)
    assert vocab_size < 100 or revised > 0


def test_what_needs_the_host_is_done_at_once_and_can_be_followed(
    backend: ModelBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompt logprobs, and a prompt whose logits are kept, beside a sequence that follows."""
    expected = one_at_a_time(backend)
    submitter = on_device(backend)
    steps = first_steps(backend)
    tables = [one.pages for one in steps]
    steps[0].keep_logits = 0
    first = submitter.submit(steps)
    again = replace(steps[0], token_ids=[], start=3, keep_logits=None, from_logits=0)
    second = submitter.submit([replace(decode(1, 1, 0, tables[1]), follows=1), again])
    third = submitter.submit(
        [
            replace(decode(0, 1, 0, tables[0]), follows=1),
            SequenceStep(PROMPTS[2], 0, tables[2], spec(seed=2, **KINDS[2]), PROMPTS[2][1:], 1),
        ]
    )
    assert first.wait() == expected[0]
    assert second.wait() == [expected[1][1], expected[0][0]]
    found = third.wait()
    assert found[0] == expected[1][0] and found[1].token_id == expected[0][2].token_id
    assert [entry.token_id for entry in found[1].prompt_logprobs] == PROMPTS[2][1:]


@pytest.mark.parametrize("way", WAYS)
def test_a_row_without_a_token_harms_nobody(folder: Path, way: Callable[[ModelBackend], Submitter]) -> None:
    backend = load(folder)
    expected = one_at_a_time(backend)
    submitter = way(backend)
    steps = first_steps(backend)
    backend.run(steps)
    backend.kv.data[:, steps[1].pages[0] * backend.page_size] = torch.nan
    again = [replace(s, token_ids=p[-1:], start=len(p) - 1) for s, p in zip(steps, PROMPTS, strict=True)]
    flights = [submitter.submit(again)]
    flights.append(
        submitter.submit([replace(decode(row, 1, 0, s.pages), follows=row) for row, s in enumerate(steps)])
    )
    for index, flight in enumerate(flights):
        results = flight.wait()
        assert results[1].error is not None
        for row in (0, 2, 3):
            assert results[row].token_id == expected[index][row].token_id


def test_a_step_that_follows_one_that_failed_fails_in_the_thread(folder: Path) -> None:
    backend = load(folder)
    submitter = ThreadSubmitter(backend)
    pages = page_ranges(backend, [9, 9])
    bad = submitter.submit([step([VOCAB_SIZE], 0, pages[0], sample=True)])
    after = submitter.submit([replace(step([0], 1, pages[0], sample=True), follows=0)])
    apart = submitter.submit([step([5], 0, pages[1], sample=True)])
    with pytest.raises(InvalidValueError, match="token id"):
        bad.wait()
    with pytest.raises(RuntimeError, match="follows"):
        after.wait()
    assert apart.wait()[0].token_id is not None
    submitter.close()


def test_the_thread_is_another_and_ends(folder: Path) -> None:
    backend = load(folder)
    threads: list[threading.Thread] = []
    run = backend.run

    def noted(steps: Sequence[SequenceStep]) -> list[SequenceResult]:
        threads.append(threading.current_thread())
        return run(steps)

    backend.run = noted  # type: ignore[method-assign]
    submitter = ThreadSubmitter(backend)
    submitter.submit([step([5], 0, page_ranges(backend, [2])[0], sample=True)]).wait()
    assert threads[0].name.startswith("mini-sglang-steps") and threads[0].is_alive()
    submitter.close()
    assert not threads[0].is_alive()


def test_followed_tokens_go_to_their_rows() -> None:
    pages = [array("i", [page]) for page in range(4)]
    steps = [
        step(tokens, 3, table, sample=True)
        for tokens, table in zip([[1], [2, 3], [4], [5]], pages, strict=True)
    ]
    batch = Batch.build(steps, Limits(16, 4, 100, 64), torch.device("cpu"))
    batch.followed = Followed([3, 0], torch.tensor([77, 88]))
    room = torch.zeros(9, dtype=torch.int64)
    room[:5] = batch.token_ids
    batch.fill(room)
    assert room.tolist() == [88, 4, 77, 2, 3, 0, 0, 0, 0]


def test_the_setting_says_how(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, mps = (torch.device(name) for name in ("cpu", "cuda", "mps"))
    backend = load(folder)

    def chosen(setting: str, device: torch.device) -> type | None:
        found = choose_submitter(Settings.resolve({"overlap_schedule": setting}, {}), backend, device)
        return None if found is None else type(found)

    assert [chosen(setting, cpu) for setting in ("auto", "0", "1")] == [None, None, ThreadSubmitter]
    assert [chosen(setting, mps) for setting in ("auto", "0")] == [None, None]
    with pytest.raises(InvalidValueError, match="OVERLAP_SCHEDULE is '1'; it must be auto or 0 on MPS"):
        chosen("1", mps)
    backend.sampler = DeviceSampler(VOCAB_SIZE)
    assert [chosen(setting, cuda) for setting in ("auto", "0", "1")] == [
        DeviceSubmitter,
        None,
        DeviceSubmitter,
    ]
    assert load(folder).submitter is None and isinstance(
        load(folder, overlap_schedule="1").submitter, ThreadSubmitter
    )
