"""A step's page table, starts and lengths on the device, at addresses that stay."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mini_sglang.backend.batch import Batch
from mini_sglang.backend.device import to_device


class StepTables:
    """What kernels that read pages in place must know of a step.

    Filled by one transfer and copies on the device, outside of what a CUDA graph captures. The tensors are
    made anew, at other addresses, by a step that needs more room than there is; a graph has some ``over``
    tensors of its own.

    Attributes:
        page_table: ``[at least S, at least P]`` int32; what lies past a step's own is left from earlier ones.
        query_starts: ``[at least S + 1]`` int32.
        seq_lens: ``[at least S]`` int32.
    """

    page_table: Tensor
    query_starts: Tensor
    seq_lens: Tensor

    def __init__(self) -> None:
        self._sequences = self._pages = 0
        self._device: torch.device | None = None

    @classmethod
    def over(cls, page_table: Tensor, query_starts: Tensor, seq_lens: Tensor) -> StepTables:
        """Tables that somebody else fills."""
        tables = cls()
        tables.page_table, tables.query_starts, tables.seq_lens = page_table, query_starts, seq_lens
        return tables

    def reserve(self, sequences: int, pages: int, device: torch.device) -> None:
        """Make room for steps of so many sequences of at most so many pages."""
        if device == self._device and sequences <= self._sequences and pages <= self._pages:
            return
        self._sequences = max(sequences, self._sequences)
        self._pages = max(pages, self._pages)
        self._device = device
        self.page_table = torch.zeros((self._sequences, self._pages), dtype=torch.int32, device=device)
        self.query_starts = torch.zeros(self._sequences + 1, dtype=torch.int32, device=device)
        self.seq_lens = torch.zeros(self._sequences, dtype=torch.int32, device=device)

    def fill(self, batch: Batch, device: torch.device) -> None:
        """Take those of ``batch``."""
        sequences, pages = batch.page_table.shape
        if device != self._device or sequences > self._sequences or pages > self._pages:
            # Half as much again, so that contexts that grow by a page do not come here each time.
            self.reserve(sequences + sequences // 2, pages + pages // 2, device)
        numbers = np.empty(2 * sequences + 1 + sequences * pages, dtype=np.int32)
        numbers[: sequences + 1] = batch.query_starts
        numbers[sequences + 1 : 2 * sequences + 1] = batch.seq_lens
        numbers[2 * sequences + 1 :] = batch.page_table.ravel()
        sent = to_device(torch.from_numpy(numbers), device)
        starts, lens, table = torch.split_with_sizes(sent, (sequences + 1, sequences, sequences * pages))
        self.query_starts[: sequences + 1].copy_(starts)
        self.seq_lens[:sequences].copy_(lens)
        self.page_table[:sequences, :pages].copy_(table.view(sequences, pages))
