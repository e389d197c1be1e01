"""Paged attention against a brute-force twin that knows nothing of pages."""

from __future__ import annotations

import math
from array import array
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mini_sglang.backend.attention import paged
from mini_sglang.backend.attention.base import PLAIN, Attention, AttentionForm
from mini_sglang.backend.attention.paged import PagedAttention
from mini_sglang.backend.batch import Batch, Limits
from mini_sglang.backend.kv.layered import LayeredKVPool, LayerShape
from mini_sglang.backend.kv.pool import KVPool
from mini_sglang.backend.step import SequenceStep

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 16
VALUE_DIM = 10
NUM_SLOTS = 512
CPU = torch.device("cpu")

DECODES = [(1, 0), (1, 20), (1, 6), (1, 31), (1, 32)]
CHUNKS = [(12, 0), (5, 16), (33, 7), (2, 40), (21, 0)]


def twin(
    query: Tensor, key: Tensor, value: Tensor, start: int, window: int | None, form: AttentionForm = PLAIN
) -> Tensor:
    """Attention of one sequence in float64, one row and one head at a time.

    ``query`` is ``[t, heads, head_dim]`` from position ``start`` on, ``key`` and ``value`` are
    ``[L, kv_heads, …]``.
    """
    scale = 1 / math.sqrt(HEAD_DIM) if form.scale is None else form.scale
    out = torch.empty((*query.shape[:2], value.shape[2]), dtype=torch.float64)
    for row in range(len(query)):
        position = start + row
        first = 0 if window is None else max(0, position - window + 1)
        for head in range(HEADS):
            shared = head * KV_HEADS // HEADS
            keys = key[first : position + 1, shared].double()
            scores = keys @ query[row, head].double() * scale
            if form.softcap is not None:
                scores = form.softcap * (scores / form.softcap).tanh()
            weights = scores.exp()
            total = weights.sum() if form.sinks is None else weights.sum() + form.sinks[head].double().exp()
            out[row, head] = weights / total @ value[first : position + 1, shared].double()
    return out.flatten(1)


