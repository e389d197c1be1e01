"""A model of transformers over several ranks, divided as its own ``tp_plan`` says."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mini_sglang.backend.parallel.group import Group
from mini_sglang.backend.parallel.shards import MAX_SIZE
from mini_sglang.backend.parallel.weights import GatheredWeight, SplitSummedWeight, SummedWeight
from mini_sglang.backend.transformers_models.kinds import class_of, why_per_request
from mini_sglang.backend.transformers_models.linears import local_part
from mini_sglang.backend.transformers_models.loading import read_config
from mini_sglang.backend.weights import Weight
from mini_sglang.config import Settings

# transformers' names for what becomes of a matrix and of what it multiplies to.
_OWN_ROWS = frozenset({"colwise", "packed_colwise"})
_ALL_ROWS = frozenset({"colwise_gather_output", "colwise_rep"})
_OWN_COLUMNS = frozenset({"rowwise"})
_ALL_COLUMNS = frozenset({"rowwise_split_input", "rowwise_rep"})
_HEADS = ("num_attention_heads", "num_key_value_heads", "num_global_key_value_heads")

Join = Callable[[Weight], Weight]


@dataclass(frozen=True, slots=True)
class TransformersDivision:
    """What a model's config and class tell of how it is divided; see ``choice.Divisible``.

    Attributes:
        whole: why it is not divided at all, a clause; empty where it is.
        heads: numbers that every rank has its part of.
        vocab_size: rows of the embedding.
    """

    whole: str
    heads: tuple[int, ...] = ()
    vocab_size: int = 0

    @classmethod
    def of(
        cls, path: Path, checkpoint_config: Mapping[str, Any], settings: Settings, device: torch.device
    ) -> TransformersDivision:
        """Of the model in a folder with this ``config.json``. Raises as ``read_config``."""
        if settings.engine_fast_decode:
            return cls("ENGINE_FAST_DECODE runs transformers' own generate")
        config = read_config(path, checkpoint_config, settings.trust_remote_code)
        if reason := why_per_request(config):
            return cls(f"each request of it has a cache of its own: {reason}")
        text = config.get_text_config(decoder=True)
        plan = getattr(text, "base_model_tp_plan", None) or {}
        if not plan and not getattr(class_of(config), "_tp_plan", None):
            return cls("it has no tp_plan")
        distributed = importlib.import_module("transformers.distributed").DistributedConfig
        if "tp_size" not in inspect.signature(distributed).parameters:
            return cls("transformers before 5.17 does not divide it")
        if (accelerator := torch._C._get_accelerator().type) != device.type:
            return cls(f"DEVICE is {device.type}, and transformers divides models over {accelerator} here")
        vocab_size = getattr(text, "vocab_size", None)
        if not isinstance(vocab_size, int):
            return cls("its config does not say how large its vocabulary is")
        by_heads = any(style == "colwise" and "att" in name for name, style in plan.items())
        counts = [getattr(text, name, None) for name in _HEADS] if by_heads else []
        heads = tuple(count for count in counts if isinstance(count, int))
        return cls("", heads, vocab_size)

    def obstacle(self, size: int) -> str | None:
        """Why it cannot be divided by ``size``, a clause; None where it can."""
        if size == 1:
            return None
        if self.whole:
            return self.whole
        for count in self.heads:
            if count % size:
                return f"it has {count} attention or KV heads"
        if -(-self.vocab_size // size) * (size - 1) >= self.vocab_size:
            return f"its vocabulary has {self.vocab_size} tokens"
        return None

    def sizes(self) -> list[int]:
        """Every number of ranks that the model can be divided by, 1 first."""
        return [size for size in range(1, MAX_SIZE + 1) if self.obstacle(size) is None]


def take_over(model: Any, group: Group) -> dict[nn.Module, Join]:
    """Make plain tensors of the parts of a divided model's ``nn.Linear`` and embeddings, without its hooks.

    What else its plan divides, as experts, stays transformers' own.

    Args:
        model: as ``load_model`` gives it on one of several ranks.

    Returns:
        of each such module what has its part compute what the whole does, together with the other ranks.
    """
    distributed = importlib.import_module("torch.distributed.tensor")
    plan: Mapping[str, str] = model.tp_plan or {}
    parts: dict[int, nn.Parameter] = {}
    joins: dict[nn.Module, Join] = {}
    for name, module in model.named_modules():
        whole = module._parameters.get("weight")
        if not isinstance(whole, distributed.DTensor):
            continue
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        join = _join(module, whole, style, group)
        if join is None:
            continue
        joins[module] = join
        # The plan's hook takes the place of the method.
        module.__dict__.pop("forward", None)
        # One for both where the head is the embedding.
        module.weight = parts.setdefault(id(whole), nn.Parameter(local_part(whole), requires_grad=False))
        bias = module._parameters.get("bias")
        if bias is not None:
            mine = style not in _OWN_COLUMNS | _ALL_COLUMNS or group.rank == 0
            module.bias = nn.Parameter(local_part(bias), requires_grad=False) if mine else None
    return joins


def _join(module: nn.Module, whole: Tensor, style: str | None, group: Group) -> Join | None:
    rows, columns = whole.shape[0], whole.shape[-1]
    dims = [getattr(placement, "dim", None) for placement in whole.placements]  # type: ignore[attr-defined]
    if isinstance(module, nn.Embedding):
        return (lambda part: GatheredWeight(part, group, rows)) if dims == [0] else None
    if type(module) is not nn.Linear:
        return None
    if style in _OWN_ROWS:
        return lambda part: part
    if style in _ALL_ROWS or (style is None and dims == [0]):
        return lambda part: GatheredWeight(part, group, rows, everywhere=True)
    if style in _OWN_COLUMNS:
        return lambda part: SummedWeight(part, group)
    if style in _ALL_COLUMNS:
        first = group.rank * -(-columns // group.size)
        return lambda part: SplitSummedWeight(part, group, first)
    return None
