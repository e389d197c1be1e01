"""The inputs of a recorded step: where they lie on the device, and how a batch gets there."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mini_sglang.backend.attention.tables import StepTables
from mini_sglang.backend.batch import Batch
from mini_sglang.backend.device import host_buffer
from mini_sglang.backend.graphs.shapes import Shape
from mini_sglang.backend.kernels.triton.choosing import COLUMNS
from mini_sglang.backend.plain_rows import Table

# Of each tensor's address: kernels are compiled for addresses that divide by so much.
_ALIGNMENT = 16
# A table's width divides by so much, so that kernels are not compiled for some widths anew.
_WIDTH = 16


class StepInputs:
    """Static tensors of one shape, side by side at the start of a buffer that all shapes share.

    ``fill`` copies a batch into them in one transfer. Rows past the batch's are padding: they belong to no
    sequence, and what they have for KV goes to ``spare_slot``.

    Attributes:
        batch: the batch of this shape over these tensors, for ``Decoder.forward`` to be recorded with; what
            it has on the host is the most that a step of this shape may have.
        tables: for ``TritonAttention``.
    """

    def __init__(self, shape: Shape, page_size: int, spare_slot: int, buffer: Tensor) -> None:
        rows, sequences = shape.rows, shape.sequences
        pages = table_width(shape, page_size)
        self.shape = shape
        self._spare_slot = spare_slot
        self._pages = pages
        self._places = list(_places(rows, sequences, pages))
        self.nbytes = self._places[-1][1]
        self._device = buffer[: self.nbytes]
        wide, narrow = torch.int64, torch.int32
        parts = [buffer[first:stop] for first, stop in self._places[1:]]
        token_ids, positions, slots, output_row = (part.view(wide) for part in parts[:4])
        starts, lens, table = (part.view(narrow) for part in parts[4:])
        self.tables = StepTables.over(table.view(sequences, pages), starts, lens)
        self.batch = Batch(
            page_size=page_size,
            order=list(range(sequences)),
            num_decodes=rows if shape.decodes else 0,
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slots,
            query_starts=list(range(rows + 1)) if shape.decodes else [0, rows],
            seq_lens=[shape.positions] * sequences,
            page_table=np.zeros((sequences, pages), dtype=np.int64),
            opened_pages=None,
            output_rows=None if shape.decodes else output_row,
            samples=[],
            specs=[],
            prompts=[],
            drafts=False,
        )
        self.fill(None)

    def fill(
        self,
        batch: Batch | None,
        choice: Table | None = None,
        place: int = 0,
        follows: tuple[list[int], list[int]] | None = None,
    ) -> None:
        """Take a batch whose tensors are on the host, and which fits the shape; ``None`` is all padding.

        Args:
            choice: how to choose the sequences' tokens, None where ``RecordedChoosing`` does not; they go to
                ``place``.
            follows: rows whose tokens are on the device, and where in what was chosen they lie.
        """
        host = host_buffer(self.nbytes, self._device.device)
        numbers = host.numpy()
        choices, *parts = [numbers[first:stop] for first, stop in self._places]
        token_ids, positions, slots, output_row = (part.view(np.int64) for part in parts[:4])
        starts, lens, table = (part.view(np.int32) for part in parts[4:])
        rows = sequences = 0
        output_row[:] = 0
        if batch is not None:
            rows, sequences = len(batch.token_ids), len(batch.seq_lens)
            token_ids[:rows] = batch.token_ids.numpy()
            positions[:rows] = batch.positions.numpy()
            slots[:rows] = batch.slot_mapping.numpy()
            starts[:sequences] = batch.query_starts[:-1]
            lens[:sequences] = batch.seq_lens
            # Past a sequence's own pages nothing is read: there may be anything.
            table.reshape(-1, self._pages)[:sequences, : batch.page_table.shape[1]] = batch.page_table
            if batch.output_rows is not None and len(batch.output_rows):
                output_row[:] = batch.output_rows.numpy()
        if choice is not None:
            wide = choices.view(np.float64).reshape(len(choice), -1)
            wide[:, :sequences] = choice
            wide[:, sequences:] = 0.0
            wide[-1] = place
        if follows is not None:
            token_ids[follows[0]] = -1 - np.array(follows[1])
        token_ids[rows:] = 0
        positions[rows:] = 0
        slots[rows:] = self._spare_slot
        starts[sequences:] = rows
        lens[sequences:] = 0
        self._device.copy_(host, non_blocking=True)


def table_width(shape: Shape, page_size: int) -> int:
    """Pages that a row of the page table has room for."""
    return _up(-(-shape.positions // page_size), _WIDTH)


def input_bytes(shape: Shape, page_size: int) -> int:
    """How large a buffer ``StepInputs`` needs for this shape."""
    places = list(_places(shape.rows, shape.sequences, table_width(shape, page_size)))
    return places[-1][1]


def _places(rows: int, sequences: int, pages: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 byte of the choice of tokens, token ids, positions, slots, the output row, starts,
    lengths, table.

    The first begins at 0 for every shape: recordings of the choice depend on the number of sequences alone.
    """
    first = 0
    wide, narrow = 8, 4
    for count, size in (
        (COLUMNS * sequences, wide), (rows, wide), (rows, wide), (rows, wide), (1, wide),
        (sequences + 1, narrow), (sequences, narrow), (sequences * pages, narrow),
    ):  # fmt: skip
        yield first, first + count * size
        first = _up(first + count * size, _ALIGNMENT)


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
