"""``adapter_config.json`` as PEFT writes it: what is honoured, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mini_sglang.backend.loading.json_files import parse_json
from mini_sglang.backend.lora.files import CONFIG_FILE
from mini_sglang.errors import InvalidValueError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# They say nothing of what the adapter computes, or are checked on their own.
_HARMLESS = frozenset(
    (
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "bias",
        "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern",
        "alpha_pattern", "megatron_core", "eva_config", "qalora_group_size", "runtime_config",
        "ensure_weight_tying",
    )
)  # fmt: skip
# Others (PiSSA, OLoRA, CorDA, LoftQ, …) change the model's own weights, of which an adapter has no copy.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_MAX_RANK = 1 << 16
_MAX_PATTERNS = 1024
# Names with dots between, and as much of regular expressions as cannot take long on a module's name.
_PATTERN = re.compile(r"[A-Za-z0-9_.\\^$|()\[\]*+?-]{1,256}")
_MAX_REPEATS = 6


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What an adapter says of itself.

    ``targets`` is None where the names of its weights alone tell; ``layers`` None is all.
    """

    rank: int
    alpha: float
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...]
    layers: frozenset[int] | None

    @classmethod
    def read(cls, text: bytes, folder: Path) -> AdapterConfig:
        """Read the configuration ``text`` of the adapter in ``folder``.

        Raises:
            ModelLoadError: it is no JSON object.
            InvalidValueError: a field asks for what is not supported.
        """
        config = parse_json(text, f"The file {folder / CONFIG_FILE}")
        _refuse(config)
        layers = config.get("layers_to_transform")
        if isinstance(layers, int):
            layers = [layers]
        if layers is not None and not _are_numbers(layers):
            raise InvalidValueError("layers_to_transform", layers, "a layer's number or a list of them")
        targets = config.get("target_modules")
        if targets == "all-linear":
            targets = list(TARGETS)
        if targets is not None and not isinstance(targets, str):
            targets = _names("target_modules", targets)
        excluded = config.get("exclude_modules")
        if isinstance(excluded, str) and targets is not None:
            targets = "a pattern"
        return cls(
            rank=_whole("r", config.get("r", 8)),
            alpha=_number("lora_alpha", config.get("lora_alpha", 8)),
            rslora=_truth("use_rslora", config.get("use_rslora", False)),
            ranks={key: _whole("rank_pattern", value) for key, value in _pattern(config, "rank_pattern")},
            alphas={key: _number("alpha_pattern", value) for key, value in _pattern(config, "alpha_pattern")},
            targets=targets if isinstance(targets, tuple) else None,
            excluded=()
            if excluded is None or isinstance(excluded, str)
            else _names("exclude_modules", excluded),
            layers=None if layers is None else frozenset(layers),
        )

    def rank_of(self, module: str) -> int:
        """The rank at a module, named as in ``model.layers.0.self_attn.q_proj``."""
        return self.ranks.get(_matching(self.ranks, module), self.rank)

    def scale_of(self, module: str) -> float:
        """What ``B A x`` is multiplied by there."""
        alpha, rank = self.alphas.get(_matching(self.alphas, module), self.alpha), self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def adapts(self, module: str, layer: int) -> bool:
        """Whether a module of the layer is one of ``targets``, which are known."""
        assert self.targets is not None
        if self.layers is not None and layer not in self.layers:
            return False
        return _named(module, self.targets) and not _named(module, self.excluded)


def _named(module: str, names: Sequence[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _matching(patterns: Mapping[str, Any], module: str) -> str:
    """The first of ``patterns`` that fits the end of a module's name."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), "")


def _refuse(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise InvalidValueError("peft_type", config.get("peft_type"), "LORA")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise InvalidValueError("task_type", config["task_type"], "CAUSAL_LM")
    if config.get("bias", "none") != "none":
        raise InvalidValueError("bias", config["bias"], "none: adapters that train biases are not supported")
    if config.get("use_dora"):
        raise InvalidValueError("use_dora", config["use_dora"], "false: DoRA is not supported")
    if config.get("modules_to_save"):
        allowed = "empty: modules that were trained whole are not supported"
        raise InvalidValueError("modules_to_save", config["modules_to_save"], allowed)
    init = config.get("init_lora_weights", True)
    if init not in _INITS:
        allowed = "true, false, gaussian, eva or orthogonal: others change the model's own weights"
        raise InvalidValueError("init_lora_weights", init, allowed)
    if config.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
        raise InvalidValueError("layers_pattern", config["layers_pattern"], "layers, or left out")
    for name, value in config.items():
        if value and name not in _HARMLESS:
            raise InvalidValueError(name, value, "left out: it is not supported")


def _pattern(config: Mapping[str, Any], field: str) -> list[tuple[str, Any]]:
    pattern = config.get(field) or {}
    if not isinstance(pattern, Mapping) or len(pattern) > _MAX_PATTERNS:
        raise InvalidValueError(field, pattern, f"an object of at most {_MAX_PATTERNS} keys")
    for key in pattern:
        if not _is_simple(key):
            raise InvalidValueError(field, key, "made of names of modules, or simple patterns of them")
    return list(pattern.items())


def _is_simple(key: str) -> bool:
    # A group that is repeated could take for ever to find out that it does not fit.
    if not _PATTERN.fullmatch(key) or re.search(r"\)[*+?]", key) or sum(map(key.count, "*+?")) > _MAX_REPEATS:
        return False
    try:
        re.compile(f"({key})$")
    except re.error:
        return False
    return True


def _names(field: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or not value or not all(isinstance(name, str) for name in value):
        raise InvalidValueError(field, value, "a list of modules' names")
    return tuple(value)


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _whole(field: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        raise InvalidValueError(field, value, f"made of whole numbers from 1 to {_MAX_RANK}")
    return value


def _number(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e9:
        raise InvalidValueError(field, value, "made of numbers")
    return float(value)


def _truth(field: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidValueError(field, value, "true or false")
    return value
