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

from mini_sglang.backend.huge_pages import Arena
from mini_sglang.backend.kernels.build import BuildError, build_library
from mini_sglang.backend.kernels.jobs import FORMATS, Embed, Entry, Job, Product
from mini_sglang.backend.kernels.triton.available import triton_wanted, why_no_triton
from mini_sglang.backend.loading.ggml_types import GGMLType

logger = logging.getLogger(__name__)

_FAST_FORMATS = frozenset({"Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"})
_TILED_DTYPES: Mapping[str, frozenset[torch.dtype]] = MappingProxyType(
    {
        "avx512bf16": frozenset({torch.bfloat16, torch.int8}),
        "avx512vnni": frozenset({torch.int8}),
    }
)


class NativeKernels:
    """An opened kernel library with its threads. Calls from several threads take turns.

    Every product of a row of ``x`` is summed in one order, whatever the number of rows: a row's result is
    the same, bit for bit, alone and among others.

    Attributes:
        variant: the instruction set in use: ``avx512bf16``, ``avx512vnni``, ``avx2`` or ``generic``.
        fast: whether they are faster than torch with a dense matrix; the generic ones are not, and serve
            where a matrix is to stay in blocks.
        tiled_dtypes: of which attention over a tiled ``KVPool`` is to be had.
        half: the 16-bit dtype that attention works in fastest.
        fast_formats: names of the block formats that are faster than the dense matrix.
    """

    def __init__(self, library: Path, threads: int, variant: str = "") -> None:
        """Open ``library`` (see ``build_library``).

        Args:
            threads: that share the work, the caller among them.
            variant: use this instruction set rather than the best one.

        Raises:
            BuildError: the library cannot be loaded, or has not that variant for this CPU.
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
            raise BuildError(f"no {variant} kernels for this CPU" if variant else "threads cannot be started")
        # At the interpreter's exit another thread may still be inside a kernel.
        self._finalizer = weakref.finalize(self, lib.kernels_close, self._handle)
        self._finalizer.atexit = False
        self.variant: str = lib.kernels_variant(self._handle).decode()
        self.fast = self.variant != "generic"
        self.tiled_dtypes = _TILED_DTYPES.get(self.variant, frozenset())
        self.half = torch.bfloat16 if torch.bfloat16 in self.tiled_dtypes else torch.float16
        self.fast_formats = _FAST_FORMATS if self.fast else frozenset()

    def has_format(self, type: GGMLType) -> bool:
        """Whether ``pack`` takes matrices of this format and ``product`` multiplies by them best.

        The generic variant takes blocks, which torch would make dense first, and no dense matrix.
        """
        return type.name in FORMATS and (self.fast or type.quantized)

    def run(self, job: Job, rows: int) -> None:
        """Do one job, for ``rows`` rows."""
        entry = Entry.of(job)
        self._run(self._handle, ctypes.addressof(entry), 1, rows)

    def run_all(self, entries: ctypes.Array[Entry], rows: int) -> None:
        """Do the jobs one after another, without Python between them."""
        self._run(self._handle, ctypes.addressof(entries), len(entries), rows)

    def product(self, packed: Tensor, type: GGMLType, shape: tuple[int, int]) -> Product:
        """A job that multiplies by the matrix of ``shape`` that ``pack`` gave; without ``x`` and ``y``."""
        n, k = shape
        return Product(weight=packed.data_ptr(), n=n, k=k, stride=n, format=FORMATS[type.name])

    def lookup(self, packed: Tensor, type: GGMLType, shape: tuple[int, int]) -> Embed:
        """A job that takes rows of the matrix that ``pack`` gave; without ``ids`` and ``out``."""
        return Embed(weight=packed.data_ptr(), k=shape[1], format=FORMATS[type.name])

    def multiply(
        self, packed: Tensor, type: GGMLType, shape: tuple[int, int], x: Tensor, bias: Tensor | None
    ) -> Tensor:
        """``x @ W.T + bias`` for the matrix W of ``shape`` that ``pack`` gave, rounded to the dtype of ``x``.

        With blocks, each 32 numbers of a row of ``x`` are rounded to 8 bits with a scale of their own (as
        ggml does); products are exact integers within a block, added up over the blocks in float32. With
        bfloat16 on a CPU that multiplies it, ``x`` is rounded to bfloat16; sums are in float32 everywhere.

        Args:
            x: ``[..., K]``.
            bias: ``[N]``.
        """
        job = self.product(packed, type, shape)
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

    def pack(self, blocks: Tensor, type: GGMLType, arena: Arena | None = None) -> Tensor:
        """Interleave the rows ``[N, bytes_per_row]`` of a matrix, uint8, for ``multiply``.

        Args:
            arena: where the result goes; by default among the matrices that stay as long as the kernels do.
        """
        rows, row_bytes = blocks.shape
        columns = row_bytes // type.block_bytes * type.block_size
        number = FORMATS[type.name]
        blocks = blocks.contiguous()
        packed = (arena or self._arena).empty(self._lib.kernels_packed_bytes(number, rows, columns))
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
        if not self._lib.kernels_unpack(FORMATS[type.name], *pointers, len(ids), out_features, in_features):
            raise IndexError(f"Row ids must be from 0 to {out_features - 1}.")
        return blocks


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
    if triton_wanted(setting, device):
        return None, "triton"
    if device.type != "cpu":
        why = why_no_triton(device) if device.type == "cuda" else None
        return None, f"torch: {why or f'the device is {device.type}'}"
    try:
        kernels = NativeKernels(build_library(cache, notify), threads)
    except BuildError as error:
        logger.warning("The CPU kernels are not used: %s", error)
        return None, f"torch: {error}"
    return kernels, f"native ({kernels.variant})"
