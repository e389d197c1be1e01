"""Logprobs against torch's log_softmax in float64."""

from __future__ import annotations

import math

import pytest
import torch

from mini_sglang.backend.sampling import Sampler, prompt_logprobs


@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 1), (3, 5), (700, 1000), (25, 49_152)])
def test_prompt_logprobs_equal_log_softmax(rows: int, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows + 1, vocab_size, generator=generator) * 4
    before = logits.clone()
    targets = torch.randint(vocab_size, (rows,), generator=generator).tolist()
    entries = prompt_logprobs(logits, targets, 5)
    own = before.double().log_softmax(-1)
    assert torch.equal(logits, before)
    assert [entry.token_id for entry in entries] == targets
    expected = own[torch.arange(rows), torch.tensor(targets)].tolist()
    assert [entry.logprob for entry in entries] == pytest.approx(expected, abs=1e-7)
    best = own[:rows].topk(min(5, vocab_size))
    assert [[token for token, _ in entry.top] for entry in entries] == best.indices.tolist()
    for entry, values in zip(entries, best.values.tolist(), strict=True):
        assert [value for _, value in entry.top] == pytest.approx(values, abs=1e-7)


def test_equal_alternatives_come_by_ascending_id_and_impossible_ones_not_at_all() -> None:
    logits = torch.tensor(
        [[1.0, 2.0, 1.0, 2.0, 1.0, 0.0], [0.0, -math.inf, 0.0, -math.inf, -math.inf, -math.inf]]
    )
    entries = prompt_logprobs(logits, [5, 1], 4)
    assert [token for token, _ in entries[0].top] == [1, 3, 0, 2]
    assert entries[1].logprob == -math.inf
    assert dict(entries[1].top) == pytest.approx({0: -math.log(2), 2: -math.log(2)})


def test_a_certain_token_has_logprob_zero_even_far_from_zero() -> None:
    logits = torch.full((1, 9), -3e38)
    logits[0, 4] = 3e38
    assert prompt_logprobs(logits, [4], 1)[0].logprob == 0.0
    shifted = torch.tensor([[1e7, 1e7 + 1, 1e7 + 2]])
    expected = shifted.double().log_softmax(-1)[0, 1].item()
    assert prompt_logprobs(shifted, [1], 0)[0].logprob == pytest.approx(expected, abs=1e-9)


def test_rows_that_are_not_finite_have_nan_and_touch_no_other() -> None:
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(4))
    clean = prompt_logprobs(logits, [1, 2, 3, 4], 3)
    for bad in (math.nan, math.inf):
        spoiled = logits.clone()
        spoiled[1, 7] = bad
        spoiled[2] = -math.inf
        entries = prompt_logprobs(spoiled, [1, 2, 3, 4], 3)
        assert [math.isnan(entry.logprob) for entry in entries] == [False, True, True, False]
        assert entries[1].top == entries[2].top == ()
        assert (entries[0], entries[3]) == (clean[0], clean[3])


def test_the_sampler_leaves_the_padding_of_the_head_out() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(6))
    logits[:, 33:] = 50.0
    sampler = Sampler(33)
    assert sampler.prompt_logprobs(logits, [3, 32], 2) == prompt_logprobs(logits[:, :33], [3, 32], 2)
    assert sampler.prompt_logprobs(logits, [], 2) == []
