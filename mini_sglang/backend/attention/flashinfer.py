"""Paged attention by the ``flashinfer`` package (Ye et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mini_sglang.backend.attention.base import PLAIN, AttentionForm
from mini_sglang.backend.attention.packages import pages_of, why_no_package
from mini_sglang.backend.batch import Batch
from mini_sglang.backend.device import to_device
from mini_sglang.backend.kv.pool import KVPool

if TYPE_CHECKING:
    from mini_sglang.backend.attention.choice import Heads

_WORKSPACE_BYTES = 128 << 20
_HEAD_DIMS = (64, 128, 256)
# Whether decodes, heads, KV heads, head_dim, window, scale, soft cap.
_Key = tuple[bool, int, int, int, int | None, float | None, float | None]


class FlashInferAttention:
    """``Attention`` on CUDA in fp16 and bf16, over pages of any size.

    The package plans each step on the host, once for every kind of layer: not for CUDA graphs as it is used
    here.
    """

    name = "flashinfer"

    def __init__(self) -> None:
        self._workspace: Tensor | None = None
        self._wrappers: dict[_Key, Any] = {}

    @staticmethod
    def why_not(layers: Sequence[Heads], dtype: torch.dtype, device: torch.device) -> str | None:
        """What keeps it from this model; None if nothing does."""
        why = why_no_package("flashinfer", layers, dtype, device)
        if why is None and any(layer.key_dim not in _HEAD_DIMS for layer in layers):
            return "flashinfer takes head sizes of 64, 128 and 256"
        return why

    def begin(self, batch: Batch, kv: KVPool) -> FlashInferStep:
        return FlashInferStep(self, batch, kv)

    def wrapper(self, which: _Key, device: torch.device) -> Any:
        """The package's object for one kind of layer, which keeps the plan of a step."""
        import flashinfer

        if self._workspace is None:
            # They take turns on one stream.
            self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        wrapper = self._wrappers.get(which)
        if wrapper is None:
            decodes, heads, kv_heads = which[:3]
            if decodes:
                # The kernel for decodes by tensor cores takes any number of heads to a KV head.
                wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                    self._workspace, "NHD", use_tensor_cores=heads > kv_heads
                )
            else:
                wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
            self._wrappers[which] = wrapper
        return wrapper


class FlashInferStep:
    """One step of ``FlashInferAttention``; see ``StepAttention``."""

    def __init__(self, attention: FlashInferAttention, batch: Batch, kv: KVPool) -> None:
        self._attention = attention
        self._kv = kv
        self._decodes, self._sequences = batch.num_decodes, len(batch.seq_lens)
        lengths = np.asarray(batch.seq_lens, dtype=np.int64)
        self._counts = -(-lengths // batch.page_size)
        self._last = lengths - (self._counts - 1) * batch.page_size
        self._starts = np.asarray(batch.query_starts, dtype=np.int64)
        own = np.arange(batch.page_table.shape[1]) < self._counts[:, None]
        self._pages = to_device(torch.from_numpy(batch.page_table[own].astype(np.int32)), kv.data.device)
        self._planned: dict[_Key, Any] = {}

    def __call__(
        self,
        layer: int,
        window: int | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        form: AttentionForm = PLAIN,
    ) -> Tensor:
        kv, decodes = self._kv, self._decodes
        keys, values = pages_of(kv, layer)
        parts: list[Tensor] = []
        if decodes:
            wrapper = self._plan(True, window, query, key.shape[1], form)
            parts.append(wrapper.run(query[:decodes], (keys, values)))
        if decodes < self._sequences:
            wrapper = self._plan(False, window, query, key.shape[1], form)
            parts.append(wrapper.run(query[decodes:], (keys, values)))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)

    def _plan(
        self, decodes: bool, window: int | None, query: Tensor, kv_heads: int, form: AttentionForm
    ) -> Any:
        heads, head_dim = query.shape[1:]
        which = decodes, heads, kv_heads, head_dim, window, form.scale, form.softcap
        wrapper = self._planned.get(which)
        if wrapper is not None:
            return wrapper
        wrapper = self._attention.wrapper(which, query.device)
        first, stop = (0, self._decodes) if decodes else (self._decodes, self._sequences)
        # On the host, where the package would copy them otherwise, and wait for it.
        ends = np.concatenate(([0], self._counts.cumsum()))
        table = _host(ends[first : stop + 1] - ends[first]), self._pages[ends[first] : ends[stop]]
        where = (*table, _host(self._last[first:stop]), heads, kv_heads, head_dim, self._kv.page_size)
        how = {
            "window_left": -1 if window is None else window - 1,
            "logits_soft_cap": form.softcap,
            "sm_scale": form.scale,
            "q_data_type": query.dtype,
            "kv_data_type": self._kv.dtype,
        }
        if decodes:
            wrapper.plan(*where, **how)
        else:
            rows = self._starts[first : stop + 1] - self._starts[first]
            wrapper.plan(_host(rows), *where, causal=True, **how)
        self._planned[which] = wrapper
        return wrapper


def _host(values: np.ndarray[Any, np.dtype[np.int64]]) -> Tensor:
    return torch.from_numpy(values.astype(np.int32))
