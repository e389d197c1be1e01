"""Tokens chosen by Triton's kernels, interpreted: those of the sampler in torch, from the same logits."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mini_sglang.backend import plain_rows, sampling
from mini_sglang.backend.device_sampling import DeviceSampler
from mini_sglang.backend.distribution import weight_unit
from mini_sglang.backend.kernels.triton import choosing
from mini_sglang.backend.kernels.triton.choosing import Tiles, TritonChooser, take_chosen, tiles_for
from mini_sglang.backend.plain_rows import PlainRows, Table, uniforms
from mini_sglang.backend.sampling import Sampler, uniform
from mini_sglang.backend.step import SampleSpec, SequenceResult
from mini_sglang.types import SamplingParams
from tests.backend.sampling_oracle import LAST_BELOW_ONE, spec
from tests.backend.test_sampling import random_spec

TEMPERATURES = (0.0, 0.6, 1.0, 2.0, 0.05, 1e-6, 1e-310)
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose(
    logits: Tensor, table: Table, vocab_size: int, tiles: Tiles | None = None, place: int = 0
) -> tuple[list[int], list[float]]:
    rows = len(logits)
    ids, numbers = torch.full((rows + place,), -5), torch.full((rows, 2), math.nan, dtype=torch.float64)
    table[3] = place
    TritonChooser(vocab_size).choose(logits, torch.from_numpy(table), ids, numbers, tiles)
    assert ids[:place].tolist() == [-5] * place
    assert numbers[:, 0].tolist() == ids[place:].tolist()
    return ids[place:].tolist(), numbers[:, 1].tolist()


def table_of(vocab_size: int, specs: Sequence[SampleSpec]) -> Table:
    table = PlainRows(vocab_size).table(specs)
    assert table is not None
    return table


def assert_same(
    logits: Tensor, specs: Sequence[SampleSpec], vocab_size: int, tiles: Tiles | None = None
) -> None:
    expected = Sampler(vocab_size).sample(logits.float().clone(), specs)
    found, peaks = choose(logits, table_of(vocab_size, specs), vocab_size, tiles, place=3)
    for token, peak, result in zip(found, peaks, expected, strict=True):
        assert 0 <= token < vocab_size
        if result.error is None:
            assert token == result.token_id and math.isfinite(peak)
        else:
            assert result.error == sampling.bad_logits(peak)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1 << 40),
    vocab_size=st.one_of(st.integers(1, 5), st.integers(6, 700)),
    rows=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    padding=st.integers(0, 9),
    part=st.sampled_from((16, 64, 1024)),
)
def test_rows_of_any_kind(
    seed: int, vocab_size: int, rows: int, dtype: torch.dtype, padding: int, part: int
) -> None:
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab_size + padding, generator=generator) * rng.choice((0.0, 0.1, 3.0, 30.0))
    if rng.random() < 0.5:
        logits = logits.round() * rng.choice((-1.0, 1.0))
    for row in logits:
        for value in SPECIAL:
            if rng.random() < 0.15:
                count = rng.choice((1, vocab_size // 2, vocab_size))
                row[torch.randperm(vocab_size, generator=generator)[:count]] = value
    # What pads the head is not to be chosen.
    logits[:, vocab_size:] = rng.choice((math.nan, 1e4))
    specs = [
        spec(
            rng.getrandbits(63),
            rng.randrange(1000),
            temperature=rng.choice(TEMPERATURES),
            min_p=rng.choice((0.0, 0.0, 0.05, 1.0)),
        )
        for _ in range(rows)
    ]
    assert_same(logits.to(dtype), specs, vocab_size, Tiles(part, rng.choice((16, part)), 4, 4))


@pytest.mark.parametrize("rows", [1, 9, 33])
def test_the_tiles_that_are_taken(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    for vocab_size, spread in ((5003, 0.01), (9216, 4.0)):
        logits = torch.randn(rows, vocab_size, generator=generator) * spread
        specs = [spec(row, 5, temperature=TEMPERATURES[1 + row % 4]) for row in range(rows)]
        assert_same(logits.bfloat16(), specs, vocab_size)
    assert {tiles_for(count, 151_936).part for count in (1, 32, 256)} == {
        tiles.part for _, tiles in choosing.TILES
    }


@pytest.mark.parametrize("at", [0.0, 0.5, LAST_BELOW_ONE])
def test_the_ends_of_the_random_numbers(at: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal tokens, of those of one part alone, and where the last ones have no weight."""
    for module in (sampling, plain_rows):
        monkeypatch.setattr(module, "uniform", lambda seed, index: at)
    logits = torch.zeros(4, 100)
    logits[1] = -math.inf
    logits[1, 40:43] = 1.0
    logits[2, 50:] = -1e4
    logits[3, :99] = -1e4
    specs = [spec(temperature=1.0)] * 4
    assert_same(logits, specs, 100, Tiles(16, 16, 4, 4))
    assert_same(logits, specs, 100, Tiles(128, 32, 4, 4))


