"""The sampler against transformers' warpers, exact distributions and itself alone."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mini_sglang.backend import sampling
from mini_sglang.backend.sampling import Sampler, uniform
from mini_sglang.backend.step import SampleSpec, SequenceResult
from mini_sglang.types import SamplingParams

NO_IDS: Any = torch.zeros(1, 1, dtype=torch.long)
LAST_BELOW_ONE = 1.0 - 2.0**-53


def spec(seed: int = 0, index: int = 0, prompt: Sequence[int] = (), output: Sequence[int] = (),
         banned: tuple[int, ...] = (), **params: Any) -> SampleSpec:  # fmt: skip
    return SampleSpec(SamplingParams(**params), seed, index, prompt, output, banned)


def tokens(results: Sequence[SequenceResult]) -> list[int | None]:
    assert all(result.error is None for result in results), results
    return [result.token_id for result in results]


def warped(row: torch.Tensor, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """What transformers leaves of ``row``: ids in the documented order of the draw, and probabilities.

    In float64, where its own rounding cannot move a token over an edge.
    """
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    doubled: Any = row.double().unsqueeze(0)
    scores = warpers(NO_IDS, doubled)
    probs = scores.softmax(-1)[0].numpy()
    kept = np.flatnonzero(probs > 0.0)
    values = row.double().numpy()
    by_value = np.lexsort((np.arange(len(values)), -values))
    # transformers sorts unstably: among equal logits that top_p cuts through, its ids are arbitrary.
    ranked = by_value[: len(kept)]
    assert np.array_equal(np.sort(values[kept])[::-1], values[ranked])
    order = ranked if 0 < params.top_k < len(values) or params.top_p < 1.0 else np.sort(ranked)
    return order, torch.from_numpy(values[order] / params.temperature).softmax(-1).numpy()


def draw_at(monkeypatch: pytest.MonkeyPatch, row: torch.Tensor, params: SamplingParams, at: Sequence[float],
            vocab_size: int | None = None) -> list[int | None]:  # fmt: skip
    """The tokens drawn from ``row`` when the random numbers are ``at``."""
    monkeypatch.setattr(sampling, "uniform", lambda seed, index: at[index])
    specs = [SampleSpec(params, 0, index) for index in range(len(at))]
    batch = row.repeat(len(at), 1)
    return tokens(Sampler(vocab_size or len(row)).sample(batch, specs))


def check_row(monkeypatch: pytest.MonkeyPatch, row: torch.Tensor, params: SamplingParams) -> None:
    """Every token that transformers keeps owns exactly its interval of the random number."""
    order, probs = warped(row, params)
    ends = np.cumsum(probs)
    starts = ends - probs
    sizable = np.flatnonzero(probs > 1e-5)
    picked = sizable if len(sizable) <= 24 else np.unique(np.r_[sizable[:8], sizable[-8:], sizable[::97]])
    at, expected = [0.0, LAST_BELOW_ONE], []
    for place in picked:
        for share in (0.001, 0.5, 0.999):
            at.append(float(starts[place] + share * probs[place]))
            expected.append(int(order[place]))
    first, last, *rest = draw_at(monkeypatch, row, params, at)
    assert rest == expected
    possible = order[probs > 0.0]
    assert first in possible and last in possible
    if probs[-1] > 1e-9:
        assert last == order[-1]
    if probs[0] > 1e-9:
        assert first == order[0]


def rows_of_all_kinds(vocab_size: int, generator: torch.Generator) -> list[torch.Tensor]:
    base = torch.randn(vocab_size, generator=generator)
    masked = 3 * base.clone()
    masked[torch.rand(vocab_size, generator=generator) < 0.6] = -math.inf
    masked[0] = 0.0
    huge = torch.where(base > 1.5, 3e38, -3e38)
    return [
        base * 3,
        base * 0.05,
        (base * 2).round(),
        (base * 2).bfloat16().float(),
        torch.zeros(vocab_size),
        masked,
        base * 1000 - 5000,
        huge,
        -8 * torch.arange(1, vocab_size + 1).float().log() / 5,
    ]


SHAPES: list[dict[str, Any]] = [
    {},
    {"min_p": 0.03},
    {"min_p": 1.0},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 63},
    {"top_k": 64},
    {"top_k": 700},
    {"top_k": 1024},
    {"top_k": 100_000},
    {"top_p": 0.317},
    {"top_p": 0.9173},
    {"top_p": 0.99931},
    {"top_p": 1e-9},
    {"top_k": 40, "top_p": 0.8237},
    {"top_k": 300, "top_p": 0.9531, "min_p": 0.02},
    {"top_p": 0.9173, "min_p": 0.2},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kept_sets_and_probabilities_are_those_of_transformers(
    monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(len(str(shape)))
    for vocab_size, temperature in ((1, 1.0), (7, 0.3), (64, 1.3), (65, 1.0), (513, 0.7), (2900, 1.0)):
        for row in rows_of_all_kinds(vocab_size, generator):
            if shape.get("top_p", 1.0) < 1.0 and row.min() == row.max():
                row = row + torch.arange(vocab_size) * 1e-3
            check_row(monkeypatch, row, SamplingParams(temperature=temperature, **shape))


def test_top_p_ends_with_the_token_that_reaches_it_and_keeps_the_lower_of_equal_ids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = [i / 4096 for i in range(4096)]
    for top_p, kept in ((0.5, 4), (0.5 + 1e-9, 5), (0.124, 1), (0.126, 2), (0.875, 7), (0.876, 8)):
        params = SamplingParams(temperature=1.0, top_p=top_p)
        assert set(draw_at(monkeypatch, torch.zeros(8), params, grid)) == set(range(kept))


@pytest.mark.parametrize("shape", [{}, {"top_k": 8}, {"top_p": 0.9999}])
def test_a_random_number_on_an_edge_belongs_to_the_token_above(
    monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any]
) -> None:
    row = torch.full((1024,), -math.inf)
    row[::128] = 2.0
    at = [i / 8 for i in range(8)] + [i / 8 - 2.0**-50 for i in range(1, 9)]
    ids = draw_at(monkeypatch, row, SamplingParams(temperature=1.0, **shape), at)
    assert ids == [*range(0, 1024, 128)] * 2


def test_top_k_keeps_every_tie_of_the_kth(monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch.zeros(5000)
    row[[7, 4000]] = 1.0
    ids = set(
        draw_at(monkeypatch, row, SamplingParams(temperature=1.0, top_k=2), [i / 64 for i in range(64)])
    )
    assert ids == {7, 4000}
    at = [0.0, 1.5 * math.e / (4998 + 2 * math.e), LAST_BELOW_ONE] + [i / 400 for i in range(400)]
    ids = set(draw_at(monkeypatch, row, SamplingParams(temperature=1.0, top_k=3), at))
    assert {7, 4000, 4999} <= ids and len(ids) > 300


def test_impossible_tokens_are_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch.full((600,), -math.inf)
    row[[3, 299, 300]] = torch.tensor([0.0, 1.0, -0.5])
    at = [0.0, 2.0**-53, 0.25, 0.5, 0.75, LAST_BELOW_ONE]
    for shape in SHAPES:
        drawn = draw_at(monkeypatch, row, SamplingParams(temperature=1.0, **shape), at)
        assert set(drawn) <= {3, 299, 300}


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-30, 1e-6])
def test_a_tiny_temperature_is_greedy_with_a_fair_draw_among_equals(
    monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    row = torch.tensor([1.0, 5.0, 4.9, 5.0, -1e30])
    for top_k in (0, 3):
        params = SamplingParams(temperature=temperature, top_k=top_k)
        assert draw_at(monkeypatch, row, params, [0.0, 0.499, 0.501, LAST_BELOW_ONE]) == [1, 1, 3, 3]


@pytest.mark.parametrize(
    "shape", [{}, {"top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 30, "top_p": 0.9}]
)
def test_drawn_frequencies_fit_the_distribution(shape: dict[str, Any]) -> None:
    row = torch.randn(300, generator=torch.Generator().manual_seed(5)) * 2
    params = SamplingParams(temperature=0.9, **shape)
    order, probs = warped(row, params)
    draws = 20_000
    sampler, counts = Sampler(300), Counter[int | None]()
    for start in range(0, draws, 4000):
        # Seeds differ in half of the rows, indices in the other half.
        specs = [SampleSpec(params, i if i % 2 else 0, 0 if i % 2 else i) for i in range(start, start + 4000)]
        counts.update(tokens(sampler.sample(row.repeat(4000, 1), specs)))
    assert set(counts) <= set(order.tolist())
    expected = probs * draws
    common = expected >= 5
    observed = np.array([counts[token] for token in order.tolist()])
    seen = np.r_[observed[common], observed[~common].sum()]
    due = np.r_[expected[common], expected[~common].sum()]
    seen, due = seen[due > 0], due[due > 0]
    chi2, freedom = float(((seen - due) ** 2 / due).sum()), len(due) - 1
    assert chi2 < freedom + 4.5 * math.sqrt(2 * freedom) + 5


def test_splitmix64_gives_the_published_outputs() -> None:
    # The outputs for this seed that implementations of the algorithm publish as their test.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [sampling._splitmix64(1234567, i) for i in range(4)] == published


@given(st.integers(-(1 << 63), (1 << 63) - 1), st.integers(0, 1 << 40))
def test_uniform_is_a_function_into_the_unit_interval(seed: int, index: int) -> None:
    value = uniform(seed, index)
    assert 0.0 <= value <= LAST_BELOW_ONE
    assert value == uniform(seed, index)


def test_uniform_is_flat_over_seeds_and_over_indices_and_streams_are_unrelated() -> None:
    n, cells = 20_000, 64
    by_seed = np.array([uniform(seed, 0) for seed in range(-n // 2, n // 2)])
    by_index = np.array([uniform(42, index) for index in range(n)])
    for values in (by_seed, by_index):
        counts = np.histogram(values, cells, (0, 1))[0]
        assert ((counts - n / cells) ** 2 / (n / cells)).sum() < 63 + 4.5 * math.sqrt(126)
        assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 5 / math.sqrt(n)
    neighbour = np.array([uniform(43, index) for index in range(n)])
    assert abs(np.corrcoef(by_index, neighbour)[0, 1]) < 5 / math.sqrt(n)
    assert len({*by_seed, *by_index, *neighbour}) == 3 * n - 0 if n // 2 <= 42 else 3 * n - 2


def test_seeds_repeat_and_both_seed_and_index_matter() -> None:
    sampler, row = Sampler(2000), torch.zeros(1, 2000)
    first = [sampler.sample(row.clone(), [spec(7, i, temperature=1.0)])[0].token_id for i in range(40)]
    again = [sampler.sample(row.clone(), [spec(7, i, temperature=1.0)])[0].token_id for i in range(40)]
    other = [sampler.sample(row.clone(), [spec(8, i, temperature=1.0)])[0].token_id for i in range(40)]
    assert first == again
    assert len(set(first)) > 30 and first != other


def random_spec(rng: random.Random, vocab_size: int) -> SampleSpec:
    ids = [rng.randrange(vocab_size) for _ in range(rng.choice([0, 1, 30]))]
    logprobs = rng.random() < 0.4
    return spec(
        rng.randrange(-(1 << 63), 1 << 63),
        rng.randrange(1000),
        ids,
        ids[::2] * 2,
        tuple(rng.sample(range(vocab_size), rng.choice([0, 0, 2]))),
        temperature=rng.choice([0.0, 0.0, 0.5, 1.0, 1.7]),
        top_k=rng.choice([0, 0, 1, 5, 63, 64, 500, vocab_size]),
        top_p=rng.choice([1.0, 1.0, 0.3, 0.9, 0.99]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.0, 1.3, 0.8]),
        presence_penalty=rng.choice([0.0, 0.0, 0.7]),
        frequency_penalty=rng.choice([0.0, 0.0, -0.4]),
        logit_bias={rng.randrange(vocab_size): rng.uniform(-9, 9) for _ in range(rng.choice([0, 0, 3]))},
        logprobs=logprobs,
        top_logprobs=rng.choice([0, 1, 20]) if logprobs else 0,
    )


@pytest.mark.parametrize(("vocab_size", "rounds", "rows"), [(37, 40, 9), (1501, 20, 30), (49_152, 2, 41)])
def test_a_row_gives_the_same_alone_and_in_any_batch(vocab_size: int, rounds: int, rows: int) -> None:
    rng, generator = random.Random(vocab_size), torch.Generator().manual_seed(vocab_size)
    sampler = Sampler(vocab_size)
    for _ in range(rounds):
        logits = torch.randn(rows, vocab_size + 3, generator=generator) * rng.choice([0.1, 2.0, 6.0])
        if rng.random() < 0.3:
            logits = logits.bfloat16().float()
        logits[::7, rng.randrange(vocab_size)] = math.nan
        specs = [random_spec(rng, vocab_size) for _ in range(rows)]
        together = sampler.sample(logits.clone(), specs)
        for row in rng.sample(range(rows), min(rows, 12)):
            alone = sampler.sample(logits[row : row + 1].clone(), [specs[row]])
            assert repr(alone[0]) == repr(together[row])
        order = rng.sample(range(rows), rows)
        shuffled = sampler.sample(logits[order], [specs[i] for i in order])
        assert [repr(result) for result in shuffled] == [repr(together[i]) for i in order]


def test_greedy_is_argmax_with_ties_to_the_lowest_id_and_leaves_logits_alone() -> None:
    logits = torch.randn(20, 3000, generator=torch.Generator().manual_seed(1)).mul(2).round()
    logits[3] = -7.0
    before = logits.clone()
    got = tokens(Sampler(3000).sample(logits, [spec()] * 20))
    assert got == [row.index(max(row)) for row in before.tolist()]
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.0, "top_p": 0.5}]
)
def test_padding_of_the_head_is_never_chosen_nor_looked_at(params: dict[str, Any]) -> None:
    logits = torch.zeros(30, 64)
    logits[:, 50:] = 100.0
    logits[:, 60:] = math.nan
    specs = [spec(i, logprobs=True, top_logprobs=20, **params) for i in range(30)]
    results = Sampler(50).sample(logits, specs)
    assert all(token is not None and token < 50 for token in tokens(results))
    for result in results:
        assert result.logprob is not None and result.logprob.logprob == pytest.approx(-math.log(50))
        assert [token for token, _ in result.logprob.top] == list(range(20))


def test_every_dtype_and_no_rows() -> None:
    sampler = Sampler(10)
    assert sampler.sample(torch.zeros(0, 10), []) == []
    logits = torch.arange(10.0).repeat(1, 1)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert tokens(sampler.sample(logits.to(dtype), [spec()])) == [9]
    needs_grad = logits.clone().requires_grad_()
    assert tokens(sampler.sample(needs_grad, [spec(banned=(9,))])) == [8]


def test_wrong_shapes_are_refused() -> None:
    for shape in ((2, 10), (1, 9), (10,)):
        with pytest.raises(ValueError, match="logits have shape"):
            Sampler(10).sample(torch.zeros(shape), [spec()])
    with pytest.raises(ValueError, match="vocab_size"):
        Sampler(0)


def test_order_is_penalties_then_bias_then_bans() -> None:
    logits = torch.tensor([[4.0, 3.0, -1.0, 2.0]])
    # 4 / 2 - 1 + 6 = 7 beats 3 + 3.5; were the bias divided too, 0 would have 4.
    got = spec(
        prompt=[0], output=[0], repetition_penalty=2.0, presence_penalty=1.0, logit_bias={0: 6, 1: 3.5}
    )
    assert tokens(Sampler(4).sample(logits.clone(), [got])) == [0]
    got.banned_ids = (0,)
    assert tokens(Sampler(4).sample(logits.clone(), [got])) == [1]
    banned_with_bias = spec(banned=(1,), logit_bias={1: 100.0})
    assert tokens(Sampler(4).sample(logits.clone(), [banned_with_bias])) == [0]


def test_repetition_penalty_before_sampling_is_that_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    row = torch.randn(400, generator=torch.Generator().manual_seed(3)) * 2
    past = [5, 5, 9, 300, 399, 17]
    params = SamplingParams(temperature=0.8, top_k=40, top_p=0.9, repetition_penalty=1.6)
    penalised = RepetitionPenaltyLogitsProcessor(1.6)(torch.tensor([past]), row.clone().unsqueeze(0))[0]
    order, probs = warped(penalised, params)
    at = (np.cumsum(probs) - probs / 2).tolist()
    monkeypatch.setattr(sampling, "uniform", lambda seed, index: at[index])
    specs = [SampleSpec(params, 0, index, past[:2], past[2:]) for index in range(len(at))]
    assert tokens(Sampler(400).sample(row.repeat(len(at), 1), specs)) == order.tolist()


def test_logprobs_are_those_of_the_model_itself() -> None:
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(9)) * 3
    own = logits.double().log_softmax(-1)
    specs = [
        spec(logprobs=True),
        spec(logprobs=True, top_logprobs=3, prompt=[1, 2], output=[3], repetition_penalty=1.5),
        spec(3, logprobs=True, top_logprobs=20, temperature=1.5, top_k=10, top_p=0.7),
        spec(temperature=1.0),
        spec(4, logprobs=True, top_logprobs=1, temperature=0.2, logit_bias={7: 50.0}),
        spec(prompt_logprobs=True, top_logprobs=4),
    ]
    results = Sampler(500).sample(logits.clone(), specs)
    for row, (result, asked) in enumerate(zip(results, specs, strict=True)):
        if not asked.params.logprobs:
            assert result.logprob is None
            continue
        assert result.logprob is not None and result.logprob.token_id == result.token_id
        assert result.logprob.logprob == pytest.approx(own[row, result.token_id].item(), abs=1e-7)
        best = own[row].topk(asked.params.top_logprobs)
        assert [token for token, _ in result.logprob.top] == best.indices.tolist()
        assert [value for _, value in result.logprob.top] == pytest.approx(best.values.tolist(), abs=1e-7)
    assert results[4].token_id == 7


GOOD: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.9},
    {"logprobs": True},
]


@pytest.mark.parametrize("params", GOOD, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_row_without_finite_logits_is_an_error_of_that_row_alone(
    params: dict[str, Any], value: float
) -> None:
    logits = torch.randn(5, 90, generator=torch.Generator().manual_seed(2))
    specs = [spec(i, **params) for i in range(5)]
    clean = Sampler(90).sample(logits.clone(), specs)
    bad = logits.clone()
    bad[2] = value
    bad[4, 89 if value != -math.inf else slice(None)] = value
    results = Sampler(90).sample(bad, specs)
    for row in (2, 4):
        assert results[row].token_id is None and results[row].logprob is None
        assert "not finite" in (results[row].error or "")
    for row in (0, 1, 3):
        assert results[row] == clean[row]


def test_a_row_that_its_own_request_leaves_without_a_token_is_an_error() -> None:
    logits = torch.ones(6, 4)
    specs = [
        spec(banned=(0, 1, 2, 3), logprobs=True),
        spec(banned=(0, 1, 3), temperature=1.0),
        spec(logit_bias={4: 1.0}),
        spec(output=[1], repetition_penalty=1e-45, temperature=1.0),
        spec(logit_bias={3: 100.0}),
        spec(temperature=1.0, top_k=1),
    ]
    logits[5, 2] = 3.0
    results = Sampler(4).sample(logits, specs)
    sentences = [result.error for result in results]
    assert sentences[0] == "Every token is banned for this sequence: no token can be chosen."
    assert sentences[2] == "logit_bias names token id 4; ids must be below 4."
    assert sentences[3] == "The penalties of this request make its logits overflow: no token can be chosen."
    assert results[0].logprob is None
    assert [results[row].token_id for row in (1, 4, 5)] == [2, 3, 2]


def expected_token(row: np.ndarray, item: SampleSpec) -> int | None:
    """One row by brute force in float64; None where the draw is too near an edge to call."""
    params, scores = item.params, row.astype(np.float64)
    for token in {*item.prompt_ids, *item.output_ids} if params.repetition_penalty != 1.0 else ():
        factor = params.repetition_penalty
        scores[token] = scores[token] * factor if scores[token] < 0 else scores[token] / factor
    for token, count in Counter(item.output_ids).items():
        scores[token] -= params.presence_penalty + count * params.frequency_penalty
    for token, amount in params.logit_bias.items():
        scores[token] += amount
    scores[list(item.banned_ids)] = -math.inf
    if params.greedy:
        best = np.sort(scores)[::-1]
        return int(scores.argmax()) if len(best) == 1 or best[0] - best[1] > 1e-4 else None
    order, probs = warped(torch.from_numpy(scores), params)
    ends, at = np.cumsum(probs), uniform(item.seed, item.index)
    ranked = np.sort(scores)[::-1]
    close = np.abs(np.diff(ranked[np.isfinite(ranked)])) < 1e-4
    if np.abs(ends - at).min() < 1e-4 or close.any():
        return None
    return int(order[int(np.searchsorted(ends, at, side="right"))])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(1, 12), st.sampled_from([2, 5, 30, 80]))
def test_mixed_batches_agree_with_brute_force(seed: int, rows: int, vocab_size: int) -> None:
    rng = random.Random(seed)
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * 3
    specs = [random_spec(rng, vocab_size) for _ in range(rows)]
    for item in specs:
        if len(item.banned_ids) >= vocab_size:
            item.banned_ids = ()
    before = logits.numpy().copy()
    for row, token in enumerate(tokens(Sampler(vocab_size).sample(logits, specs))):
        expected = expected_token(before[row], specs[row])
        assert expected is None or token == expected
