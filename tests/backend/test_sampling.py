"""The sampler: greedy, order of operations, independence of the batch, logprobs, rows in error."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from mini_sglang.backend import sampling
from mini_sglang.backend.sampling import Sampler, uniform
from mini_sglang.backend.step import SampleSpec
from mini_sglang.types import SamplingParams
from tests.backend.sampling_oracle import spec, tokens, warped


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
        spec(output=[1], repetition_penalty=0.01, temperature=1.0),
        spec(logit_bias={3: 100.0}),
        spec(temperature=1.0, top_k=1),
    ]
    logits[3, 1] = 3e38
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
