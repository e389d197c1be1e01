"""A model of transformers in the place of ``Decoder``."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mini_sglang.backend.attention.base import Attention
from mini_sglang.backend.attention.native import NativeAttention
from mini_sglang.backend.batch import Batch
from mini_sglang.backend.kv.layered import LayerShape
from mini_sglang.backend.kv.pool import KVPool
from mini_sglang.backend.transformers_models.attention import (
    PAGED,
    PROBE,
    STEP,
    AttentionCall,
    NotHandedError,
    PagedCalls,
    Recorder,
    Step,
    register,
)
from mini_sglang.backend.transformers_models.linears import local_part, packed_bytes
from mini_sglang.backend.transformers_models.masks import NotPagedError


@dataclass(frozen=True, slots=True)
class TransformersConfig:
    """What the backend must know of a model; see ``ModelConfig``.

    Attributes:
        context_length: tokens that a sequence may have.
    """

    family: str
    vocab_size: int
    context_length: int
    eos_ids: tuple[int, ...]


class Handover:
    """Gives a forward's ``Step`` to the attention of a model that drops keyword arguments on the way."""

    def __init__(self, model: nn.Module) -> None:
        self.step: Step | None = None
        for module in model.modules():
            if "Attention" in type(module).__name__:
                module.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, STEP: self.step}


class TransformersDecoder:
    """Runs a model's own code over the paged pool. Make one with ``probe``.

    Attributes:
        calls: the attention calls of a forward, in order.
        shapes: of the KV pool's layers.
    """

    def __init__(
        self,
        config: TransformersConfig,
        model: Any,
        calls: list[AttentionCall],
        shapes: list[LayerShape],
        handover: Handover | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.calls = calls
        self.shapes = shapes
        self._picks_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

        self._handover = handover

    @property
    def nbytes(self) -> int:
        """Bytes of the weights in this process, tied ones once."""
        plain: int = sum(local_part(parameter).nbytes for parameter in self.model.parameters())
        return plain + packed_bytes(self.model)

    def forward(self, batch: Batch, kv: KVPool, attention: Attention) -> Tensor:
        """Run the batch's tokens, writing their KV.

        Returns:
            ``[R, vocab_size]``: the logits of ``batch.output_rows``, or of all T rows. They come with the
            forward, since only the model itself knows what it does to them.
        """
        if batch.opened_pages is not None:
            kv.open_pages(batch.opened_pages)
        step = PagedCalls(
            self.calls,
            kv,
            attention.begin(batch, kv),
            batch.slot_mapping,
            isinstance(attention, NativeAttention),
        )
        if self._handover is not None:
            self._handover.step = step
        rows = batch.output_rows
        picked = {"logits_to_keep": rows} if self._picks_rows and rows is not None else {}
        logits: Tensor = self.model(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            **{STEP: step},
            **picked,
        ).logits[0]
        if rows is not None and not self._picks_rows:
            logits = logits.index_select(0, rows)
        return logits[:, : self.config.vocab_size]

    def logits(self, hidden: Tensor) -> Tensor:
        """What ``forward`` gave as float32 ``[R, vocab_size]``."""
        return self.head(hidden).float()

    def head(self, hidden: Tensor) -> Tensor:
        """What ``forward`` gave, as it is."""
        return hidden


@torch.inference_mode()
def probe(model: Any, config: TransformersConfig) -> TransformersDecoder:
    """Run a few tokens and note how the model, in eval mode, calls its attention.

    Raises:
        NotPagedError: it never does, or asks for something that our attention does not do.
    """
    _refuse_hidden_positions(model)
    register()
    handover = None
    try:
        model.set_attn_implementation(PROBE)
        try:
            recorder = _record(model, config, None)
        except NotHandedError:
            handover = Handover(model)
            recorder = _record(model, config, handover)
        model.set_attn_implementation(PAGED)
    except NotPagedError:
        raise
    except Exception as error:
        raise NotPagedError(f"its forward failed: {' '.join(str(error).split())[:200]}") from error
    if not recorder.calls:
        raise NotPagedError("it does not call the attention it is told to use")
    return TransformersDecoder(config, model, recorder.calls, recorder.shapes, handover)


def _record(model: Any, config: TransformersConfig, handover: Handover | None) -> Recorder:
    recorder = Recorder(config.context_length)
    if handover is not None:
        handover.step = recorder
    ids = probe_ids(config.vocab_size, 6).to(model.device)[None]
    positions = torch.arange(ids.shape[1], device=model.device)[None]
    model(input_ids=ids, position_ids=positions, use_cache=False, **{STEP: recorder})
    return recorder


def probe_ids(vocab_size: int, count: int) -> Tensor:
    """``[count]`` int64, scattered over the first ids that are not special in most vocabularies."""
    return torch.tensor([3 + (31 * i * i + 7 * i) % min(vocab_size - 3, 997) for i in range(count)])


def _refuse_hidden_positions(model: nn.Module) -> None:
    """An attention that asks its cache for its length, not ``position_ids``, would take all for 0."""
    for module in model.modules():
        kind = type(module)
        if "Attention" not in kind.__name__ or "get_seq_length" not in _source(kind):
            continue
        # Llama 4's does so only where this is on.
        if getattr(module, "attn_temperature_tuning", True):
            raise NotPagedError("its attention counts positions by its cache")


def _source(kind: type[nn.Module]) -> str:
    try:
        return inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return ""
