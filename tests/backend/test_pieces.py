"""A step cut into pieces: the same tokens at the same places, and the same results."""

from __future__ import annotations

from array import array

from hypothesis import given
from hypothesis import strategies as st

from mini_sglang.backend.pieces import SHORT, cut, join
from mini_sglang.backend.step import SampleSpec, SequenceResult, SequenceStep
from mini_sglang.types import SamplingParams, TokenLogprob

SAMPLE = SampleSpec(SamplingParams(), 0, 0)


@st.composite
def steps(draw: st.DrawFn) -> list[SequenceStep]:
    counts = draw(st.lists(st.one_of(st.integers(1, 5), st.integers(1, 400)), min_size=1, max_size=12))
    made = []
    for number, count in enumerate(counts):
        wanted = draw(st.sampled_from([0, count, count - 1]))
        sample = draw(st.sampled_from([None, SAMPLE]))
        ids = [1000 * number + i for i in range(count)]
        start = draw(st.integers(0, 9))
        made.append(SequenceStep(ids, start, array("i", [number]), sample, ids[:wanted], 2))
    return made


@given(steps(), st.integers(SHORT, 300))
def test_pieces_are_the_steps(whole: list[SequenceStep], max_rows: int) -> None:
    pieces = cut(whole, max_rows)
    results = []
    for piece in pieces:
        assert 0 < sum(len(part.token_ids) for _, part in piece) <= max_rows
        assert len({place for place, _ in piece}) == len(piece)
        # A stand-in for the backend: a token is the last id, a logprob names its target.
        results.append(
            [
                SequenceResult(
                    part.token_ids[-1] if part.sample else None,
                    prompt_logprobs=[TokenLogprob(target, part.prompt_top) for target in part.prompt_targets],
                )
                for _, part in piece
            ]
        )
    parts = [item for piece in pieces for item in piece]
    for place, step in enumerate(whole):
        mine = [part for at, part in parts if at == place]
        assert [i for part in mine for i in part.token_ids] == list(step.token_ids)
        assert [part.start - mine[0].start for part in mine] == [
            sum(len(part.token_ids) for part in mine[:i]) for i in range(len(mine))
        ]
        assert mine[0].start == step.start and all(part.pages is step.pages for part in mine)
        assert all(len(part.prompt_targets) <= len(part.token_ids) for part in mine)
        assert len(mine) == 1 or len(step.token_ids) > SHORT
    for step, result in zip(whole, join(len(whole), pieces, results), strict=True):
        assert result.token_id == (step.token_ids[-1] if step.sample else None)
        assert [one.token_id for one in result.prompt_logprobs] == list(step.prompt_targets)
