"""Triton's draws under top_k and top_p against the sampler's, which ranks all there is."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mini_sglang.backend.kernels.triton.ranking import TritonRanking
from mini_sglang.backend.sampling import Sampler, uniform
from mini_sglang.backend.step import SampleSpec
from mini_sglang.types import SamplingParams


def table_of(x: Tensor, specs: list[SampleSpec], sampler: Sampler) -> Tensor:
    columns = sampler._columns(x.amax(-1, keepdim=True), specs)
    floors = [spec.params.min_p * sampler._unit for spec in specs]
    top_k = torch.where(columns.top_k < x.shape[1], columns.top_k, 0).double()
    rows = (columns.peak, columns.scale, columns.uniform, top_k, columns.top_p)
    return torch.cat([*rows, torch.tensor(floors).double()[:, None]], 1).t().contiguous()


def compare(x: Tensor, ways: Sequence[Mapping[str, float]], seed: int) -> int:
    """How many rows were enough: their tokens are those of the sampler."""
    vocab_size = x.shape[1]
    sampler = Sampler(vocab_size)
    specs = [
        SampleSpec(SamplingParams(max_new_tokens=1, **way), seed + row, row)  # type: ignore[arg-type]
        for row, way in enumerate(ways)
    ]
    assert all(0 < spec.params.top_k < vocab_size or spec.params.top_p < 1 for spec in specs)
    ids, enough = TritonRanking(vocab_size, **SMALL).draw(x, table_of(x.float(), specs, sampler))
    expected = [result.token_id for result in sampler.sample(x.float(), specs)]
    right = [ours == theirs for ours, theirs in zip(ids.tolist(), expected, strict=True)]
    assert all(same for same, whole in zip(right, enough.tolist(), strict=True) if whole)
    return int(enough.sum())


# The interpreter takes a second to sort a thousand numbers.
SMALL = {"number": 8, "room": 64, "peaks": 32}
WAYS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.05, 0.7, 1.0, 2.0]), "top_p": st.floats(0.01, 0.99)},
    optional={"top_k": st.integers(1, 70), "min_p": st.floats(0.0, 1.0)},
)


@settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    ways=st.lists(WAYS, min_size=1, max_size=3),
    vocab_size=st.sampled_from([5, 40, 300]),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    levels=st.sampled_from([0, 3, 40]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1 << 40),
)
def test_whatever_was_enough_is_the_samplers_token(
    ways: list[dict[str, float]], vocab_size: int, spread: float, levels: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(len(ways), vocab_size, generator=generator)
    if levels:
        # Many equal logits, of the k-th too, and some that are out of the question.
        x = (x * levels / spread).round() * spread / levels
        x[:, :: max(2, vocab_size // 7)] = -math.inf
        x[:, 1] = 0.0
    compare(x.to(dtype), ways, seed)


def test_a_peaked_row_is_enough_and_a_flat_one_is_not() -> None:
    draw = random.Random(3)
    x = torch.tensor([[draw.gauss(0, 4) for _ in range(600)] for _ in range(4)])
    narrow, few = {"temperature": 1.0, "top_p": 0.5}, {"temperature": 1.0, "top_k": 6}
    assert compare(x, [narrow, few, narrow, narrow], 7) == 4
    x[:2] = x[:2] / 1000
    assert compare(x, [narrow, few, narrow, narrow], 7) == 3
    # More equal ones than there is room for: nobody knows their order.
    assert compare(torch.zeros(2, SMALL["room"] + 9), [narrow, few], 7) == 0
    assert compare(torch.zeros(2, 60), [narrow, few], 7) == 2


def test_padding_of_the_head_is_not_looked_at() -> None:
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(1))
    wide = torch.cat((x, torch.full((3, 20), 99.0)), 1)
    sampler = Sampler(300)
    specs = [
        SampleSpec(SamplingParams(max_new_tokens=1, temperature=1.0, top_k=9), row, 0) for row in range(3)
    ]
    ids, enough = TritonRanking(300).draw(wide, table_of(x, specs, sampler))
    assert enough.all() and ids.tolist() == [result.token_id for result in sampler.sample(x, specs)]
    assert uniform(0, 0) != uniform(1, 0)


def test_a_row_that_is_not_finite_stays_inside_the_vocabulary() -> None:
    x = torch.full((2, 300), math.nan)
    x[1] = math.inf
    columns = torch.tensor([[math.nan, 1, 0.5, 5, 0.9, 0], [math.inf, 1, 0.5, 0, 0.9, 0]]).double()
    ranking = TritonRanking(300, **SMALL)
    ids, _ = ranking.draw(x, columns.t().contiguous())
    assert ((ids >= 0) & (ids < 300)).all()
    assert ranking.draw(x[:0], columns.t().contiguous()[:, :0])[0].tolist() == []


@pytest.mark.parametrize("vocab_size", [4, 1024, 32000, 151936, 262144])
def test_there_are_no_more_parts_than_are_sorted(vocab_size: int) -> None:
    ranking = TritonRanking(vocab_size)
    assert 1 <= ranking._parts <= 1024 and ranking._part * ranking._parts >= vocab_size
