"""Recorded steps beside the decoder's own: the same bits, and no slot written but those of the rows."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mini_sglang.backend.batch import Batch, Limits
from mini_sglang.backend.graphs.program import GraphProgram
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.step import SequenceStep
from tests.backend.harness import load, step

CPU = torch.device("cpu")
CANARY = 0xA5
SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 200,
    "max_position_embeddings": 128,
}


def load_recorded(folder: Path, **settings: object) -> ModelBackend:
    """On Triton's kernels, with recordings of up to five decodes and of prompts of up to 20 tokens."""
    few: dict[str, object] = {"kernels": "triton", "max_batch_size": 5, "kv_token_budget": 1024}
    if settings.get("enable_cuda_graph", True):
        few["cuda_graph_max_seq_len"] = 20
    return load(folder, **{**few, **settings})


def program_of(backend: ModelBackend) -> GraphProgram:
    assert isinstance(backend.program, GraphProgram)
    return backend.program


def batch_of(backend: ModelBackend, steps: Sequence[SequenceStep]) -> Batch:
    limits = Limits(backend.page_size, backend.num_pages, backend.vocab_size, backend.context_length)
    return Batch.build(steps, limits, CPU)


def ids(count: int, seed: int) -> list[int]:
    return [(7 * i * i + 3 * i + 11 * seed) % 190 + 5 for i in range(count)]


@torch.inference_mode()
def plain(backend: ModelBackend, steps: Sequence[SequenceStep]) -> Tensor:
    """The step by the decoder itself."""
    hidden: Tensor = backend.decoder.forward(batch_of(backend, steps), backend.kv, backend.attention)
    return hidden.clone()


def fill(backend: ModelBackend, prompts: Sequence[Sequence[int]], tables: Sequence[array[int]]) -> None:
    """KV of the prompts; every other slot has the canary."""
    backend.kv.data.view(torch.uint8).fill_(CANARY)
    steps = [step(p, 0, t) for p, t in zip(prompts, tables, strict=True) if p]
    if not steps:
        return
    plain(backend, steps)
    own = torch.zeros(backend.kv.data.shape[1], dtype=torch.bool)
    own[torch.cat([batch_of(backend, [one]).slot_mapping for one in steps])] = True
    backend.kv.data[:, ~own] = (
        backend.kv.data.new_zeros(1)
        .view(torch.uint8)
        .new_full((backend.kv.data.element_size(),), CANARY)
        .view(backend.kv.data.dtype)
    )


def assert_same(backend: ModelBackend, steps: Sequence[SequenceStep], *, exactly: bool = True) -> None:
    """The step recorded gives what the decoder gives, from the same pool, and writes the rows' slots alone.

    The pool is left as the recorded step leaves it.
    """
    program, kv = program_of(backend), backend.kv
    batch = batch_of(backend, steps)
    assert program.takes(batch)
    before = kv.data.clone()
    expected = plain(backend, steps)
    expected_kv = kv.data[:, batch.slot_mapping].clone()
    kv.data.copy_(before)
    got = program.forward(batch)
    assert got.shape == expected.shape and bool(expected.isfinite().all())
    written = kv.data[:, batch.slot_mapping]
    if exactly:
        assert torch.equal(got, expected)
        assert torch.equal(written, expected_kv)
    else:
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(written, expected_kv)
    rest = torch.ones(kv.data.shape[1], dtype=torch.bool)
    rest[batch.slot_mapping] = False
    # What padding writes is nobody's.
    rest[kv.num_pages * kv.page_size :] = False
    assert torch.equal(kv.data[:, rest].view(torch.uint8), before[:, rest].view(torch.uint8))
