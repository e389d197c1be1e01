"""One face over the two kinds of model on disk: a folder of safetensors, and a GGUF file."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mini_sglang.backend.loading.gguf import GGUFFile, GGUFTensor, read_gguf
from mini_sglang.backend.loading.gguf_model import architecture, hf_config, hf_names
from mini_sglang.backend.loading.parts import Part
from mini_sglang.backend.loading.safetensors_folder import SafetensorsCheckpoint
from mini_sglang.backend.quant import FLOATS, dequantize
from mini_sglang.backend.weights import DenseWeight, QuantizedWeight, Weight
from mini_sglang.errors import ModelLoadError, shorten


class Checkpoint(Protocol):
    """A model's config and parameters, under the names and in the row order of transformers.

    Tensors may be views of the mapped file and are not to be written to; they stay valid after ``close``.
    Every method that takes a name raises ``ModelLoadError`` for one that the model does not have.

    Attributes:
        config: the content of ``config.json``.
        generation_config: the content of ``generation_config.json``, empty where there is none.
        nbytes: stored bytes of all parameters.
        quantized: whether ``weight`` gives matrices in blocks.
    """

    config: dict[str, Any]
    generation_config: dict[str, Any]
    nbytes: int
    quantized: bool

    def names(self) -> Collection[str]:
        """The parameters' names."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A parameter's shape, from the header alone."""

    def weight(self, name: str, dtype: torch.dtype, part: Part | None = None) -> Weight:
        """A matrix, to be computed with in ``dtype``.

        Args:
            part: the rows, or columns in whole blocks, that are wanted; no others are read.

        Raises:
            ModelLoadError: it is not a matrix, or of a type that is not supported.
        """

    def tensor(self, name: str, dtype: torch.dtype | None, part: Part | None = None) -> Tensor:
        """A parameter of any shape as a dense tensor.

        Args:
            dtype: None is the type it is stored in, for blocks float32.
            part: the rows or columns that are wanted; no others are read. Rows of q and k are whole heads.

        Raises:
            ModelLoadError: it is of a type that is not supported.
        """

    def in_blocks(self, name: str) -> bool:
        """Whether a parameter is stored in quantised blocks."""

    def block_size(self, name: str) -> int:
        """How many columns of a matrix share a block, as ``weight`` gives it; 1 where it is dense."""

    def release(self) -> None:
        """Give back memory that only holds the file's bytes which were read so far. Changes no tensor."""

    def close(self) -> None:
        """Let go of the files."""


def open_checkpoint(
    path: Path, *, dequantize: bool | None, fast_types: Collection[str] = frozenset()
) -> Checkpoint:
    """Open a model folder (safetensors) or a GGUF file.

    Args:
        dequantize: whether the quantised matrices of a GGUF file become dense ones in the compute dtype;
            None is false where each of them has one of the ``fast_types``.
        fast_types: names of block formats.

    Raises:
        ModelLoadError: the model is missing, damaged or unsupported.
    """
    if path.is_dir():
        return SafetensorsCheckpoint(path)
    return GGUFCheckpoint(path, dequantize=dequantize, fast_types=fast_types)