def test_weights_below_a_half_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred of them would reach past the one token that has any."""
    for module in (sampling, plain_rows):
        monkeypatch.setattr(module, "uniform", lambda seed, index: LAST_BELOW_ONE)
    for weight, wanted in ((0.4, 3), (0.6, 99)):
        logits = torch.full((1, 100), math.log(weight / weight_unit(100)), dtype=torch.float32)
        logits[0, 3] = 0.0
        specs = [spec(temperature=1.0)]
        assert choose(logits, table_of(100, specs), 100, Tiles(16, 16, 4, 4))[0] == [wanted]
        assert_same(logits, specs, 100, Tiles(32, 16, 4, 4))


def test_of_equal_ones_the_lowest_is_taken() -> None:
    logits = torch.zeros(3, 200)
    logits[1, [19, 35, 51, 180]] = 1.0
    logits[2] = -math.inf
    logits[2, [70, 86]] = math.nan
    table = table_of(200, [spec()] * 3)
    for tiles in (Tiles(64, 16, 4, 4), Tiles(256, 32, 4, 4), Tiles(16, 16, 4, 4)):
        assert choose(logits, table, 200, tiles)[0] == [0, 19, 70]


def test_what_is_told_of_rows_without_a_token() -> None:
    logits = torch.tensor([[1.0, math.nan, math.inf], [1.0, 2.0, math.inf], [-math.inf] * 3, [1.0, 3.0, 3.0]])
    for temperature in (0.0, 0.7):
        table = table_of(3, [spec(temperature=temperature)] * 4)
        found, peaks = choose(logits, table, 3)
        assert found[:3] == [1, 2, 0] and math.isnan(peaks[0]) and peaks[1:] == [math.inf, -math.inf, 3.0]


def test_a_row_s_token_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(40, 1501, generator=generator)
    specs = [spec(row, 3, temperature=0.9) for row in range(40)]
    together, _ = choose(logits, table_of(1501, specs), 1501)
    for row in (0, 7, 39):
        assert choose(logits[row : row + 1], table_of(1501, [specs[row]]), 1501)[0] == [together[row]]


def test_random_numbers_of_many_are_those_of_each() -> None:
    rng = random.Random(1)
    seeds = [rng.randrange(-(1 << 63), 1 << 63) for _ in range(200)] + [0, -1, (1 << 63) - 1]
    indices = [rng.randrange(1 << 31) for _ in seeds]
    assert uniforms(seeds, indices).tolist() == [uniform(s, i) for s, i in zip(seeds, indices, strict=True)]


@pytest.mark.parametrize("count", [1, 5, 60])
def test_a_table_has_what_the_sampler_takes(count: int) -> None:
    rows, rng = PlainRows(1000), random.Random(count)
    for turn in range(3):
        specs = [
            spec(rng.getrandbits(60), turn, temperature=rng.choice(TEMPERATURES), min_p=rng.random(), top_k=k)
            for k in [0, 1000] * count
        ]
        table = rows.table(specs)
        assert table is not None
        for one, (scale, draw, floor, place) in zip(specs, table.T, strict=True):
            if one.params.greedy:
                assert scale == 0.0 and place == 0.0
                continue
            columns = Sampler(1000)._columns(torch.zeros(1, 1), [one])
            assert columns.floor is not None
            wanted = [float(value) for value in (columns.scale, columns.uniform, columns.floor)]
            assert [scale, draw, floor, place] == [*wanted, 0.0]


def test_rows_that_need_more_have_no_table() -> None:
    rows, plain = PlainRows(1000), spec(temperature=0.5)
    assert rows.table([]) is None and rows.table([plain]) is not None
    more = [
        spec(temperature=0.5, top_k=3),
        spec(temperature=0.5, top_p=0.9),
        spec(logprobs=True),
        spec(repetition_penalty=1.1),
        spec(presence_penalty=0.1),
        spec(frequency_penalty=0.1),
        spec(logit_bias={3: 1.0}),
        spec(banned=(4,)),
        replace(plain, grammar=object()),  # type: ignore[arg-type]
    ]
    for one in more:
        for specs in ([one], [plain, one], [plain] * 40 + [one]):
            assert rows.table(specs) is None
    # The largest is the largest, whatever the filters keep.
    assert rows.table([spec(top_k=3, top_p=0.5)]) is not None


def test_parameters_are_told_apart_when_many_came_and_went(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_rows, "_KNOWN", 3)
    rows = PlainRows(1000)
    for turn in range(200):
        temperature = 0.1 + turn / 200
        table = rows.table([SampleSpec(SamplingParams(temperature=temperature), 0, 0)])
        assert table is not None and table[0, 0] == 1.0 / temperature
        assert len(rows._known) <= 3


def test_tokens_on_the_device_go_to_their_rows() -> None:
    ids = torch.arange(100, 130)
    tokens = torch.tensor([7, -1, 0, -30, -3, 9, -2])
    take_chosen(tokens[:6], ids)
    assert tokens.tolist() == [7, 100, 0, 129, 102, 9, -2]


@pytest.mark.parametrize(("vocab_size", "rounds", "rows"), [(37, 6, 6), (1501, 3, 9)])
def test_a_batch_of_all_kinds_is_chosen_as_by_the_sampler(vocab_size: int, rounds: int, rows: int) -> None:
    """Rows that need more than the kernels do beside rows that do not, and both alone."""
    rng, generator = random.Random(vocab_size), torch.Generator().manual_seed(vocab_size)
    ours = DeviceSampler(vocab_size, kernels=True)
    for turn in range(rounds):
        logits = torch.randn(rows, vocab_size + 3, generator=generator) * rng.choice([0.1, 6.0])
        logits[rows // 2, 3] = math.nan
        specs = [random_spec(rng, vocab_size) for _ in range(rows)]
        if turn % 3:
            specs[::2] = [spec(row, turn, temperature=0.7 * (row % 3)) for row in range(len(specs[::2]))]
        own = Sampler(vocab_size).sample(logits.clone(), specs)
        assert repr(ours.sample(logits.clone(), specs)) == repr(own)


def test_the_kernels_run_where_they_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a whole batch in the head's own type, and for the rows of a mixed one that are drawn."""
    seen: list[tuple[int, torch.dtype]] = []
    run = TritonChooser.choose

    def noted(self: TritonChooser, logits: Tensor, *rest: Tensor) -> None:
        seen.append((len(logits), logits.dtype))
        run(self, logits, *rest)

    monkeypatch.setattr(TritonChooser, "choose", noted)
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)).bfloat16()
    plain = [spec(row, temperature=0.5 * row) for row in range(4)]

    def ids(sampler: Sampler, specs: Sequence[SampleSpec]) -> list[SequenceResult]:
        return sampler.sample(logits, specs)

    with_kernels, without = DeviceSampler(50, kernels=True), DeviceSampler(50)
    assert ids(with_kernels, plain) == ids(without, plain)
    assert seen == [(4, torch.bfloat16)]
    mixed = [*plain[:3], spec(3, temperature=1.0, top_k=5)]
    assert ids(with_kernels, mixed) == ids(without, mixed)
    assert seen[1:] == [(2, torch.float32)]
    with pytest.raises(ValueError, match=r"must be \[3, at least 50\]"):
        with_kernels.sample(logits, plain[:3])
