"""Recorded steps in the place of ``Decoder.forward``: decodes by their number, a prompt by its length."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mini_sglang.backend.attention.triton import TritonAttention, TritonStep
from mini_sglang.backend.batch import Batch
from mini_sglang.backend.graphs.inputs import StepInputs, input_bytes
from mini_sglang.backend.graphs.recorder import Recorder, Replay
from mini_sglang.backend.graphs.shapes import Shape
from mini_sglang.backend.kv.pool import KVPool
from mini_sglang.backend.models.decoder import Decoder
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
    """

    max_rows = None

    def __init__(
        self,
        decoder: Decoder | TransformersDecoder,
        kv: KVPool,
        attention: TritonAttention,
        shapes: Sequence[Shape],
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

    def record(self, shape: Shape, recorder: Recorder) -> None:
        """Record one of the shapes. Raises what the device raises."""
        inputs = self._inputs(shape)

        def step() -> None:
            hidden = self._run(inputs)
            self._output[: len(hidden)].copy_(hidden)

        kind = self._decodes if shape.decodes else self._prompts
        kind.add(_Recording(inputs, recorder.record(step)))

    def takes(self, batch: Batch) -> bool:
        return self._find(batch) is not None

    def forward(self, batch: Batch) -> Tensor:
        """See ``Program``; raises LookupError for a batch that it does not take."""
        recording = self._find(batch)
        if recording is None:
            raise LookupError("no step of this kind was recorded")
        recording.inputs.fill(batch)
        batch.fill(recording.inputs.batch.token_ids)
        recording.replay()
        wanted = batch.token_ids if batch.output_rows is None else batch.output_rows
        return self._output[: len(wanted)]

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
