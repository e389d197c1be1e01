"""With which tiles and how many warps a kernel is launched: by sizes and types; nothing is tried out."""

from __future__ import annotations

from dataclasses import dataclass

# What most GPUs since 2018 let a block have; an H100 has 227 KiB.
_SHARED_BYTES, _LARGE_SHARED = 96 * 1024, 160 * 1024

# Of chunks in numbers of two bytes, by the size of a head: block_m, block_n, warps, stages, and the most
# registers of a thread, None for any: with 128, two programs of 8 warps share a multiprocessor. With less
# shared memory than that takes there are fewer stages, then smaller tiles.
_CHUNKS: dict[int, tuple[int, int, int, int, int | None]] = {
    64: (128, 64, 8, 3, None),
    128: (128, 32, 8, 3, 128),
    256: (128, 32, 8, 2, None),
    512: (64, 16, 8, 2, None),
}


@dataclass(frozen=True, slots=True)
class ChunkLaunch:
    """Tiles of ``attend_chunk``; ``queries`` of a tile, times the group's heads, are at most ``block_m``."""

    queries: int
    block_m: int
    block_n: int
    warps: int
    stages: int
    registers: int | None


@dataclass(frozen=True, slots=True)
class FewRowsLaunch:
    """Tiles of ``few_rows``.

    Attributes:
        block_n: results of a program; where they are gated it walks twice as many rows of the matrix.
        block_k: columns at a time.
    """

    block_n: int
    block_k: int
    warps: int


# Enough programs for two on each multiprocessor of a large GPU.
_FEW_ROWS_PROGRAMS = 256


@dataclass(frozen=True, slots=True)
class AttentionLaunch:
    """Tiles of ``attend``.

    Attributes:
        queries: of a tile, times the group's heads: at most ``block_m`` rows.
        span: positions that a program walks at least, where a sequence is split; ``spans`` are the most
        parts.
    """

    queries: int
    block_m: int
    block_n: int
    span: int
    spans: int
    warps: int
    stages: int


def power_of_two(count: int) -> int:
    """The smallest power of two that is at least ``count``."""
    return 1 << (count - 1).bit_length()


def attention_launch(
    rows: int,
    group: int,
    head_dim: int,
    itemsize: int,
    shared_bytes: int = _SHARED_BYTES,
    span: int = 256,
    spans: int = 64,
) -> AttentionLaunch:
    """The launch for sequences of at most ``rows`` queries.

    A third of the shared memory is for a tile's queries, and one for each of two stages of keys and values.

    Args:
        group: query heads that share a KV head.
        head_dim: the larger of those of keys and values.
        itemsize: bytes of a number.
    """
    share = shared_bytes // 3
    numbers = power_of_two(max(head_dim, 16))
    width = numbers * itemsize
    block_n = max(16, min(64, _floor_power(share // (2 * width))))
    most = max(16, min(128, _floor_power(share // width)))
    if itemsize > 2:
        # Without tensor cores a product's tiles lie in registers.
        block_n, most = max(16, min(32, 2048 // numbers)), max(16, min(32, 4096 // numbers))
    most = max(most, power_of_two(group))
    block_m = min(most, max(16, power_of_two(min(rows, most) * group)))
    # More bytes under way for decodes, which wait for memory.
    stages = 3 if block_m == 16 and shared_bytes >= _LARGE_SHARED else 2
    warps = 8 if block_m >= 128 or block_m * numbers > 8192 else 4
    return AttentionLaunch(max(1, block_m // group), block_m, block_n, span, spans, warps, stages)


def chunk_launch(group: int, head_dim: int, itemsize: int, shared_bytes: int = _SHARED_BYTES) -> ChunkLaunch:
    """The launch for chunks, whatever their length: a row is in the same tile then in any company.

    Args:
        group: query heads that share a KV head.
        head_dim: the larger of those of keys and values.
        itemsize: bytes of a number.
    """
    numbers = power_of_two(max(head_dim, 16))
    if itemsize > 2:
        # Without tensor cores a product's tiles lie in registers.
        block_m, block_n = max(16, min(32, 4096 // numbers)), max(16, min(32, 2048 // numbers))
        warps, stages, registers = 4, 2, None
    else:
        block_m, block_n, warps, stages, registers = _CHUNKS[max(numbers, 64)]
    block_m = max(block_m, power_of_two(group))
    while (block_m + 2 * stages * block_n) * numbers * itemsize > shared_bytes:
        if stages > 2:
            stages -= 1
        elif block_n > 16:
            block_n //= 2
        elif block_m > max(16, power_of_two(group)):
            block_m //= 2
        else:
            break
    return ChunkLaunch(max(1, block_m // group), block_m, block_n, warps, stages, registers)


def few_rows_launch(features: int, columns: int, gated: bool) -> FewRowsLaunch:
    """The launch for a matrix, the same for any number of rows: so is the order of a row's sums.

    On an H100 it is within a few percent of the best of a dozen for the matrices of Qwen3's 0.6 B and 14 B.

    Args:
        features: half the matrix's rows where they are gated.
    """
    block_n = max(1, min(2 if gated else 8, _floor_power(features // _FEW_ROWS_PROGRAMS)))
    block_k = max(256, min(1024, power_of_two(columns)))
    return FewRowsLaunch(block_n, block_k, block_k // 256)


def row_warps(block: int) -> int:
    """For one program per row of ``block`` numbers."""
    return 4 if block <= 2048 else 8 if block <= 8192 else 16


def _floor_power(count: int) -> int:
    return 1 << max(count.bit_length() - 1, 0)
