"""A step flattened, against every row written out by hand."""

from __future__ import annotations

import random
from array import array

import pytest
import torch

from mini_sglang.backend.batch import Batch, Limits
from mini_sglang.backend.step import SampleSpec, SequenceStep
from mini_sglang.types import SamplingParams

CPU = torch.device("cpu")
PARAMS = SamplingParams()


def random_steps(draw: random.Random, limits: Limits) -> list[SequenceStep]:
    """Decodes and chunks on pages of their own; some choose a token and some want prompt logprobs."""
    free = draw.sample(range(limits.num_pages), limits.num_pages)
    steps = []
    for index in range(draw.randint(1, 12)):
        count = draw.choice((1, 1, draw.randint(2, 20)))
        start = draw.randint(0, limits.context_length - count)
        needed = -(-(start + count) // limits.page_size) + draw.randint(0, 2)
        pages, free = array("i", free[:needed]), free[needed:]
        ids = [draw.randrange(limits.vocab_size) for _ in range(count)]
        targets = [7] * draw.choice((0, count, count - 1))
        sample = SampleSpec(PARAMS, index, 0) if draw.random() < 0.7 else None
        steps.append(SequenceStep(ids, start, pages, sample, targets))
    return steps


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("seed", range(40))
def test_every_row_is_where_it_belongs(seed: int, page_size: int) -> None:
    limits = Limits(page_size, 2400 // page_size, 50, 100)
    steps = random_steps(random.Random(seed), limits)
    batch = Batch.build(steps, limits, CPU)

    decodes = [i for i, step in enumerate(steps) if len(step.token_ids) == 1]
    order = decodes + [i for i in range(len(steps)) if i not in decodes]
    assert (batch.order, batch.num_decodes, batch.page_size) == (order, len(decodes), page_size)
    assert batch.specs == [steps[i].sample for i in order if steps[i].sample is not None]
    rows: list[tuple[int, int, int]] = []
    wanted: list[int] = []
    opened: set[int] = set()
    samples: list[tuple[int, int]] = []
    prompts: list[tuple[int, int, int]] = []
    for index, place in enumerate(order):
        step, first = steps[place], len(rows)
        assert batch.query_starts[index] == first
        for position, token_id in enumerate(step.token_ids, step.start):
            page, offset = step.pages[position // page_size], position % page_size
            rows.append((token_id, position, page * page_size + offset))
            opened |= {page} if offset == 0 else set()
            opened -= {page} if offset == page_size - 1 else set()
        count = len(step.prompt_targets)
        if count:
            prompts.append((place, len(wanted), len(wanted) + count))
            wanted += range(first, first + count)
        if step.sample is not None:
            wanted += [len(rows) - 1] if count < len(step.token_ids) else []
            samples.append((place, len(wanted) - 1))
        end = step.start + len(step.token_ids)
        assert batch.seq_lens[index] == end
        own = step.pages[: -(-end // page_size)].tolist()
        assert batch.page_table[index].tolist() == own + own[:1] * (batch.page_table.shape[1] - len(own))
    assert batch.query_starts[-1] == len(rows)
    got = zip(batch.token_ids.tolist(), batch.positions.tolist(), batch.slot_mapping.tolist(), strict=True)
    assert list(got) == rows
    assert (batch.samples, batch.prompts) == (samples, prompts)
    outputs = range(len(rows)) if batch.output_rows is None else batch.output_rows.tolist()
    assert list(outputs) == wanted
    assert set([] if batch.opened_pages is None else batch.opened_pages.tolist()) == opened
