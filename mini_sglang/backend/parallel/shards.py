"""How a native model is divided: which heads, columns and vocabulary rows belong to which rank.

As in Megatron-LM (Shoeybi et al. 2019): q, k, v, gate and up by rows, o and down by columns, so that a
layer needs two sums; the embedding and the head by vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mini_sglang.backend.loading.checkpoint import Checkpoint
from mini_sglang.backend.loading.ggml_types import GGMLType
from mini_sglang.backend.loading.parts import Part
from mini_sglang.backend.models.config import ModelConfig

MAX_SIZE = 64
# Columns of down that stay together where they can: what the compiled kernels take at a time.
_UNIT = 16


@dataclass(frozen=True, slots=True)
class Division:
    """A model that can be divided.

    Attributes:
        o_block: columns of ``o_proj`` that share a block, in the layer where they are most; 1 for numbers.
        down_block: the same of ``down_proj``.
        remedy: which settings leave no blocks; empty where there are none to leave.
    """

    config: ModelConfig
    o_block: int = 1
    down_block: int = 1
    remedy: str = ""

    @classmethod
    def of(cls, config: ModelConfig, checkpoint: Checkpoint, formats: Mapping[str, GGMLType]) -> Division:
        """Of a checkpoint whose dense matrices become blocks as ``formats`` say."""

        def block(name: str) -> int:
            sizes = [1]
            for layer in range(config.num_layers):
                full = f"model.layers.{layer}.{name}.weight"
                kind = formats.get(full)
                sizes.append(kind.block_size if kind is not None else checkpoint.block_size(full))
            return math.lcm(*sizes)

        remedy = "QUANTIZATION=none" if formats else "GGUF_DEQUANTIZE=1"
        return cls(config, block("self_attn.o_proj"), block("mlp.down_proj"), remedy)

    def sizes(self) -> list[int]:
        """Every number of ranks that the model can be divided by, 1 first."""
        return [size for size in range(1, MAX_SIZE + 1) if self.obstacle(size) is None]

    def shard(self, rank: int, size: int) -> Shard:
        """What ``rank`` holds, for a ``size`` without ``obstacle``."""
        config = self.config
        heads, inner, vocabulary = config.num_heads // size, self._inner, -(-config.vocab_size // size)
        units = config.intermediate_size // inner
        kv = (rank * config.num_kv_heads // size, -(-(rank + 1) * config.num_kv_heads // size))
        return Shard(
            config,
            rank,
            size,
            heads=(rank * heads, (rank + 1) * heads),
            kv_heads=kv,
            inner=(rank * units // size * inner, (rank + 1) * units // size * inner),
            vocabulary=(rank * vocabulary, min((rank + 1) * vocabulary, config.vocab_size)),
        )

    def obstacle(self, size: int) -> str | None:
        """Why it cannot be divided by ``size``, a clause; None where it can."""
        config = self.config
        heads, kv_heads, width = config.num_heads, config.num_kv_heads, config.head_dim
        if size == 1:
            return None
        if heads % size:
            return f"it has {heads} attention heads"
        if kv_heads % size and size % kv_heads:
            return f"it has {kv_heads} KV heads"
        if heads // size * width % self.o_block:
            return (
                f"the {heads // size * width} columns of o_proj for a rank are no whole blocks of "
                f"{self.o_block} ({self.remedy} makes plain numbers of them)"
            )
        if config.intermediate_size // self._inner < size:
            return f"down_proj has {config.intermediate_size // self._inner} blocks of {self._inner} columns"
        if -(-config.vocab_size // size) * (size - 1) >= config.vocab_size:
            return f"its vocabulary has {config.vocab_size} tokens"
        return None

    @property
    def _inner(self) -> int:
        """Numbers of the MLP's inside that stay together."""
        unit = math.lcm(self.down_block, _UNIT)
        return self.down_block if self.config.intermediate_size % unit else unit


@dataclass(frozen=True, slots=True)
class Shard:
    """What one rank holds, as first and last + 1 of each.

    Attributes:
        config: of the whole model.
        kv_heads: more ranks than KV heads share them.
        inner: of the MLP's inside, ``intermediate_size`` in all.
        vocabulary: every rank but the last has as many rows as the first.
    """

    config: ModelConfig
    rank: int
    size: int
    heads: tuple[int, int]
    kv_heads: tuple[int, int]
    inner: tuple[int, int]
    vocabulary: tuple[int, int]

    @property
    def local(self) -> ModelConfig:
        """The config of what this rank runs; the vocabulary stays whole."""
        return replace(
            self.config,
            num_heads=self.heads[1] - self.heads[0],
            num_kv_heads=self.kv_heads[1] - self.kv_heads[0],
            intermediate_size=self.inner[1] - self.inner[0],
        )

    def part(self, name: str) -> Part | None:
        """The rows or columns of a parameter that are this rank's; ``None`` is all of it."""
        width = self.config.head_dim
        module, _, kind = name.rpartition(".")
        match module.rpartition(".")[2]:
            case "q_proj":
                return Part(0, self.heads[0] * width, self.heads[1] * width)
            case "k_proj" | "v_proj":
                return Part(0, self.kv_heads[0] * width, self.kv_heads[1] * width)
            case "gate_proj" | "up_proj":
                return Part(0, *self.inner)
            case "o_proj" if kind == "weight":
                return Part(1, self.heads[0] * width, self.heads[1] * width)
            case "down_proj" if kind == "weight":
                return Part(1, *self.inner)
            case "embed_tokens" | "lm_head":
                return Part(0, *self.vocabulary)
        return None

    def adds_bias(self, name: str) -> bool:
        """Whether a bias counts on this rank: one that follows a sum counts once."""
        return self.rank == 0 or not name.endswith(("o_proj.bias", "down_proj.bias"))
