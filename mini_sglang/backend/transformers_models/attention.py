"""Our attention as transformers calls it, and the record of how a model calls it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mini_sglang.backend.attention.base import AttentionForm, StepAttention
from mini_sglang.backend.kv.layered import LayerShape
from mini_sglang.backend.kv.pool import KVPool
from mini_sglang.backend.transformers_models.masks import AskedMask, NotPagedError, asked_mask

PAGED, PROBE = "mini_sglang_paged", "mini_sglang_probe"
STEP = "mini_sglang_step"
"""The keyword by which a forward's ``Step`` reaches the attention: no global is needed."""

# What changes nothing, or what the model itself has acted on already. Anything else that is set is refused.
_HARMLESS = frozenset({"position_ids", "cache_position", "deterministic"})
_UNDERSTOOD = frozenset({"scaling", "softcap", "s_aux", "sliding_window", "is_causal", "dropout"})


class NotHandedError(NotPagedError):
    """The attention was called without the forward's ``Step``."""


class Step(Protocol):
    """What takes the calls of one forward, in their order."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: object,
        given: dict[str, Any],
    ) -> Tensor:
        """``[1, heads, T, head_dim]`` each, to ``[1, T, heads, value_dim]``."""


def register() -> None:
    """Tell transformers of our attention, under the names ``PAGED`` and ``PROBE``. May be called again."""
    transformers = importlib.import_module("transformers")
    for name in (PAGED, PROBE):
        transformers.AttentionInterface.register(name, _attend)
    # PAGED has none: transformers then makes no mask at all.
    transformers.AttentionMaskInterface.register(PROBE, asked_mask)


def stay_eager() -> None:
    """Keep torch.compile, which would follow a step's Python lists, out of our attention."""
    transformers = importlib.import_module("transformers")
    transformers.AttentionInterface.register(PAGED, torch.compiler.disable(_attend))  # type: ignore[no-untyped-call]


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: object, **given: Any
) -> tuple[Tensor, None]:
    step: Step | None = given.pop(STEP, None)
    if step is None:
        raise NotHandedError("it does not hand keyword arguments through to its attention")
    return step.attend(module, query, key, value, attention_mask, given), None


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One of the attention calls that every forward of a model makes.

    Attributes:
        layer: of the KV pool; calls that share their KV name the same.
        owner: whether it writes that layer's KV.
        window: as ``StepAttention`` takes it.
        heads: of the query.
    """

    module: nn.Module
    layer: int
    owner: bool
    window: int | None
    form: AttentionForm
    heads: int


class Recorder:
    """A ``Step`` that notes how a model calls its attention. What it gives back has the right shape, no more.

    Args:
        context_length: tokens that a sequence may have.
    """

    def __init__(self, context_length: int) -> None:
        self._context_length = context_length
        self.calls: list[AttentionCall] = []
        self.shapes: list[LayerShape] = []
        # The tensors live as long as their addresses are compared.
        self._kv: list[tuple[Tensor, Tensor]] = []

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: object,
        given: dict[str, Any],
    ) -> Tensor:
        if query.dim() != 4 or key.shape[:3] != value.shape[:3] or query.shape[::2] != (1, key.shape[2]):
            raise NotPagedError("its queries, keys and values are not of one row of tokens")
        heads, kv_heads = query.shape[1], key.shape[1]
        if heads % kv_heads or query.shape[3] != key.shape[3]:
            raise NotPagedError(f"its {heads} query heads do not fit {kv_heads} KV heads")
        layer = next((i for i, kv in enumerate(self._kv) if _same(kv, (key, value))), len(self._kv))
        owner = layer == len(self._kv)
        if owner:
            self._kv.append((key, value))
            self.shapes.append(LayerShape(kv_heads, key.shape[3], value.shape[3]))
        window = _window(module, mask, given, self._context_length)
        self.calls.append(AttentionCall(module, layer, owner, window, _form(given, heads), heads))
        return value.repeat_interleave(heads // kv_heads, 1).transpose(1, 2).contiguous()


class PagedCalls:
    """A ``Step`` over the paged pool: one forward of the calls that ``Recorder`` noted.

    Args:
        slots: ``[T]`` int64, where the step's rows are kept.
        float_queries: for an attention that takes contiguous float32 queries alone.
    """

    def __init__(
        self,
        calls: list[AttentionCall],
        kv: KVPool,
        attention: StepAttention,
        slots: Tensor,
        float_queries: bool,
    ) -> None:
        self._calls = iter(calls)
        self._kv = kv
        self._attention = attention
        self._slots = slots
        self._float_queries = float_queries

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: object,
        given: dict[str, Any],
    ) -> Tensor:
        call = next(self._calls, None)
        if call is None or call.module is not module:
            raise RuntimeError("the model's forward took another way through its layers than at load")
        query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
        if call.owner:
            rows = torch.cat((key.flatten(1), value.flatten(1)), 1)
            self._kv.write(call.layer, self._slots, rows)
        dtype = query.dtype
        if self._float_queries:
            query = query.float().contiguous()
        out = self._attention(call.layer, call.window, query, key, value, call.form)
        return out.to(dtype).view(1, len(out), call.heads, -1)


def _same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(x.data_ptr() == y.data_ptr() and x.shape == y.shape for x, y in zip(a, b, strict=True))


def _window(module: nn.Module, mask: object, given: Mapping[str, Any], context_length: int) -> int | None:
    if given.get("is_causal", True) is False:
        raise NotPagedError("its attention is not causal")
    if isinstance(mask, AskedMask):
        return mask.window(context_length)
    if mask is not None:
        raise NotPagedError("it makes a mask of its own")
    if not getattr(module, "is_causal", True):
        raise NotPagedError("its attention is not causal")
    window: int | None = given.get("sliding_window")
    return window


def _form(given: Mapping[str, Any], heads: int) -> AttentionForm:
    for name, value in given.items():
        if name not in _HARMLESS | _UNDERSTOOD and value is not None and value is not False:
            raise NotPagedError(f"it gives its attention {name}, which is not supported")
    if given.get("dropout"):
        raise NotPagedError("its attention has dropout")
    scale, softcap, sinks = (given.get(name) for name in ("scaling", "softcap", "s_aux"))
    for name, value in (("scaling", scale), ("softcap", softcap)):
        if value is not None and not isinstance(value, (int, float)):
            raise NotPagedError(f"the {name} of its attention is not a number")
    if sinks is not None and (not isinstance(sinks, nn.Parameter) or sinks.shape != (heads,)):
        raise NotPagedError("the sinks of its attention are not a number per head")
    return AttentionForm(scale, softcap or None, None if sinks is None else sinks.data)
