"""What runs a step that was written down beforehand, in the place of ``Decoder.forward``."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mini_sglang.backend.batch import Batch


class Program(Protocol):
    """Steps written down once and replayed."""

    @property
    def max_rows(self) -> int | None:
        """Steps of more rows are cut into pieces before they are asked about; ``None`` leaves them whole."""

    def takes(self, batch: Batch) -> bool:
        """Whether ``forward`` runs this batch; the decoder runs the others."""

    def forward(self, batch: Batch) -> Tensor:
        """``Decoder.forward`` for a batch whose tensors are on the host.

        Returns:
            ``[R, hidden_size]``, which the next call overwrites.
        """
