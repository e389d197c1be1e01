"""The matrices of a model of transformers, multiplied by the compiled kernels or kept in blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.loading.ggml_types import GGMLType
from mini_sglang.backend.models.quantization import FORMATS, fits, nothing_fits, quantized
from mini_sglang.backend.weights import DenseWeight, Weight, accelerate
from mini_sglang.errors import ModelLoadError


class PackedLinear(nn.Module):
    """In the place of ``nn.Linear``."""

    def __init__(self, matrix: Weight, bias: Tensor | None, device: torch.device) -> None:
        super().__init__()
        self.matrix = matrix
        self.bias = bias
        # A model is asked for its device and dtype by its parameters; this may be the only one it has.
        self.anchor = nn.Parameter(torch.empty(0, dtype=matrix.dtype, device=device), requires_grad=False)
        self.out_features, self.in_features = matrix.shape

    @property
    def weight(self) -> Tensor:
        """The dense matrix, made anew at every call, for code that asks for more than the product."""
        return self.matrix.dequantize(self.matrix.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.matrix.linear(x, self.bias)


class PackedRows(nn.Embedding):
    """An embedding whose table is a ``Weight``. A base of the model's own class, see ``_share``."""

    matrix: Weight

    def forward(self, input: Tensor) -> Tensor:
        return self.matrix.rows(input)


def pack_linears(
    model: Any,
    kernels: NativeKernels | None,
    quantization: str,
    triton: bool = False,
    joins: Mapping[nn.Module, Callable[[Weight], Weight]] = MappingProxyType({}),
) -> None:
    """Replace the model's ``nn.Linear`` where the kernels multiply faster or ``quantization`` makes blocks.

    Experts that a model keeps in one tensor of three dimensions are no ``nn.Linear`` and stay as they are.
    Each matrix is let go before the next is packed.

    Args:
        quantization: the value of QUANTIZATION.
        triton: whether Triton's kernels may multiply by blocks.
        joins: see ``division.take_over``.

    Raises:
        InvalidValueError: no matrix is left to quantise.
        ModelLoadError: a number fits no block.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = type(head) is nn.Linear and head.weight is embedding.weight
    tables = [module for module in joins if isinstance(module, nn.Embedding)]
    # Listed first: what is replaced must not be walked into.
    places = [
        (module, name, child)
        for module in list(model.modules())
        for name, child in module.named_children()
        if type(child) is nn.Linear
    ]
    blocks = 0
    done: dict[nn.Linear, PackedLinear] = {}
    for module, name, child in places:
        if child not in done:
            dense = child.weight.data
            inner, outer = FORMATS.get(quantization, (None, None))
            kind = outer if child is head else inner
            matrix = _matrix(dense, kind)
            blocks += not isinstance(matrix, DenseWeight)
            packed = accelerate(matrix, kernels, dense.dtype, triton)
            if child in joins:
                packed = joins[child](packed)
            elif packed is matrix and isinstance(matrix, DenseWeight):
                continue
            bias = None if child.bias is None else child.bias.data
            done[child] = PackedLinear(packed, bias, dense.device)
            child.weight = None  # type: ignore[assignment]
            if tied and child is head:
                _share(embedding, packed)
        module._modules[name] = done[child]
    for table in tables:
        if not (tied and table is embedding):
            _share(table, joins[table](DenseWeight(table.weight.data)))
    if quantization != "none" and not blocks:
        raise nothing_fits(quantization)


def packed_bytes(model: nn.Module) -> int:
    """Bytes of the matrices that ``pack_linears`` made, tied ones once, and of the biases beside them."""
    made = [module for module in model.modules() if isinstance(module, PackedLinear | PackedRows)]
    matrices = {id(module.matrix): module.matrix.nbytes for module in made}
    biases = [
        module.bias.nbytes for module in made if isinstance(module, PackedLinear) and module.bias is not None
    ]
    return sum(matrices.values()) + sum(biases)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a parameter that transformers has divided; a plain one as it is."""
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor.data if to_local is None else to_local().detach()


def _matrix(dense: Tensor, kind: GGMLType | None) -> Weight:
    if kind is None or not fits(tuple(dense.shape), kind):
        return DenseWeight(dense)
    try:
        return quantized(dense, kind, dense.dtype, dense.device).to(dense.device)
    except ValueError as error:
        raise ModelLoadError(f"A matrix of the model cannot be quantised: {error}.") from None


def _share(embedding: nn.Embedding, matrix: Weight) -> None:
    """Take the embedding's rows from ``matrix``, whatever the model's own class does with them."""
    kind = type(embedding)
    # Behind the model's class, so that what it calls as its parent's forward is ours.
    bases = (PackedRows,) if kind is nn.Embedding else (kind, PackedRows)
    # For code that looks at the weight's shape or dtype; NaN shows where it looks at the numbers.
    like = torch.full((), torch.nan, dtype=matrix.dtype).expand(matrix.shape)
    del embedding._parameters["weight"]
    embedding.__dict__["weight"] = like
    embedding.__dict__["matrix"] = matrix
    embedding.__class__ = type(kind.__name__, bases, {})
