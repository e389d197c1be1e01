"""Sequences of random KV in a pool that is NaN everywhere else, for a kernel and its twin in torch."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from mini_sglang.backend.attention.base import PLAIN, Attention, AttentionForm
from mini_sglang.backend.attention.paged import PagedAttention
from mini_sglang.backend.batch import Batch, Limits
from mini_sglang.backend.kv.pool import KVPool
from mini_sglang.backend.step import SequenceStep

CPU = torch.device("cpu")
LAYER = 1
# Of the values' size, which are around 1: a unit or two in the last place of the weights, and of the result.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Scene:
    """One step of sequences given as (new tokens, tokens before).

    Args:
        shape: heads, KV heads, head_dim.
    """

    def __init__(
        self,
        sequences: Sequence[tuple[int, int]],
        shape: tuple[int, int, int],
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        heads, kv_heads, head_dim = shape
        counts = [-(-(new + before) // page_size) for new, before in sequences]
        num_pages = sum(counts) + 3
        self.kv = KVPool(
            num_layers=2,
            num_pages=num_pages,
            page_size=page_size,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=CPU,
        )
        self.kv.data.fill_(torch.nan)
        order = torch.randperm(num_pages, generator=self.generator).tolist()
        steps = []
        for count, (new, before) in zip(counts, sequences, strict=True):
            pages, order = order[:count], order[count:]
            steps.append(SequenceStep([0] * new, before, array("i", pages)))
            slots = [pages[p // page_size] * page_size + p % page_size for p in range(new + before)]
            self.kv.write(
                LAYER, torch.tensor(slots), self._random(len(slots), 2 * kv_heads * head_dim, dtype)
            )
        limits = Limits(page_size, num_pages, vocab_size=1, context_length=1 << 20)
        self.batch = Batch.build(steps, limits, CPU)
        # Queries lie among keys and values, as in a fused product.
        wide = self._random(self.batch.query_starts[-1], (heads + 2 * kv_heads) * head_dim, dtype)
        wide = wide.view(-1, heads + 2 * kv_heads, head_dim)
        own = self.kv.layer(LAYER)[self.batch.slot_mapping]
        wide[:, heads : heads + kv_heads], wide[:, heads + kv_heads :] = own.unbind(1)
        self.query, self.key, self.value = wide.split((heads, kv_heads, kv_heads), 1)

    def _random(self, rows: int, width: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(rows, width, generator=self.generator).to(dtype)

    def attend(self, attention: Attention, window: int | None = None, form: AttentionForm = PLAIN) -> Tensor:
        """``[T, heads * head_dim]``."""
        step = attention.begin(self.batch, self.kv)
        return step(LAYER, window, self.query, self.key, self.value, form)

    def expected(self, window: int | None = None, form: AttentionForm = PLAIN) -> Tensor:
        """By the twin in float32, from the same numbers, with zeros where the pool has NaN."""
        kv = KVPool(
            num_layers=2,
            num_pages=self.kv.num_pages,
            page_size=self.kv.page_size,
            kv_heads=self.kv.kv_heads,
            head_dim=self.kv.head_dim,
            dtype=torch.float32,
            device=CPU,
        )
        kv.data.copy_(self.kv.data.float().nan_to_num(0.0))
        step = PagedAttention().begin(self.batch, kv)
        return step(LAYER, window, self.query.float(), self.key.float(), self.value.float(), form)

    def check(self, attention: Attention, window: int | None = None, form: AttentionForm = PLAIN) -> None:
        """The attention gives what the twin gives, and leaves the pool as it is."""
        before = self.kv.data.clone().view(torch.uint8)
        out = self.attend(attention, window, form)
        assert out.dtype == self.query.dtype
        tolerance = TOLERANCE[out.dtype]
        torch.testing.assert_close(out.float(), self.expected(window, form), rtol=tolerance, atol=tolerance)
        assert torch.equal(before, self.kv.data.view(torch.uint8))