class GGUFCheckpoint:
    """The checkpoint of a GGUF file; see ``Checkpoint``."""

    def __init__(
        self, path: Path, *, dequantize: bool | None, fast_types: Collection[str] = frozenset()
    ) -> None:
        self.path = path
        self._file: GGUFFile = read_gguf(path)
        try:
            self.config = hf_config(self._file)
            self._names = hf_names(self._file)
            self._interleaved = architecture(self._file).interleaved
        except BaseException:
            self._file.close()
            raise
        if dequantize is None:
            types = [self._file.tensors[name].type for name in self._names.values()]
            dequantize = any(type.quantized and type.name not in fast_types for type in types)
        self._dequantize = dequantize
        self.quantized = not dequantize and any(
            self._file.tensors[name].type.quantized for name in self._names.values()
        )
        self.generation_config: dict[str, Any] = {}
        self.nbytes = sum(self._file.tensors[name].nbytes for name in self._names.values())
        self._file.prefetch()

    def names(self) -> Collection[str]:
        return self._names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensor(name).shape

    def weight(self, name: str, dtype: torch.dtype, part: Part | None = None) -> Weight:
        tensor = self._tensor(name)
        if len(tensor.shape) != 2:
            raise ModelLoadError(
                f"The tensor {name} of {self.path} has the shape {tensor.shape}; it must be a matrix."
            )
        if tensor.type.quantized and not self._dequantize:
            return QuantizedWeight(self._blocks(name, tensor, part), tensor.type, dtype)
        return DenseWeight(self.tensor(name, dtype, part))

    def tensor(self, name: str, dtype: torch.dtype | None, part: Part | None = None) -> Tensor:
        tensor = self._tensor(name)
        shape = tensor.shape if part is None else part.shape(tensor.shape)
        blocks = self._blocks(name, tensor, part)
        if dtype is None and not tensor.type.quantized:
            return blocks.view(FLOATS[tensor.type.name]).view(shape)
        numbers = dequantize(blocks, tensor.type, dtype or torch.float32)
        if part is not None and part.dim == 1 and numbers.shape != shape:
            first = part.start % tensor.type.block_size
            return numbers[:, first : first + shape[1]].contiguous()
        return numbers.view(shape)

    def in_blocks(self, name: str) -> bool:
        return self._tensor(name).type.quantized

    def block_size(self, name: str) -> int:
        return 1 if self._dequantize else self._tensor(name).type.block_size

    def release(self) -> None:
        self._file.release()

    def close(self) -> None:
        self._file.close()

    def _tensor(self, name: str) -> GGUFTensor:
        try:
            return self._file.tensors[self._names[name]]
        except KeyError:
            raise ModelLoadError(f"The model {self.path} has no tensor {shorten(name)}.") from None

    def _blocks(self, name: str, tensor: GGUFTensor, part: Part | None) -> Tensor:
        """The stored bytes of a part, uint8 ``[rows, bytes_per_row]``; of columns all blocks they touch."""
        kind = tensor.type
        if len(tensor.shape) == 1 and kind.quantized:
            if part is not None or self._interleaved_heads(name):
                raise ModelLoadError(f"The bias {name} of {self.path} is quantised, which is not supported.")
            return torch.from_numpy(self._file.view(tensor.name)).view(1, -1)
        rows = tensor.shape[0] if tensor.shape else 1
        blocks = torch.from_numpy(self._file.view(tensor.name)).view(rows, -1)
        heads = self._interleaved_heads(name)
        if heads and rows % (2 * heads):
            raise ModelLoadError(
                f"The tensor {name} of {self.path} has {rows} rows; it must have {heads} heads of even size."
            )
        if part is not None and part.dim == 0:
            blocks = blocks[part.start : part.stop]
            heads, rows = heads * len(blocks) // rows, len(blocks)
        elif part is not None:
            first, last = part.start // kind.block_size, -(-part.stop // kind.block_size)
            blocks = blocks[:, first * kind.block_bytes : last * kind.block_bytes].contiguous()
        if not heads:
            return blocks
        # Row 2i + j of a head in the file is row j * (head_dim / 2) + i in transformers. Copied by numpy, in
        # this thread: see ``stack_rows``.
        pairs = blocks.numpy().reshape(heads, rows // heads // 2, 2, -1)
        return torch.from_numpy(pairs.transpose(0, 2, 1, 3).reshape(rows, -1))

    def _interleaved_heads(self, name: str) -> int:
        """The number of heads whose rows llama.cpp's converter reordered, 0 where it did not."""
        if self._interleaved and ".self_attn.q_proj." in name:
            return int(self.config["num_attention_heads"])
        if self._interleaved and ".self_attn.k_proj." in name:
            return int(self.config["num_key_value_heads"])
        return 0
