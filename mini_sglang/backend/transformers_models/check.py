"""The proof at load that a model's forward over pages gives what the model gives by itself."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from mini_sglang.backend.attention.base import Attention
from mini_sglang.backend.batch import Batch, Limits
from mini_sglang.backend.closeness import relative_error
from mini_sglang.backend.kv.layered import kv_pool
from mini_sglang.backend.step import SequenceStep
from mini_sglang.backend.transformers_models.attention import PAGED
from mini_sglang.backend.transformers_models.decoder import TransformersDecoder, probe_ids
from mini_sglang.backend.transformers_models.masks import NotPagedError

_PAGE, _PAGES = 4, 8
# Two sequences, in steps of (sequence, tokens): chunks beside chunks, decodes beside chunks, both together.
_LENGTHS = (14, 11)
_STEPS = (((0, 6), (1, 3)), ((0, 1), (1, 4)), ((0, 1), (1, 1)), ((1, 2), (0, 6)), ((1, 1),))
# Of ``error_of_logits``. What ignores a position, a neighbour or a mask is off by about 1.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}


@torch.inference_mode()
def self_check(decoder: TransformersDecoder, attention: Attention, dtype: torch.dtype) -> None:
    """Compare a few steps of two sequences over pages with the model's own eager attention.

    Raises:
        NotPagedError: a forward fails, or the logits differ by more than the dtype explains.
    """
    device = next(decoder.model.parameters()).device
    ids = torch.split_with_sizes(probe_ids(decoder.config.vocab_size, sum(_LENGTHS)), _LENGTHS)
    expected = _own_logits(decoder, [part.to(device) for part in ids])
    # Small pages, where the attention takes them: then every sequence has several.
    page = max(_PAGE, getattr(attention, "page_multiple", 1))
    kv = kv_pool(decoder.shapes, num_pages=_PAGES, page_size=page, dtype=dtype, device=device)
    kv.data.fill_(torch.nan)
    limits = Limits(page, _PAGES, decoder.config.vocab_size, max(_LENGTHS))
    pages = (array("i", (6, 1, 4, 3)), array("i", (5, 0, 7)))
    done = [0, 0]
    for taken in _STEPS:
        steps = []
        for sequence, count in taken:
            tokens = ids[sequence][done[sequence] : done[sequence] + count].tolist()
            # As targets of prompt logprobs, so that every row gives its logits.
            steps.append(SequenceStep(tokens, done[sequence], pages[sequence], prompt_targets=[0] * count))
        batch = Batch.build(steps, limits, device)
        try:
            logits = decoder.logits(decoder.forward(batch, kv, attention))
        except Exception as error:
            raise NotPagedError(f"its forward failed: {' '.join(str(error).split())[:200]}") from error
        for place, first, stop in batch.prompts:
            sequence, count = taken[place]
            rows = slice(done[sequence], done[sequence] + count)
            _compare(logits[first:stop], expected[sequence][rows], _TOLERANCE[dtype])
        for sequence, count in taken:
            done[sequence] += count


def _own_logits(decoder: TransformersDecoder, ids: list[Tensor]) -> list[Tensor]:
    model, vocab_size = decoder.model, decoder.config.vocab_size
    try:
        model.set_attn_implementation("eager")
        return [
            model(input_ids=part[None], use_cache=False).logits[0, :, :vocab_size].float() for part in ids
        ]
    except Exception as error:
        raise NotPagedError(f"its own attention failed: {' '.join(str(error).split())[:200]}") from error
    finally:
        model.set_attn_implementation(PAGED)


def error_of_logits(ours: Tensor, own: Tensor) -> float:
    """How far logits ``[..., V]`` are off, in units of their spread; NaN where something is not a number."""
    return relative_error(ours, own, own - own.mean(-1, keepdim=True))


def _compare(ours: Tensor, own: Tensor, tolerance: float) -> None:
    off = error_of_logits(ours, own)
    if not off <= tolerance:
        raise NotPagedError(f"its logits over pages differ from its own by {off:.2g} of their size")
