"""What a model keeps of a sequence beside our pages: made, stacked for a batch, taken apart again.

A cache is an object of the model's own making whose tensors have the sequence in their first dimension. Keys
and values of sequences of different lengths are padded on the left, where a mask hides them.
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

# By which a model's forward takes its cache, in the versions and models of transformers.
_KEYWORDS = ("cache", "past_key_values", "cache_params", "state")
# Tensors [batch, heads, positions, …] that grow with the sequence.
_GROWING = frozenset({"keys", "values"})
_LENGTH = "cumulative_length"


class NotStackableError(Exception):
    """Caches that one forward cannot take together; a clause that says why."""


class Past:
    """What one sequence, or a batch, has left behind.

    Attributes:
        cache: the model's own object; ``None`` before the first forward of a model that makes it itself.
        held: what the model keeps in its modules instead, one value per place of ``CacheKind.places``.
    """

    def __init__(self, cache: Any, held: list[Any]) -> None:
        self.cache = cache
        self.held = held


class CacheKind:
    """How a model keeps what it has read.

    Args:
        fixed_tokens: positions that a cache of fixed shape has room for; 0 lets it grow.

    Attributes:
        keyword: the argument of the model's forward; ``None`` where it has no cache at all.
        fixed: whether a cache is of fixed shape by ``fixed_tokens``.
        places: attributes of modules (RecurrentGemma's) that hold a sequence's state.
    """

    def __init__(self, model: Any, fixed_tokens: int = 0) -> None:
        names = inspect.signature(model.forward).parameters
        self.keyword = next((name for name in _KEYWORDS if name in names), None)
        self.places: list[tuple[dict[str, Any], str]] = []
        self._model = model
        self._config = model.config.get_text_config(decoder=True)
        # Others make an object of their own in their first forward.
        own = getattr(model, "_supports_default_dynamic_cache", lambda: True)
        self._common = self.keyword is not None and bool(own())
        self._fixed_tokens = fixed_tokens
        self.fixed = self._common and fixed_tokens > 0

    def fresh(self) -> Past:
        """Of no tokens."""
        return Past(self._fresh_cache(), [None] * len(self.places))

    def put(self, past: Past) -> None:
        """Give the modules what they hold of the next forward's sequences."""
        for (attributes, name), value in zip(self.places, past.held, strict=True):
            attributes[name] = value

    def after(self, past: Past, output: Any) -> Past:
        """What a forward that was given ``past`` has left behind."""
        if not self._common and self.keyword is not None:
            past.cache = output.get(self.keyword)
        past.held = [attributes[name] for attributes, name in self.places]
        return past

    def watch(self, forward: Callable[[], object]) -> None:
        """Find out, by one forward, which modules hold what they read; ``places`` names them from then on."""
        before = self._attributes()
        forward()
        self.places = [
            (vars(module), name)
            for (module, name), value in self._attributes().items()
            if isinstance(value, Tensor) and before.get((module, name)) is not value
        ]

    def _attributes(self) -> dict[tuple[Any, str], Any]:
        return {
            (module, name): value for module in self._model.modules() for name, value in vars(module).items()
        }

    def _fresh_cache(self) -> Any:
        if not self._common:
            return None
        transformers = importlib.import_module("transformers")
        if self._fixed_tokens:
            return transformers.StaticCache(config=self._config, max_cache_len=self._fixed_tokens)
        return transformers.DynamicCache(config=self._config)


def why_no_fixed_shape(model: Any) -> str:
    """What keeps a model from a cache of fixed shape, a clause; empty where nothing does."""
    if not getattr(model, "_can_compile_fullgraph", False):
        return "transformers does not say that this model can use one"
    if not CacheKind(model)._common:
        return "the model makes its own cache"
    return ""


def tensors(cache: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a cache, each with the name it has there."""
    for name, holder, key in _slots(cache):
        value = holder[key]
        if isinstance(value, Tensor):
            yield name, value


def nbytes(cache: Any) -> int:
    """Bytes that a cache holds; what two layers share counts once."""
    return sum({part.data_ptr(): part.nbytes for _, part in tensors(cache)}.values())


def grows(cache: Any) -> bool:
    """Whether a cache of some tokens has keys and values, whose number is that of the tokens."""
    return any(name in _GROWING for name, _ in tensors(cache))


def stack(caches: Sequence[Any], lengths: Sequence[int]) -> Any:
    """One cache of the batch ``caches``, each of one sequence of ``lengths`` tokens.

    Raises:
        NotStackableError: they are of a kind that this does not know.
    """
    if len(caches) == 1:
        return caches[0]
    return _merge("cache", list(caches), max(lengths))


def take(cache: Any, row: int, length: int) -> Any:
    """A copy of one sequence of a stacked cache; its own ``length`` tokens are the last ones there."""

    def pick(name: str, part: Tensor) -> Tensor:
        if part.dim() == 0:
            return part
        part = part[row : row + 1]
        if name in _GROWING:
            # A window keeps fewer than all.
            kept = part.shape[2]
            part = part[:, :, kept - min(kept, length) :]
        return part.clone()

    return _map(cache, pick, length)


def _merge(name: str, values: list[Any], longest: int) -> Any:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        raise NotStackableError(f"its {name} is of different types")
    if isinstance(first, Tensor):
        return _cat(name, values)
    if isinstance(first, dict):
        return {key: _merge(name, [value[key] for value in values], longest) for key in first}
    if isinstance(first, (list, tuple)):
        if len({len(value) for value in values}) > 1:
            raise NotStackableError(f"its {name} is of different lengths")
        merged = [_merge(name, list(parts), longest) for parts in zip(*values, strict=True)]
        return merged if isinstance(first, list) else tuple(merged)
    if name == _LENGTH:
        return longest
    if _is_plain(first):
        if any(value != first for value in values):
            raise NotStackableError(f"its {name} differs")
        return first
    return _rebuilt(first, {key: _merge(key, [vars(v)[key] for v in values], longest) for key in vars(first)})


def _map(value: Any, change: Callable[[str, Tensor], Tensor], length: int, name: str = "cache") -> Any:
    if isinstance(value, Tensor):
        return change(name, value)
    if isinstance(value, dict):
        return {key: _map(part, change, length, name) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_map(part, change, length, name) for part in value]
        return parts if isinstance(value, list) else tuple(parts)
    if name == _LENGTH:
        return length
    if _is_plain(value):
        return value
    return _rebuilt(value, {key: _map(part, change, length, key) for key, part in vars(value).items()})


def _cat(name: str, parts: list[Tensor]) -> Tensor:
    first = parts[0]
    if first.dim() == 0 and all(torch.equal(part, first) for part in parts):
        return first
    if any(part.dim() < 1 or part.shape[0] != 1 for part in parts):
        raise NotStackableError(f"its {name} has no dimension for sequences")
    if name in _GROWING:
        most = max(part.shape[2] for part in parts)
        # Zeros: what a mask hides must still be finite.
        parts = [pad(part, (0, 0, most - part.shape[2], 0)) for part in parts]
    if len({part.shape for part in parts}) > 1:
        raise NotStackableError(f"its {name} has different shapes")
    return torch.cat(parts)


def _rebuilt(like: Any, fields: dict[str, Any]) -> Any:
    made = copy.copy(like)
    vars(made).update(fields)
    return made


def _is_plain(value: Any) -> bool:
    """Whether it has no parts in which a tensor could be."""
    return (
        value is None
        or isinstance(value, (bool, int, float, str, type, torch.dtype, torch.device, torch.Size))
        or callable(value)
        or not hasattr(value, "__dict__")
    )


def _slots(value: Any, name: str = "cache") -> Iterator[tuple[str, Any, Any]]:
    """Every place within a cache where a tensor is: its name, its holder, its key there."""
    items: Any
    if isinstance(value, dict):
        items = ((name, value, key) for key in value)
    elif isinstance(value, (list, tuple)):
        items = ((name, value, index) for index in range(len(value)))
    elif isinstance(value, Tensor) or _is_plain(value):
        return
    else:
        items = ((key, vars(value), key) for key in vars(value))
    for part_name, holder, key in items:
        part = holder[key]
        if isinstance(part, Tensor):
            yield part_name, holder, key
        else:
            yield from _slots(part, part_name)
