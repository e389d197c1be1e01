"""Compile every kernel for GPUs that are not here, as the code launches it, and print what it takes as JSON.

    python -m tests.backend.kernels.triton.compile_all 90 "16,8,128 14,2,64" "bfloat16 float32"

Then the formats of blocks may follow, numbers of features, and sizes of vocabularies with a number of rows.

Run as a script, in a process of its own: within one that interprets, triton compiles nothing.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mini_sglang.backend.attention import triton as attention
from mini_sglang.backend.attention.base import PLAIN, AttentionForm
from mini_sglang.backend.kernels.triton import (
    attention_kernels,
    block_kernels,
    choosing_kernels,
    chunk_kernels,
    elementwise_kernels,
    few_rows,
    few_rows_kernels,
    ranking_kernels,
)
from mini_sglang.backend.kernels.triton import operations as operations_of_triton
from mini_sglang.backend.kernels.triton.block_layout import FORMATS
from mini_sglang.backend.kernels.triton.block_weight import TritonWeight
from mini_sglang.backend.kernels.triton.choosing import COLUMNS, TritonChooser, take_chosen
from mini_sglang.backend.kernels.triton.operations import TritonOperations, round_rows
from mini_sglang.backend.kernels.triton.ranking import TritonRanking
from mini_sglang.backend.loading.ggml_types import GGML_TYPES
from mini_sglang.backend.models.rope import Rotations
from mini_sglang.backend.weights import DenseWeight, QuantizedWeight
from tests.backend.kernels.triton.scene import LAYER, Scene

_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}
_TYPES |= {
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
}

# What tells one compiled kernel from another.
SIZES = ("KEY_DIM", "BLOCK_M", "BLOCK_N", "HEAD_DIM", "WIDTH", "BITS", "GROUP", "BLOCK_R", "ROWS", "FEATURES")
SIZES += ("PART",)
FLAGS = ("SPLIT", "WINDOWED", "SOFTCAP", "SINKS", "NORM", "ROTATE", "MINIMUM", "NESTED", "EXACT", "CHOSEN")
FLAGS += ("GATED", "ADD", "DEPENDENT")

KERNELS = {
    attention_kernels: ("attend", "merge"),
    chunk_kernels: ("attend_chunk",),
    elementwise_kernels: ("add_and_norm", "rotate_and_store", "silu_and_mul", "round_row"),
    block_kernels: ("multiply", "add_parts", "unpack"),
    few_rows_kernels: ("few_rows",),
    ranking_kernels: ("find_peaks", "find_thresholds", "gather_largest", "pick_ranked"),
    choosing_kernels: ("find_best", "weigh_parts", "pick_tokens", "take_chosen"),
}


class Compiling:
    """Stands for a kernel: a launch compiles it and computes nothing."""

    def __init__(self, kernel: Any, capability: int, done: dict[str, dict[str, int]]) -> None:
        self.kernel = kernel
        self.capability = capability
        self.done = done

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(size > 0 for size in grid)
        return self.compile

    def compile(
        self,
        *args: Any,
        num_warps: int,
        num_stages: int = 3,
        maxnreg: int | None = None,
        launch_pdl: bool = False,
        **constants: Any,
    ) -> None:
        names = self.kernel.arg_names
        signature, attributes = {}, {}
        for place, (name, value) in enumerate(zip(names, args, strict=False)):
            if isinstance(value, torch.Tensor):
                signature[name] = _TYPES[value.dtype]
                attributes[(place,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
                specialized = not self.kernel.params[place].do_not_specialize
                if isinstance(value, int) and value and value % 16 == 0 and specialized:
                    attributes[(place,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(names[len(args) :], "constexpr")
        assert set(constants) == set(names[len(args) :])
        source = ASTSource(self.kernel, signature, constants, attributes)
        made = triton.compile(
            source,
            target=GPUTarget("cuda", self.capability, 32),
            options={
                "num_warps": num_warps,
                "num_stages": num_stages,
                "maxnreg": maxnreg,
                "launch_pdl": launch_pdl,
            },
        )
        shapes = [str(constants[name]) for name in SIZES if name in constants]
        kinds = [name for name in FLAGS if constants.get(name)]
        words = [self.kernel.fn.__name__, signature[names[0]], *shapes, *kinds, f"{num_warps}w"]
        self.done[" ".join([f"sm{self.capability}", *words])] = {
            "shared": made.metadata.shared,
            **resources(made.asm["cubin"]),
        }


def resources(binary: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack: what the registers had no room for."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout)
    assert found is not None, said.stdout
    return {"registers": int(found[1]), "stack": int(found[2])}


def compile_all(
    capability: int,
    shapes: list[tuple[int, ...]],
    dtypes: list[torch.dtype],
    formats: Collection[str],
    features: list[int],
    vocabularies: list[tuple[int, ...]],
) -> None:
    done: dict[str, dict[str, int]] = {}
    for module, names in KERNELS.items():
        for name in names:
            setattr(module, name, Compiling(getattr(module, name), capability, done))
    shared = {80: 163, 86: 99, 89: 99, 90: 227}[capability] * 1024
    attention.shared_bytes = lambda device: shared  # type: ignore[assignment]
    for user in (few_rows, operations_of_triton, attention):
        user.dependent_launches = lambda device: capability >= 90  # type: ignore[attr-defined]
    for heads, kv_heads, head_dim in shapes:
        for dtype in dtypes:
            scene = Scene([(1, 600), (40, 0)], (heads, kv_heads, head_dim), 16, dtype)
            both = AttentionForm(0.5, 30.0, torch.zeros(heads))
            for window, form in ((None, PLAIN), (100, both)):
                scene.attend(attention.TritonAttention(), window, form)
            operations, slots = TritonOperations(1e-5), torch.zeros(41, dtype=torch.int64)
            hidden = torch.zeros(41, heads * head_dim, dtype=dtype)
            operations.norm(hidden, hidden, hidden[0])
            operations.silu_and_mul(hidden)
            turns = Rotations(torch.zeros(head_dim // 2), 1.0, dtype).at(slots, 1)
            qkv = torch.zeros(41, heads + 2 * kv_heads, head_dim, dtype=dtype)
            norm = qkv[0, : heads + kv_heads]
            operations.rotate_and_store(qkv, norm, turns, scene.kv, LAYER, slots)
    for dtype in dtypes:
        compile_products(dtype, formats, features)
        if dtype.itemsize == 2:
            compile_few_rows(dtype)
        for vocab_size, rows in vocabularies:
            compile_choosing(dtype, vocab_size, rows)
        if capability >= 89:
            round_rows(torch.zeros(3, 5120, dtype=dtype), 1e-30)
    print(json.dumps({"shared": shared, "kernels": done}))


def compile_choosing(dtype: torch.dtype, vocab_size: int, rows: int) -> None:
    logits, table = (
        torch.zeros(rows, vocab_size, dtype=dtype),
        torch.zeros(COLUMNS, rows, dtype=torch.float64),
    )
    ids, numbers = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, 2, dtype=torch.float64)
    TritonChooser(vocab_size).choose(logits, table, ids, numbers)
    TritonRanking(vocab_size).draw(logits.float(), torch.zeros(6, rows, dtype=torch.float64))
    take_chosen(ids, ids)


def compile_products(dtype: torch.dtype, formats: Collection[str], sizes: list[int]) -> None:
    """Every way to multiply by blocks of ``formats``, and to unpack them."""
    for kind in GGML_TYPES.values():
        if kind.name not in formats:
            continue
        for features in sizes:
            blocks = torch.zeros(features, 512 // kind.block_size * kind.block_bytes, dtype=torch.uint8)
            weight = TritonWeight.of(QuantizedWeight(blocks, kind, dtype), dtype)
            for rows in (1, 40, 100):
                weight.linear(torch.zeros(rows, 512, dtype=dtype), torch.zeros(features, dtype=dtype))
            weight.rows(torch.zeros(2, dtype=torch.int64))
            weight.dequantize(dtype)


def compile_few_rows(dtype: torch.dtype) -> None:
    """A layer's products, of the smaller of two models for the most rows, of the larger for one."""
    for hidden_size, inner_size, rows in ((1024, 3072, few_rows.FEW_ROWS), (5120, 17408, 1)):
        number = torch.zeros((), dtype=dtype)
        down = DenseWeight(number.expand(hidden_size, inner_size))
        gate_up = DenseWeight(number.expand(2 * inner_size, hidden_size))
        hidden = torch.zeros(rows, hidden_size, dtype=dtype)
        few_rows.product(hidden, gate_up, None, hidden[0], 1e-5, gated=True)
        few_rows.product(hidden, gate_up, hidden, hidden[0], 1e-5)
        few_rows.product(torch.zeros(rows, inner_size, dtype=dtype), down, None, residual=hidden)


def tuples(words: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, word.split(","))) for word in words.split()]


if __name__ == "__main__":
    # All formats take minutes.
    defaults = (" ".join(FORMATS), "1024 9216", "151936,1 49153,64")
    given = sys.argv[4:]
    blocks, sizes, vocabularies = (*given, *defaults[len(given) :])
    compile_all(
        int(sys.argv[1]),
        tuples(sys.argv[2]),
        [getattr(torch, dtype) for dtype in sys.argv[3].split()],
        blocks.split(),
        [int(size) for size in sizes.split()],
        tuples(vocabularies),
    )
