"""The compiled kernels, called through ctypes.

Their torch twins: the matrix products in ``backend/weights.py``, attention in ``attention/paged.py``.
"""

from __future__ import annotations

import ctypes
import logging
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from mini_sglang.backend.device import cpu_has_bf16
from mini_sglang.backend.huge_pages import Arena
from mini_sglang.backend.kernels.build import BuildError, build_library
from mini_sglang.backend.kernels.jobs import Entry, Job, Product
from mini_sglang.backend.loading.ggml_types import GGMLType

logger = logging.getLogger(__name__)

# The enums of kernels.h.
_FORMATS: Mapping[str, int] = MappingProxyType({"Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14})
_NUMBERS: Mapping[torch.dtype, int] = MappingProxyType(
    {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
)


class NativeKernels:
    """An opened kernel library with its threads. Calls from several threads take turns.

    Every product of a row of ``x`` is summed in one order, whatever the number of rows: a row's result is
    the same, bit for bit, alone and among others.

    Attributes:
        variant: the instruction set in use: ``avx512vnni``, ``avx2`` or ``generic``.
        fast: whether they are faster than torch with a dense matrix; the generic ones are not, and serve
            where a matrix is to stay in blocks.
        fast_formats: names of the block formats that are faster than the dense matrix.
    """

    def __init__(self, library: Path, threads: int, variant: str = "") -> None:
        """Open ``library`` (see ``build_library``).

        Args:
            threads: that share the work, the caller among them.
            variant: use this instruction set rather than the best one.

        Raises:
            BuildError: the library cannot be loaded, or this CPU has not that variant.
        """
        try:
            lib = ctypes.CDLL(str(library))
        except OSError as error:
            raise BuildError(f"cannot load {library}: {error}") from None
        pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "open": (pointer, [number, ctypes.c_char_p]),
            "close": (None, [pointer]),
            "variant": (ctypes.c_char_p, [pointer]),
            "run": (None, [pointer, pointer, size, size]),
            "packed_bytes": (size, [number, size, size]),
            "pack": (None, [pointer, number, pointer, pointer, size, size]),
            "unpack": (ctypes.c_bool, [number, *[pointer] * 3, *[size] * 3]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(lib, f"kernels_{name}")
            function.restype, function.argtypes = result, arguments
        self._lib = lib
        self._arena = Arena()
        self._run = lib.kernels_run
        self._handle: int | None = lib.kernels_open(threads, variant.encode())
        if self._handle is None:
            raise BuildError(f"this CPU has no {variant}" if variant else "threads cannot be started")
        # At the interpreter's exit another thread may still be inside a kernel.
        self._finalizer = weakref.finalize(self, lib.kernels_close, self._handle)
        self._finalizer.atexit = False
        self.variant: str = lib.kernels_variant(self._handle).decode()
        self.fast = self.variant != "generic"
        self.fast_formats = frozenset(_FORMATS) if self.fast else frozenset()
        self._half_is_slow = not cpu_has_bf16()

    def has_dense(self, dtype: torch.dtype) -> bool:
        """Whether ``dense`` is faster: for half precision, on a CPU that does not compute in it."""
        return self.fast and dtype in _NUMBERS and (dtype == torch.float32 or self._half_is_slow)

    def has_format(self, type: GGMLType) -> bool:
        """Whether ``pack`` takes matrices of this block format."""
        return type.name in _FORMATS

    def run(self, job: Job, rows: int) -> None:
        """Do one job, for ``rows`` rows."""
        entry = Entry.of(job)
        self._run(self._handle, ctypes.addressof(entry), 1, rows)

    def run_all(self, entries: ctypes.Array[Entry], rows: int) -> None:
        """Do the jobs one after another, without Python between them."""
        self._run(self._handle, ctypes.addressof(entries), len(entries), rows)

    def dense_product(self, weight: Tensor) -> Product:
        """A job that multiplies by ``weight`` ``[N, K]``, contiguous; without ``x``, ``bias`` and ``y``."""
        n, k = weight.shape
        number = _NUMBERS[weight.dtype]
        return Product(weight=weight.data_ptr(), n=n, k=k, stride=n, packed=0, format=number)

    def packed_product(self, packed: Tensor, type: GGMLType, shape: tuple[int, int]) -> Product:
        """The same for a matrix of ``shape`` that ``pack`` gave."""
        n, k = shape
        number = _FORMATS[type.name]
        return Product(weight=packed.data_ptr(), n=n, k=k, stride=n, packed=1, format=number)

    def dense(self, weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x @ weight.T + bias`` in float32, rounded once to the dtype of ``x``.

        Args:
            weight: ``[N, K]``, contiguous, float32, float16 or bfloat16.
            x: ``[..., K]``.
            bias: ``[N]``.
        """
        return self._multiply(self.dense_product(weight), x, bias)

    def quantized(
        self, packed: Tensor, type: GGMLType, shape: tuple[int, int], x: Tensor, bias: Tensor | None
    ) -> Tensor:
        """``x @ W.T + bias`` for the matrix W of ``shape`` that ``pack`` gave, in the dtype of ``x``.

        Each 32 numbers of a row of ``x`` are rounded to 8 bits with a scale of their own (as ggml does);
        products are exact integers within a block, added up over the blocks in float32.
        """
        return self._multiply(self.packed_product(packed, type, shape), x, bias)

    def pack(self, blocks: Tensor, type: GGMLType) -> Tensor:
        """Interleave the blocks ``[N, bytes_per_row]`` of a matrix, uint8, for ``quantized``."""
        rows, row_bytes = blocks.shape
        columns = row_bytes // type.block_bytes * type.block_size
        number = _FORMATS[type.name]
        blocks = blocks.contiguous()
        packed = self._arena.empty(self._lib.kernels_packed_bytes(number, rows, columns))
        self._lib.kernels_pack(self._handle, number, blocks.data_ptr(), packed.data_ptr(), rows, columns)
        return packed

    def unpack(self, packed: Tensor, type: GGMLType, shape: tuple[int, int], ids: Tensor) -> Tensor:
        """Rows ``ids`` ``[R]`` of a packed matrix of ``shape`` as they were, uint8 ``[R, bytes_per_row]``.

        Raises:
            IndexError: an id that is no row.
        """
        out_features, in_features = shape
        ids = ids.to(torch.int64).contiguous()
        blocks = torch.empty((len(ids), in_features // type.block_size * type.block_bytes), dtype=torch.uint8)
        pointers = packed.data_ptr(), ids.data_ptr(), blocks.data_ptr()
        if not self._lib.kernels_unpack(_FORMATS[type.name], *pointers, len(ids), out_features, in_features):
            raise IndexError(f"Row ids must be from 0 to {out_features - 1}.")
        return blocks

    def _multiply(self, job: Product, x: Tensor, bias: Tensor | None) -> Tensor:
        dtype = x.dtype
        if x.shape[-1] != job.k or (bias is not None and bias.shape[0] != job.n):
            shapes = f"x of {list(x.shape)} or its bias"
            raise ValueError(f"A matrix of {[job.n, job.k]} does not fit {shapes}.")
        if dtype != torch.float32:
            x = x.float()
        if not x.is_contiguous():
            x = x.contiguous()
        if bias is not None:
            bias = bias.float().contiguous()
            job.bias = bias.data_ptr()
        out = x.new_empty((*x.shape[:-1], job.n))
        job.x, job.y = x.data_ptr(), out.data_ptr()
        self.run(job, x.numel() // job.k)
        return out if dtype == torch.float32 else out.to(dtype)


def open_kernels(
    setting: str,
    device: torch.device,
    cache: Path,
    threads: int,
    notify: Callable[[str], None] | None = None,
) -> tuple[NativeKernels | None, str]:
    """The kernels for ``KERNELS=setting``, or None for torch's operators; and a word on which and why."""
    if setting == "reference":
        return None, "torch: KERNELS=reference"
    if device.type != "cpu":
        return None, f"torch: the device is {device.type}"
    try:
        kernels = NativeKernels(build_library(cache, notify), threads)
    except BuildError as error:
        logger.warning("The CPU kernels are not used: %s", error)
        return None, f"torch: {error}"
    return kernels, f"native ({kernels.variant})"
