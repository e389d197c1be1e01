"""``LOAD_FORMAT=dummy``: a model of a real config whose weights are random, for measuring without any."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mini_sglang.backend.loading.json_files import read_json
from mini_sglang.backend.loading.parts import Part
from mini_sglang.backend.models.config import SUPPORTED_FAMILIES, ModelConfig, is_native
from mini_sglang.backend.models.loader import expected_tensors
from mini_sglang.backend.weights import DenseWeight, Weight
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError, ModelLoadError, shorten

logger = logging.getLogger(__name__)

RANDOM = "random: the answers mean nothing"
"""What ``describe`` says of such weights."""

# Of the logits, whose head has rows of this length: the most probable token gets a few percent.
_LOGIT_STD = 2.4


class DummyCheckpoint:
    """A ``Checkpoint`` that makes its numbers, on ``device``, from nothing but the parameters' names.

    They are the same each time and for any part, on one kind of device. Each layer's input and output stay
    near 1, so that the logits are finite in every type.

    Args:
        folder: with ``config.json``, perhaps ``generation_config.json``; no other file is looked at.

    Raises:
        ModelLoadError: the config is missing or damaged.
        InvalidValueError: it is of a model that is not native.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.path = folder
        self.config: dict[str, Any] = read_json(folder / "config.json")
        self.generation_config: dict[str, Any] = {}
        if (folder / "generation_config.json").is_file():
            self.generation_config = read_json(folder / "generation_config.json")
        why = None
        if not is_native(self.config):
            why = f"only models of the families {', '.join(SUPPORTED_FAMILIES)} can have random weights"
        elif self.config.get("quantization_config") or self.config.get("compression_config"):
            why = "its config asks for quantised weights; QUANTIZATION makes some of a plain config"
        if why is not None:
            raise InvalidValueError("LOAD_FORMAT", "dummy", f"auto for this model: {why}")
        self._device = device
        self._shapes = expected_tensors(ModelConfig.from_hf(self.config, self.generation_config))
        self.quantized = False
        self.nbytes = sum(math.prod(shape) for shape in self._shapes.values()) * torch.bfloat16.itemsize

    def names(self) -> Collection[str]:
        return self._shapes.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        try:
            return self._shapes[name]
        except KeyError:
            raise ModelLoadError(f"The model {self.path} has no tensor {shorten(name)}.") from None

    def weight(self, name: str, dtype: torch.dtype, part: Part | None = None) -> Weight:
        return DenseWeight(self.tensor(name, dtype, part))

    def tensor(self, name: str, dtype: torch.dtype | None, part: Part | None = None) -> Tensor:
        shape = self.shape(name)
        generator = torch.Generator(self._device)
        generator.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little"))
        mean, std = 0.0, 0.1
        if len(shape) > 1:
            std = (1.0 if ".layers." in name else _LOGIT_STD) / math.sqrt(shape[1])
        elif "norm" in name:
            mean = 1.0
        whole = torch.empty(shape, dtype=dtype or torch.bfloat16, device=self._device)
        whole.normal_(mean, std, generator=generator)
        if part is not None:
            # A copy, which does not keep the rest.
            whole = whole.narrow(part.dim, part.start, part.stop - part.start).clone()
        # As it would be stored, whoever asks wants it on the CPU, to quantise it.
        return whole.cpu() if dtype is None else whole

    def in_blocks(self, name: str) -> bool:
        self.shape(name)
        return False

    def block_size(self, name: str) -> int:
        self.shape(name)
        return 1

    def release(self) -> None:
        """There is no file."""

    def close(self) -> None:
        """There is no file."""


def open_dummy(path: Path, settings: Settings, device: torch.device) -> DummyCheckpoint:
    """The checkpoint of LOAD_FORMAT=dummy. Raises as ``DummyCheckpoint``, and for what needs real files."""
    if not path.is_dir():
        allowed = "auto for a GGUF file: random weights need a folder with a config.json"
        raise InvalidValueError("LOAD_FORMAT", "dummy", allowed)
    if settings.engine_fast_decode:
        allowed = "0 with LOAD_FORMAT=dummy: transformers loads real weights only"
        raise InvalidValueError("ENGINE_FAST_DECODE", True, allowed)
    logger.warning("random weights for the config of %s: the answers mean nothing", path.name)
    return DummyCheckpoint(path, device)
