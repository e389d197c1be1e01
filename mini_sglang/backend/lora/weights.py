"""An adapter's matrices, checked against the model and laid out by the decoder's own products."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from mini_sglang.backend.loading.safetensors_file import read_tensors
from mini_sglang.backend.lora.config import TARGETS, AdapterConfig
from mini_sglang.backend.lora.files import WEIGHTS_FILE, read_contents
from mini_sglang.backend.models.config import ModelConfig
from mini_sglang.errors import InvalidValueError, ModelLoadError, shorten
from mini_sglang.types import Adapter

PLACES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "o": ("self_attn.o_proj",),
        "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    }
)
"""The products of a layer, in their order, and the modules whose outputs lie side by side in each."""
QKV, OUT, GATE_UP, DOWN = range(4)

_TENSOR = re.compile(r"base_model\.model\.(model\.layers\.(\d{1,6})\.([a-z_.]+))\.lora_([AB])\.weight")


@dataclass(frozen=True, slots=True)
class Part:
    """What is added to the columns from ``first`` on: ``up``, float32 ``[n, rank]``, has the scale in it."""

    first: int
    up: Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """An adapter at one product: ``down`` is float32 ``[sum of the parts' ranks, in_features]``."""

    down: Tensor
    parts: tuple[Part, ...]

    def to(self, device: torch.device) -> Place:
        parts = tuple(Part(part.first, part.up.to(device)) for part in self.parts)
        return Place(self.down.to(device), parts)


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """``places[layer][place]``, in the order of ``PLACES``; None where nothing is added."""

    adapter: Adapter
    places: tuple[tuple[Place | None, ...], ...]
    rank: int

    def to(self, device: torch.device) -> AdapterWeights:
        places = tuple(
            tuple(None if place is None else place.to(device) for place in layer) for layer in self.places
        )
        return AdapterWeights(self.adapter, places, self.rank)


def read_weights(adapter: Adapter, model: ModelConfig, max_rank: int) -> AdapterWeights:
    """Read an adapter for a model.

    Raises:
        ModelLoadError: its files are damaged, incomplete, changed, or made for another model; it asks for
            what is not supported, or has a rank above ``max_rank``.
    """
    try:
        return _read(adapter, model, max_rank)
    except InvalidValueError as error:
        raise ModelLoadError(f"The adapter {adapter.name} cannot be used: {error}") from None


def _read(adapter: Adapter, model: ModelConfig, max_rank: int) -> AdapterWeights:
    folder = Path(adapter.path)
    contents = read_contents(folder)
    if contents.fingerprint != adapter.fingerprint:
        raise ModelLoadError(f"The adapter {folder} has changed while it was being loaded.")
    config = AdapterConfig.read(contents.config, folder)
    pairs = _pairs(read_tensors(folder / WEIGHTS_FILE, contents.weights), folder)
    modules = _modules(model)
    _check_modules(pairs.keys(), config, modules, folder)
    places: list[tuple[Place | None, ...]] = []
    highest = 0
    for layer in range(model.num_layers):
        found: list[Place | None] = []
        for names in PLACES.values():
            downs: list[Tensor] = []
            parts: list[Part] = []
            first = 0
            for name in (f"model.layers.{layer}.{name}" for name in names):
                n, k = modules[name][1]
                if name in pairs:
                    down, up = _checked(name, pairs[name], config.rank_of(name), (n, k), max_rank, folder)
                    highest = max(highest, len(down))
                    downs.append(down)
                    parts.append(Part(first, (up.double() * config.scale_of(name)).float().contiguous()))
                first += n
            found.append(Place(torch.cat(downs), tuple(parts)) if parts else None)
        places.append(tuple(found))
    return AdapterWeights(adapter, tuple(places), highest)


def _modules(model: ModelConfig) -> dict[str, tuple[int, tuple[int, int]]]:
    """The modules that an adapter may change: layer and ``(out_features, in_features)`` of each."""
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    shapes = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {
        f"model.layers.{layer}.{name}": (layer, shape)
        for layer in range(model.num_layers)
        for name, shape in shapes.items()
    }


def _pairs(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, dict[str, Tensor]]:
    """A and B of each module."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ModelLoadError(
                f"The adapter {folder} has the tensor {shorten(name)}; supported are lora_A and lora_B of "
                f"{', '.join(TARGETS)} in the model's layers."
            )
        pairs.setdefault(match[1], {})[match[4]] = tensor
    for module, pair in pairs.items():
        if len(pair) < 2:
            missing = "B" if "A" in pair else "A"
            raise ModelLoadError(f"The adapter {folder} has no lora_{missing} of {module}.")
    if not pairs:
        raise ModelLoadError(f"The adapter {folder} has no weights.")
    return pairs


def _check_modules(
    found: object, config: AdapterConfig, modules: Mapping[str, tuple[int, tuple[int, int]]], folder: Path
) -> None:
    names = set(found)  # type: ignore[call-overload]
    if unknown := sorted(names - modules.keys()):
        raise ModelLoadError(f"The adapter {folder} changes {unknown[0]}, which the model does not have.")
    if config.targets is None:
        wanted = {name for name in names if config.layers is None or modules[name][0] in config.layers}
    else:
        for target in config.targets:
            if not any(name == target or name.endswith(f".{target}") for name in modules):
                allowed = f"made of modules that this model has in its layers: {', '.join(TARGETS)}"
                raise InvalidValueError("target_modules", target, allowed)
        wanted = {name for name, (layer, _) in modules.items() if config.adapts(name, layer)}
    if missing := sorted(wanted - names):
        raise ModelLoadError(
            f"The adapter {folder} has no weights for {missing[0]}, which its configuration names."
        )
    if extra := sorted(names - wanted):
        raise ModelLoadError(
            f"The adapter {folder} has weights for {extra[0]}, which its configuration does not name."
        )


def _checked(
    module: str,
    pair: Mapping[str, Tensor],
    rank: int,
    shape: tuple[int, int],
    max_rank: int,
    folder: Path,
) -> tuple[Tensor, Tensor]:
    """A and B of a module in float32."""
    if rank > max_rank:
        raise InvalidValueError("r", rank, f"at most {max_rank} (MAX_LORA_RANK)")
    n, k = shape
    for letter, expected in (("A", (rank, k)), ("B", (n, rank))):
        if tuple(pair[letter].shape) != expected:
            raise ModelLoadError(
                f"lora_{letter} of {module} in the adapter {folder} has the shape "
                f"{list(pair[letter].shape)}; with this model and rank it must be {list(expected)}."
            )
        if not bool(pair[letter].isfinite().all()):
            raise ModelLoadError(
                f"lora_{letter} of {module} in the adapter {folder} has a number that is not finite."
            )
    return pair["A"].float(), pair["B"].float()
