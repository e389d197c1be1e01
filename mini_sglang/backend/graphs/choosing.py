"""The choice of tokens after a recorded step, recorded too: the head's product and Triton's kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mini_sglang.backend.batch import Followed
from mini_sglang.backend.closeness import HIDDEN_TOLERANCE, relative_error
from mini_sglang.backend.device_sampling import DeviceSampler
from mini_sglang.backend.graphs.recorder import Recorder, Replay
from mini_sglang.backend.kernels.triton.choosing import COLUMNS, TritonChooser
from mini_sglang.backend.plain_rows import PlainRows
from mini_sglang.backend.step import SampleSpec
from mini_sglang.types import SamplingParams

# Of a step that is waited for at once; of steps that are launched, in turn: what one chose lies there until
# the next one, which reads it, is in the queue, and is not written to by that.
_AT_ONCE, _IN_TURN = 0, (1, 2)
# Recordings of up to so many rows are looked at by the proof. Until then their logits are kept, which costs
# memory: recordings share that of tensors which are gone.
_PROVED = 16


class ChoosingError(RuntimeError):
    """Steps can be recorded, but not their choice of tokens."""


class RecordedChoosing:
    """One recording for each number of rows, of a step's hidden states to ids.

    Each reads the hidden states from ``hidden`` and the table of its rows from the beginning of the steps'
    inputs, so a choice is one launch, and nothing is sent for it.

    Args:
        head: hidden states to logits of any type; ``vocab_size`` of their columns count.
        hidden: ``[R, ...]``, the steps' output.
        inputs: uint8, the steps' inputs, of which the first are the table.

    Attributes:
        ids: ``[3 * R]`` int64, what was chosen.
    """

    def __init__(
        self, head: Callable[[Tensor], Tensor], vocab_size: int, hidden: Tensor, inputs: Tensor
    ) -> None:
        self._head = head
        self._vocab_size = vocab_size
        self._chooser = TritonChooser(vocab_size)
        self._hidden = hidden
        self._inputs = inputs
        self._rows = len(hidden)
        self._turn = 0
        self.ids = torch.zeros(3 * self._rows, dtype=torch.int64, device=hidden.device)
        self._numbers = torch.zeros((self._rows, 2), dtype=torch.float64, device=hidden.device)
        self._replays: dict[int, Replay] = {}
        self._logits: dict[int, Tensor] = {}

    def record(self, rows: int, recorder: Recorder) -> None:
        """Record the choice after steps of so many sequences, once.

        Raises:
            ChoosingError: the device raised something else.
        """
        if rows in self._replays:
            return
        table, numbers = self._table(rows), self._numbers[:rows]
        # There are the inputs of other shapes, and to where it says is written.
        table.zero_()

        @torch.inference_mode()
        def choose() -> None:
            logits = self._head(self._hidden[:rows])
            self._chooser.choose(logits, table, self.ids, numbers)
            if rows <= _PROVED:
                self._logits[rows] = logits

        try:
            self._replays[rows] = recorder.record(choose)
        except Exception as error:
            raise ChoosingError(" ".join(str(error).split())[:200]) from error

    def place(self, *, later: bool) -> int:
        """Where in ``ids`` those of the next step are to lie, for ``later`` until two more are launched."""
        if not later:
            return _AT_ONCE
        self._turn = 1 - self._turn
        return _IN_TURN[self._turn] * self._rows

    def takes(self, rows: int) -> bool:
        return rows in self._replays

    def replay(self, rows: int, count: int, place: int) -> tuple[Tensor, Tensor]:
        """Choose for a step of ``count`` sequences, recorded with ``rows``.

        Returns:
            ids ``[count]`` int64, and ``[count, 2]`` float64 of ids and largest logits, which the next step
            overwrites.
        """
        self._replays[rows]()
        return self.ids[place : place + count], self._numbers[:count]

    def find(self, followed: Followed) -> list[int] | None:
        """Where in ``ids`` the tokens lie; None where they are somewhere else."""
        first = followed.ids.data_ptr() - self.ids.data_ptr()
        if not 0 <= first < self.ids.nbytes:
            return None
        first //= self.ids.element_size()
        rows = range(len(followed.places)) if followed.rows is None else followed.rows
        return [first + row for row in rows]

    @torch.inference_mode()
    def prove(self) -> None:
        """Compare choices with those of the sampler in torch, for the logits of some hidden states. Once.

        Raises:
            ChoosingError: they are others.
        """
        rows = PlainRows(self._vocab_size)
        twin = DeviceSampler(self._vocab_size)
        before = self._hidden.clone()
        try:
            for count, recorded in self._logits.items():
                self._hidden.copy_(_scattered(self._hidden))
                specs = [
                    SampleSpec(SamplingParams(temperature=(0.6, 0.0, 1.0, 0.1)[row % 4]), row, count)
                    for row in range(count)
                ]
                table = rows.table(specs)
                assert table is not None
                self._table(count).copy_(torch.from_numpy(table))
                ids, numbers = self.replay(count, count, _AT_ONCE)
                logits = recorded.float()
                expected = self._head(self._hidden[:count]).float()
                off = relative_error(logits, expected)
                if not off <= HIDDEN_TOLERANCE[self._hidden.dtype]:
                    raise ChoosingError(f"the logits are off by {off:.2g} of their size")
                wanted = [result.token_id for result in twin.sample(logits, specs)]
                if not ids.tolist() == numbers[:, 0].tolist() == wanted:
                    raise ChoosingError("the tokens are others than torch's operators choose")
        finally:
            self._hidden.copy_(before)
            self._logits.clear()

    def _table(self, rows: int) -> Tensor:
        return self._inputs[: COLUMNS * 8 * rows].view(torch.float64).view(COLUMNS, rows)


def _scattered(like: Tensor) -> Tensor:
    """Numbers around 1 that repeat nowhere, the same every time."""
    count = torch.arange(like.numel(), device=like.device, dtype=torch.float64).view(like.shape)
    return ((count * 0.7548776662466927) % 1 * 4 - 2).to(like.dtype)
