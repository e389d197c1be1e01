"""Penalties, bias and bans on the logits themselves, against transformers and by hand."""

from __future__ import annotations

import math
import random
from array import array

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from mini_sglang.backend.penalties import adjust_logits, adjusts
from mini_sglang.backend.step import SampleSpec
from mini_sglang.types import SamplingParams


def test_repetition_penalty_equals_transformers_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    rng = random.Random(0)
    for penalty in (1.1, 0.7, 2.0, 10.0):
        logits = torch.randn(4, 257, generator=generator) * 5
        logits[:, 3] = -math.inf
        logits[:, 4] = 0.0
        past = [[rng.randrange(257) for _ in range(60)] + [3, 4] for _ in range(4)]
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(past), logits.clone())
        params = SamplingParams(repetition_penalty=penalty)
        specs = [SampleSpec(params, 0, 0, ids[:20], array("i", ids[20:])) for ids in past]
        assert adjust_logits(logits, specs) == {}
        assert torch.equal(logits, expected)


def test_presence_and_frequency_count_the_output_alone() -> None:
    logits = torch.zeros(2, 6)
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    specs = [SampleSpec(params, 0, 0, [0, 0, 5], [1, 1, 1, 4]), SampleSpec(params, 0, 0, [2], [])]
    adjust_logits(logits, specs)
    assert logits.tolist() == [[0.0, -1.25, 0.0, 0.0, -0.75, 0.0], [0.0] * 6]


def test_past_ids_outside_the_vocabulary_are_passed_over() -> None:
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=1.0)
    logits = torch.full((1, 4), 4.0)
    adjust_logits(logits, [SampleSpec(params, 0, 0, [9, 3], [7, 2], (11,))])
    assert logits.tolist() == [[4.0, 4.0, 1.0, 2.0]]


def test_rows_that_ask_for_nothing_stay_bit_identical_beside_rows_that_do() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    plain = SampleSpec(SamplingParams(temperature=1.0), 0, 0, [1, 2], [3])
    refused = SampleSpec(
        SamplingParams(logit_bias={50: 1.0, 2: 5.0}, presence_penalty=1.0), 0, 0, [], [3], (1,)
    )
    busy = SampleSpec(SamplingParams(logit_bias={2: -1.5}), 0, 0, banned_ids=(4, 4))
    assert [adjusts(item) for item in (plain, refused, busy)] == [False, True, True]
    assert adjust_logits(logits, [plain, refused, busy]) == {
        1: "logit_bias names token id 50; ids must be below 50."
    }
    assert torch.equal(logits[:2], before[:2])
    before[2, 2] -= 1.5
    before[2, 4] = -math.inf
    assert torch.equal(logits, before)
