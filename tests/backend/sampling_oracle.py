"""What the sampler's tests share: short specs, and transformers' warpers as the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mini_sglang.backend import sampling
from mini_sglang.backend.sampling import Sampler
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
