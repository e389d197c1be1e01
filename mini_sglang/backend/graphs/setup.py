"""Whether and which steps of a model are recorded, what that takes, and the proof that it changes nothing."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Sequence

import torch

from mini_sglang.backend.attention.base import Attention
from mini_sglang.backend.attention.triton import TritonAttention
from mini_sglang.backend.batch import Batch, Limits
from mini_sglang.backend.closeness import HIDDEN_TOLERANCE, relative_error
from mini_sglang.backend.graphs.choosing import ChoosingError
from mini_sglang.backend.graphs.program import GraphProgram
from mini_sglang.backend.graphs.recorder import Recorder
from mini_sglang.backend.graphs.shapes import Shape, shapes
from mini_sglang.backend.kv.pool import KVPool
from mini_sglang.backend.loading.progress import progress_bar
from mini_sglang.backend.models.decoder import Decoder
from mini_sglang.backend.step import SampleSpec, SequenceStep
from mini_sglang.backend.transformers_models.decoder import TransformersDecoder
from mini_sglang.backend.weights import QuantizedWeight, StackedWeight, Weight
from mini_sglang.config import Settings
from mini_sglang.types import SamplingParams

logger = logging.getLogger(__name__)

# Recordings made to see what one takes; the others are reckoned from them.
_TRIALS = 8


def why_not_recorded(decoder: Decoder | TransformersDecoder, ranks: int) -> str | None:
    """What keeps the steps of a model from being recorded, a clause; None if nothing does."""
    if ranks > 1:
        return f"TENSOR_PARALLEL_SIZE is {ranks}, and the ranks meet in every layer"
    layers = decoder.layers if isinstance(decoder, Decoder) else []
    if any(_in_blocks(weight) for layer in layers for weight in layer.matrices):
        return "PyTorch's operators take thousands of kernels to multiply quantised blocks"
    return None


def _in_blocks(weight: Weight) -> bool:
    if isinstance(weight, StackedWeight):
        return any(_in_blocks(part) for part in weight.parts)
    return isinstance(weight, QuantizedWeight)


class Graphs:
    """The recorded steps of one model, from the wish to the proof.

    ``measure`` is for a small pool, before the real one takes its part of the memory; ``record`` for the
    real one, whose address is recorded.

    Attributes:
        off: why nothing is recorded, "off" where nobody wants it; None where something is.
    """

    def __init__(
        self,
        settings: Settings,
        recorder: Recorder | None,
        attention: Attention,
        context_length: int,
        obstacle: str | None = None,
        chooses: bool = False,
    ) -> None:
        """
        Args:
            recorder: None where nothing is to be recorded.
            obstacle: what keeps this model's steps from being recorded, a clause.
            chooses: whether Triton's kernels may choose tokens, which is recorded then.
        """
        self._chooses = chooses
        self._settings = settings
        self._recorder = recorder
        self._context_length = context_length
        self._count = 0
        self.off: str | None = None
        self._attention: TritonAttention | None = None
        if recorder is None:
            self.off = "off"
            return
        if isinstance(attention, TritonAttention):
            self._attention = attention
        else:
            obstacle = obstacle or "they need Triton's attention, and this one plans each step on the host"
        if obstacle is not None:
            self._turn_off(obstacle)

    @property
    def on(self) -> bool:
        return self.off is None

    @property
    def spare_pages(self) -> int:
        """Of the pool: padding is written there."""
        return 1 if self.on else 0

    def measure(self, decoder: Decoder | TransformersDecoder, kv: KVPool) -> int:
        """Bytes of the device's memory that recording will take, reckoned from a few recordings over ``kv``.

        They are dropped again.
        """
        recorder = self._recorder
        if not self.on or recorder is None:
            return 0
        wanted = self._shapes(decoder, self._context_length)
        largest, others = _trials(wanted)
        before = recorder.used_bytes()
        program: GraphProgram | None = None
        again = False
        try:
            program = self._program(decoder, kv, wanted)
            # For these the shared memory grows.
            for shape in largest:
                program.record(shape, recorder)
            with_memory = recorder.used_bytes()
            for shape in others:
                program.record(shape, recorder)
            each = max(0, recorder.used_bytes() - with_memory) // max(1, len(others))
        except ChoosingError as error:
            self._choose_unrecorded(error)
            again = True
        except Exception as error:
            self._turn_off(_failure(error))
            return 0
        finally:
            program = None
            recorder.release()
        if again:
            return self.measure(decoder, kv)
        taken = max(0, with_memory - before) + each * (len(wanted) - len(largest))
        logger.info("%d CUDA graphs will take about %.1f MiB", len(wanted), taken / 2**20)
        return taken

    def record(self, decoder: Decoder | TransformersDecoder, kv: KVPool) -> GraphProgram | None:
        """Record all steps over ``kv``, whose pages must be free, and prove the result."""
        recorder = self._recorder
        if not self.on or recorder is None or self._attention is None:
            return None
        positions = min(self._context_length, kv.num_pages * kv.page_size)
        wanted = self._shapes(decoder, positions)
        program: GraphProgram | None = None
        try:
            program = self._program(decoder, kv, wanted)
            with progress_bar(len(wanted), "Recording CUDA graphs", unit="graph") as bar:
                for shape in wanted:
                    program.record(shape, recorder)
                    bar.update(1)
            limits = Limits(kv.page_size, kv.num_pages, decoder.config.vocab_size, positions)
            prove(program, decoder, kv, self._attention, limits)
        except ChoosingError as error:
            self._choose_unrecorded(error)
            program = None
            recorder.release()
            return self.record(decoder, kv)
        except Exception as error:
            self._turn_off(_failure(error))
            program = None
            recorder.release()
            return None
        self._count = len(wanted)
        if program.choosing is not None:
            try:
                program.choosing.prove()
            except Exception as error:
                # The steps are as they should be.
                self._choose_unrecorded(error)
                program.choosing = None
        return program

    def describe(self) -> str:
        """What became of it, for a reader."""
        if self.off is not None:
            return self.off
        kinds = []
        if self._decodes:
            kinds.append(f"decodes of up to {self._decodes}")
        if self._prompt(self._context_length) > 1:
            kinds.append(f"prompts of up to {self._prompt(self._context_length)} tokens")
        chosen = ", tokens chosen" if self._chooses else ""
        return f"{self._count} for {' and '.join(kinds)}{chosen}"

    @property
    def _decodes(self) -> int:
        return self._settings.max_batch_size if self._settings.enable_decode_cuda_graph else 0

    def _prompt(self, positions: int) -> int:
        settings = self._settings
        if not settings.enable_cuda_graph:
            return 0
        longest = min(settings.cuda_graph_max_seq_len, positions)
        return min(longest, settings.prefill_chunk_size) if settings.chunked_prefill else longest

    def _shapes(self, decoder: Decoder | TransformersDecoder, positions: int) -> list[Shape]:
        assert self._attention is not None
        attention = self._attention
        if isinstance(decoder, Decoder):
            kv_heads = decoder.config.num_kv_heads
        else:
            kv_heads = max(shape.kv_heads for shape in decoder.shapes)
        return shapes(
            self._decodes, self._prompt(positions), positions, attention.span, attention.spans, kv_heads
        )

    def _program(
        self, decoder: Decoder | TransformersDecoder, kv: KVPool, wanted: Sequence[Shape]
    ) -> GraphProgram:
        assert self._attention is not None
        if isinstance(decoder, Decoder) and _in_blocks(decoder.lm_head):
            self._chooses = False
        return GraphProgram(decoder, kv, self._attention, wanted, self._chooses)

    def _choose_unrecorded(self, error: Exception) -> None:
        logger.warning("CUDA graphs end before the choice of tokens: %s", error)
        self._chooses = False

    def _turn_off(self, why: str) -> None:
        logger.warning("CUDA graphs are off: %s", why)
        self.off = f"off: {why}"


@torch.inference_mode()
def prove(
    program: GraphProgram,
    decoder: Decoder | TransformersDecoder,
    kv: KVPool,
    attention: TritonAttention,
    limits: Limits,
) -> None:
    """Compare recorded steps with the decoder's own: prompts, then decodes after them, alone and together.

    Writes to the pool.

    Raises:
        RuntimeError: the results differ by more than rounding.
    """
    taken = 0
    decodes: list[SequenceStep] = []
    for count in (2, 7, 40):
        needed = -(-(count + 1) // kv.page_size)
        if count >= limits.context_length or taken + needed > kv.num_pages:
            break
        pages = array("i", range(taken, taken + needed))
        taken += needed
        ids = [(7 * i + count) % limits.vocab_size for i in range(count)]
        sample = SampleSpec(SamplingParams(), 0, 0)
        _compare([SequenceStep(ids, 0, pages, sample)], program, decoder, kv, attention, limits)
        decodes.append(SequenceStep(ids[:1], count, pages, sample))
    for steps in (decodes[-1:], decodes):
        if steps:
            _compare(steps, program, decoder, kv, attention, limits)


def _compare(
    steps: Sequence[SequenceStep],
    program: GraphProgram,
    decoder: Decoder | TransformersDecoder,
    kv: KVPool,
    attention: TritonAttention,
    limits: Limits,
) -> None:
    batch = Batch.build(steps, limits, torch.device("cpu"))
    expected = decoder.forward(batch.to(kv.data.device), kv, attention).float()
    if not program.takes(batch):
        return
    got = program.forward(batch).float()
    # A product of padded rows may add up in another order.
    off = relative_error(got, expected)
    if not off <= HIDDEN_TOLERANCE[kv.dtype]:
        raise RuntimeError(f"what a recorded step gives is off by {off:.2g} of its size")


def _trials(wanted: Sequence[Shape]) -> tuple[list[Shape], list[Shape]]:
    """The largest of each kind, and some of the others."""
    kinds = {shape.decodes for shape in wanted}
    largest = [next(shape for shape in wanted if shape.decodes == kind) for kind in sorted(kinds)]
    others = [shape for shape in wanted if shape not in largest]
    step = max(1, len(others) // _TRIALS)
    return largest, others[::step][:_TRIALS]


def _failure(error: Exception) -> str:
    return f"recording failed: {' '.join(str(error).split())[:200]}"