class Scene:
    """Sequences of (new tokens, start) with random KV in a pool that is NaN everywhere else.

    ``layered`` is a pool whose layers differ, with values that are narrower than keys.
    """

    def __init__(
        self, sequences: list[tuple[int, int]], page_size: int, shuffle: bool, layered: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(len(sequences) + page_size)
        self.value_dim = VALUE_DIM if layered else HEAD_DIM
        where = {
            "num_pages": NUM_SLOTS // page_size,
            "page_size": page_size,
            "dtype": torch.float32,
            "device": CPU,
        }
        if layered:
            shapes = [LayerShape(1, 4, 4), LayerShape(KV_HEADS, HEAD_DIM, VALUE_DIM), LayerShape(3, 32, 32)]
            self.kv: KVPool = LayeredKVPool(shapes, **where)
        else:
            self.kv = KVPool(num_layers=2, kv_heads=KV_HEADS, head_dim=HEAD_DIM, **where)
        self.kv.data.fill_(torch.nan)
        order = list(range(self.kv.num_pages))
        if shuffle:
            order = torch.randperm(self.kv.num_pages, generator=generator).tolist()
        self.steps: list[SequenceStep] = []
        self.queries: list[Tensor] = []
        self.rows: list[Tensor] = []
        for count, start in sequences:
            pages = -(-(start + count) // page_size)
            self.steps.append(SequenceStep([0] * count, start, array("i", order[:pages])))
            del order[:pages]
            self.queries.append(torch.randn(count, HEADS, HEAD_DIM, generator=generator))
            width = KV_HEADS * (HEAD_DIM + self.value_dim)
            self.rows.append(torch.randn(start + count, width, generator=generator))
        self.limits = Limits(page_size, self.kv.num_pages, vocab_size=1, context_length=NUM_SLOTS)

    def batch(self) -> Batch:
        """Write the positions before each start, as earlier steps would have, and plan the step."""
        before = [i for i, step in enumerate(self.steps) if step.start]
        if before:
            past = [SequenceStep([0] * s.start, 0, s.pages) for s in (self.steps[i] for i in before)]
            self._write(
                Batch.build(past, self.limits, CPU), [self.rows[i][: self.steps[i].start] for i in before]
            )
        batch = Batch.build(self.steps, self.limits, CPU)
        self._write(batch, [rows[step.start :] for rows, step in zip(self.rows, self.steps, strict=True)])
        return batch

    def _write(self, batch: Batch, rows: list[Tensor]) -> None:
        if batch.opened_pages is not None:
            self.kv.open_pages(batch.opened_pages)
        self.kv.write(1, batch.slot_mapping, torch.cat([rows[i] for i in batch.order]))

    def attend(self, window: int | None, attention: Attention, form: AttentionForm = PLAIN) -> list[Tensor]:
        """What each sequence gets, ``[t, heads * head_dim]``, in the order they were given."""
        batch = self.batch()
        new = [self.rows[i][self.steps[i].start :] for i in batch.order]
        key, value = self.kv.keys_values(1, torch.cat(new))
        query = torch.cat([self.queries[i] for i in batch.order])
        out = attention.begin(batch, self.kv)(1, window, query, key, value, form)
        parts = dict(zip(batch.order, out.split([len(rows) for rows in new]), strict=True))
        return [parts[i] for i in range(len(parts))]

    def check(self, window: int | None, attention: Attention, form: AttentionForm = PLAIN) -> None:
        for i, out in enumerate(self.attend(window, attention, form)):
            keys, values = self.kv.keys_values(1, self.rows[i])
            expected = twin(self.queries[i], keys, values, self.steps[i].start, window, form)
            torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)


SCENES = {
    "decodes": DECODES,
    "one decode": DECODES[1:2],
    "even decodes": DECODES[3:],
    "chunks": CHUNKS,
    "one fresh chunk": CHUNKS[:1],
    "one extending chunk": CHUNKS[2:3],
    "mixed": [*CHUNKS[:2], *DECODES, *CHUNKS[2:]],
}


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("sequences", SCENES.values(), ids=SCENES)
def test_equals_the_twin(sequences: list[tuple[int, int]], page_size: int, window: int | None) -> None:
    for shuffle in (False, True):
        Scene(sequences, page_size, shuffle).check(window, PagedAttention())


@pytest.mark.parametrize("window", [None, 7])
def test_a_chunk_longer_than_a_block_of_queries(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    monkeypatch.setattr(paged, "_QUERY_BLOCK", 8)
    Scene([(8, 3), (33, 7), (30, 0), (1, 9)], 4, True).check(window, PagedAttention())


@pytest.mark.parametrize("window", [None, 7, 20])
def test_masks_begin_where_cuda_reads_vectors(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    places: list[int] = []

    def attend(query: Tensor, key: Tensor, value: Tensor, *, attn_mask: Tensor | None, **more: Any) -> Tensor:
        if attn_mask is not None:
            places.append(attn_mask.data_ptr())
            assert attn_mask.stride(-2) in (0, attn_mask.shape[-1]) or attn_mask.shape[-2] == 1
        return scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **more)

    monkeypatch.setattr(paged, "_QUERY_BLOCK", 8)
    monkeypatch.setattr(paged, "scaled_dot_product_attention", attend)
    Scene([(33, 7), (30, 13), (17, 40), (1, 9), (1, 30)], 4, True).check(window, PagedAttention())
    assert places and not any(place % 16 for place in places)


FORMS = {
    "scale": AttentionForm(scale=0.7),
    "softcap": AttentionForm(softcap=1.5),
    "sinks": AttentionForm(sinks=torch.linspace(-2, 3, HEADS)),
    "all": AttentionForm(0.4, 2.0, torch.linspace(3, -2, HEADS)),
}


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_scale_softcap_and_sinks(form: AttentionForm, layered: bool, window: int | None) -> None:
    for sequences in (SCENES["mixed"], SCENES["one decode"], SCENES["one fresh chunk"]):
        for shuffle in (False, True):
            Scene(sequences, 4, shuffle, layered).check(window, PagedAttention(), form)


@pytest.mark.parametrize("window", [None, 7])
def test_blocks_of_queries_with_sinks(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    monkeypatch.setattr(paged, "_QUERY_BLOCK", 8)
    Scene([(8, 3), (33, 7), (30, 0), (1, 9)], 4, True).check(window, PagedAttention(), FORMS["all"])


@pytest.mark.parametrize("page_size", [1, 16])
def test_layers_of_different_shapes(page_size: int) -> None:
    for shuffle in (False, True):
        Scene(SCENES["mixed"], page_size, shuffle, layered=True).check(7, PagedAttention())


def test_a_sequence_of_nan_leaves_its_neighbours_alone() -> None:
    scene = Scene(DECODES, 16, True)
    scene.rows[1].fill_(torch.nan)
    scene.queries[1].fill_(torch.nan)
    batch = scene.batch()
    key, value = scene.kv.keys_values(1, torch.cat([rows[-1:] for rows in scene.rows]))
    out = PagedAttention().begin(batch, scene.kv)(1, None, torch.cat(scene.queries), key, value)
    assert out.isnan().any(1).tolist() == [False, True, False, False, False]
