"""Recorded steps in the place of ``Decoder.forward``: decodes by their number, a prompt by its length."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mini_sglang.backend.attention.triton import TritonAttention, TritonStep
from mini_sglang.backend.batch import Batch
from mini_sglang.backend.graphs.choosing import RecordedChoosing
from mini_sglang.backend.graphs.inputs import StepInputs, input_bytes
from mini_sglang.backend.graphs.recorder import Recorder, Replay
from mini_sglang.backend.graphs.shapes import Shape
from mini_sglang.backend.kernels.triton.choosing import take_chosen
from mini_sglang.backend.kv.pool import KVPool
from mini_sglang.backend.models.decoder import Decoder
from mini_sglang.backend.plain_rows import Table
from mini_sglang.backend.transformers_models.decoder import TransformersDecoder


@dataclass(frozen=True, slots=True)
class _Recording:
    inputs: StepInputs
    replay: Replay


class _Sizes:
    """Recordings of one kind, found by rows and positions."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._positions: dict[int, list[int]] = {}
        self._recordings: dict[tuple[int, int], _Recording] = {}

    def add(self, recording: _Recording) -> None:
        shape = recording.inputs.shape
        if shape.rows not in self._positions:
            self._rows = sorted([*self._rows, shape.rows])
        levels = self._positions.setdefault(shape.rows, [])
        self._positions[shape.rows] = sorted([*levels, shape.positions])
        self._recordings[shape.rows, shape.positions] = recording

    def find(self, rows: int, positions: int) -> _Recording | None:
        """The smallest that has room for so many."""
        size = bisect_left(self._rows, rows)
        if size == len(self._rows):
            return None
        levels = self._positions[self._rows[size]]
        level = bisect_left(levels, positions)
        if level == len(levels):
            return None
        return self._recordings[self._rows[size], levels[level]]


class GraphProgram:
    """A ``Program`` of steps over one pool.

    A recorded step is ``Decoder.forward`` over tensors that stay where they are: inputs, which ``forward``
    fills in one transfer, the pool, the table of rotations, and the output. A step of fewer rows than its
    recording is padded with rows of no sequence, whose KV goes to the pool's spare page; no other row
    depends on them, but for the order in which a matrix product of so many rows adds up. Pages that a step
    opens are not cleared: ``TritonAttention`` never reads what is not a sequence's own.

    Args:
        kv: with a spare page.
        attention: the model's, for its way to split sequences.
        shapes: what may be recorded, the largest first.
        chooses: whether the choice of tokens is recorded too.

    Attributes:
        choosing: None where it is not.
    """

    max_rows = None

    def __init__(
        self,
        decoder: Decoder | TransformersDecoder,
        kv: KVPool,
        attention: TritonAttention,
        shapes: Sequence[Shape],
        chooses: bool = False,
    ) -> None:
        assert kv.spare_pages
        self._decoder = decoder
        self._kv = kv
        self._attention = attention
        self._spare_slot = kv.num_pages * kv.page_size
        nbytes = max(input_bytes(shape, kv.page_size) for shape in shapes)
        self._buffer = torch.zeros(nbytes, dtype=torch.uint8, device=kv.data.device)
        if isinstance(decoder, Decoder):
            # A step that needs more makes it anew, elsewhere: none will.
            decoder.rotations.table(max(shape.positions for shape in shapes))
        rows = max(shape.rows if shape.decodes else 1 for shape in shapes)
        # What the model gives is seen in a first run.
        like = self._run(self._inputs(shapes[-1]))
        self._output = torch.zeros((rows, *like.shape[1:]), dtype=like.dtype, device=like.device)
        self._decodes, self._prompts = _Sizes(), _Sizes()
        self.choosing: RecordedChoosing | None = None
        if chooses:
            vocab_size = decoder.config.vocab_size
            self.choosing = RecordedChoosing(decoder.head, vocab_size, self._output, self._buffer)

    def record(self, shape: Shape, recorder: Recorder) -> None:
        """Record one of the shapes. Raises what the device raises, and ``ChoosingError``."""
        inputs, choosing = self._inputs(shape), self.choosing

        def step() -> None:
            if choosing is not None and shape.decodes:
                take_chosen(inputs.batch.token_ids, choosing.ids)
            hidden = self._run(inputs)
            self._output[: len(hidden)].copy_(hidden)

        kind = self._decodes if shape.decodes else self._prompts
        kind.add(_Recording(inputs, recorder.record(step)))
        if choosing is not None:
            choosing.record(shape.sequences, recorder)

    def takes(self, batch: Batch) -> bool:
        return self._find(batch) is not None

    def forward(self, batch: Batch) -> Tensor:
        """See ``Program``; raises LookupError for a batch that it does not take."""
        recording = self._find(batch)
        if recording is None:
            raise LookupError("no step of this kind was recorded")
        self._replay(recording, batch)
        wanted = batch.token_ids if batch.output_rows is None else batch.output_rows
        return self._output[: len(wanted)]

    def choose(self, batch: Batch, table: Table, *, later: bool) -> tuple[Tensor, Tensor] | None:
        """Run a batch whose tokens are chosen after all its output rows, as ``table`` says, and choose them.

        Args:
            later: whether other work is put in the device's queue before the results are read.

        Returns:
            see ``RecordedChoosing.replay``; None, and nothing has run, where this is not recorded.
        """
        recording, choosing = self._find(batch), self.choosing
        if recording is None or choosing is None:
            return None
        rows, count = recording.inputs.shape.sequences, len(batch.seq_lens)
        if not choosing.takes(rows) or table.shape[1] != count:
            return None
        place = choosing.place(later=later)
        self._replay(recording, batch, table, place)
        return choosing.replay(rows, count, place)

    def _replay(
        self, recording: _Recording, batch: Batch, table: Table | None = None, place: int = 0
    ) -> None:
        inputs, followed = recording.inputs, batch.followed
        found = None if followed is None or self.choosing is None else self.choosing.find(followed)
        if found is None:
            inputs.fill(batch, table, place)
            batch.fill(inputs.batch.token_ids)
        else:
            inputs.fill(batch, table, place, (batch.followed_rows(), found))
        recording.replay()

    def _find(self, batch: Batch) -> _Recording | None:
        if batch.adapters is not None:
            return None
        sequences, rows = len(batch.seq_lens), len(batch.token_ids)
        if batch.num_decodes == sequences:
            if batch.output_rows is not None:
                return None
            return self._decodes.find(rows, max(batch.seq_lens))
        if sequences > 1 or batch.output_rows is None or len(batch.output_rows) > 1:
            return None
        return self._prompts.find(rows, batch.seq_lens[0])

    def _inputs(self, shape: Shape) -> StepInputs:
        return StepInputs(shape, self._kv.page_size, self._spare_slot, self._buffer)

    @torch.inference_mode()
    def _run(self, inputs: StepInputs) -> Tensor:
        return self._decoder.forward(inputs.batch, self._kv, _StaticAttention(self._attention, inputs))


class _StaticAttention:
    """``Attention`` of one run over ``inputs``.

    What split sequences come to is kept by this run alone, so that it becomes the recording's own.
    """

    def __init__(self, model: TritonAttention, inputs: StepInputs) -> None:
        self._own = TritonAttention(model.span, model.spans)
        self._own.tables = inputs.tables

    def begin(self, batch: Batch, kv: KVPool) -> TritonStep:
        return TritonStep(self._own, batch, kv)
