"""Paged attention in Triton for chunks: many rows of a sequence, each with all the keys before it.

A program takes a tile of queries times the heads of a group, as in ``attention_kernels``, and walks all their
positions in blocks that begin at multiples of BLOCK_N. Only those that reach past the tile's first query, or
out of the window of its last, are masked. So a row's sums are added up in one order, in whatever tile it lies
and wherever its chunk begins.

Nothing is loaded under a mask of positions: where the sequence ends within a block, its last position is read
again, which is no NaN as a page's free slots may be, and weighs nothing.
"""

import triton
import triton.language as tl

from mini_sglang.backend.kernels.triton.attention_kernels import _finish, _rows


@triton.jit
def _pages(table, start, n, stop, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pages of the positions ``n``, which are those from ``start`` on: one where a page has them all."""
    first = n
    if PAGE % BLOCK_N == 0:
        first = start
    return tl.load(table + tl.minimum(first, stop - 1) // PAGE)


@triton.jit
def _block(start, d, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[BLOCK_N, BLOCK_D]`` keys or values, which begin at ``start`` ``[BLOCK_N, 1]``."""
    if BLOCK_D == DIM:
        block = tl.load(start + d[None, :])
    else:
        block = tl.load(start + d[None, :], mask=(d < DIM)[None, :], other=0.0)
    return block


# As for ``attend``.
@triton.jit(do_not_specialize=["first_sequence", "sequences", "kv_heads", "fewest", "table_stride", "window"])
def attend_chunk(
    query,
    keys,
    values,
    out,
    sinks,
    page_table,
    query_starts,
    seq_lens,
    first_sequence,
    sequences,
    kv_heads,
    fewest,
    table_stride,
    query_stride,
    query_head_stride,
    slot_stride,
    key_head_stride,
    value_head_stride,
    out_stride,
    window,
    scale,
    softcap,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Grid ``(kv_heads * sequences * tiles,)``, tiles slowest; sequences of fewer rows than ``fewest`` are
    left to another launch. Arguments as of ``attend``, and ``scale`` is positive.
    """
    kv_head = tl.program_id(0) % kv_heads
    sequence = first_sequence + tl.program_id(0) // kv_heads % sequences
    row = tl.load(query_starts + sequence)
    count = tl.load(query_starts + sequence + 1) - row
    # The last queries have the most keys. They begin first, so that the grid ends with short programs.
    tile = tl.cdiv(count, QUERIES) - 1 - tl.program_id(0) // kv_heads // sequences
    if (tile < 0) | (count < fewest):
        return
    first = tile * QUERIES
    here = tl.minimum(count - first, QUERIES)
    position = tl.load(seq_lens + sequence) - count + first
    stop = position + here
    lowest = position * 0
    if WINDOWED:
        lowest = tl.maximum(position - window + 1, 0) // BLOCK_N * BLOCK_N

    m = tl.arange(0, BLOCK_M)
    mine, rows, head = _rows(m, row + first, here, kv_head, GROUP, QUERIES, BLOCK_M)
    at = position + m // GROUP
    k = tl.arange(0, KEY_BLOCK)
    v = tl.arange(0, VALUE_BLOCK)
    q = tl.load(
        query + rows[:, None] * query_stride + head[:, None] * query_head_stride + k[None, :],
        mask=mine[:, None] & (k < KEY_DIM)[None, :],
        other=0.0,
    )
    if WIDE:
        q = q.to(tl.float32)
    # In units of which ``unit`` are a power of two. Places without a row have a query of 0: no NaN.
    unit = scale
    if SOFTCAP:
        unit = 1.0
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE_BLOCK], tl.float32)
    keys += kv_head * key_head_stride
    values += kv_head * value_head_stride
    table = page_table + sequence.to(tl.int64) * table_stride
    n = tl.arange(0, BLOCK_N)
    page = _pages(table, lowest, lowest + n, stop, PAGE, BLOCK_N)
    for start in range(lowest, stop, BLOCK_N):
        slot = page.to(tl.int64) * PAGE + tl.minimum(start + n, stop - 1) % PAGE
        place = slot[:, None] * slot_stride
        # A block ahead: else the keys and values under way would wait for it.
        page = _pages(table, start + BLOCK_N, start + BLOCK_N + n, stop, PAGE, BLOCK_N)
        key = _block(keys + place, k, KEY_DIM, KEY_BLOCK)
        if WIDE:
            key = key.to(tl.float32)
        score = tl.dot(q, tl.trans(key), input_precision="ieee")
        if SOFTCAP:
            # tanh by powers of e; the product with log2(e) comes after it.
            score = score * scale
            twice = tl.exp(-2.0 * tl.abs(score) / softcap)
            bent = softcap * (1.0 - twice) / (1.0 + twice) * 1.4426950408889634
            score = tl.where(score < 0, -bent, bent)
        partly = start + BLOCK_N > position + 1
        if WINDOWED:
            partly = partly | (start <= stop - 1 - window)
        if partly:
            seen = (start + n)[None, :] <= at[:, None]
            if WINDOWED:
                seen = seen & ((start + n)[None, :] > at[:, None] - window)
            score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        base = higher
        if WINDOWED:
            # A row that has seen nothing yet has no peak to subtract.
            base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score * unit - (base * unit)[:, None])
        shrink = tl.exp2((peak - base) * unit)
        value = _block(values + place, v, VALUE_DIM, VALUE_BLOCK)
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        if WIDE:
            weight = weight.to(value.dtype).to(tl.float32)
            value = value.to(tl.float32)
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision="ieee")
        peak = higher

    kept = mine[:, None] & (v < VALUE_DIM)[None, :]
    _finish(out, out_stride, rows, head, v, mine, kept, peak * unit, total, acc, sinks, VALUE_DIM, SINKS)
