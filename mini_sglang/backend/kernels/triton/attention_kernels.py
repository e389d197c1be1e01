"""Paged attention in Triton: one kernel for decodes and chunks, and the merge of what it split.

A program takes a tile of rows that share a KV head: some queries of one sequence times the heads of the
group, row r being query ``r // group`` and head ``r % group``, so that grouped heads read their keys once. It
walks a span of positions with a running softmax in float32. Positions are found through the page table one by
one, whatever the size of a page; those outside the sequence, the causal limit of the tile or its window are
never read.

Where a sequence's positions are split into spans depends on its own length alone, so a row's result does not
change with the rest of the batch or with the grid. Lengths are read from device memory, and a grid that is
larger than a step needs does nothing where there is nothing: both kernels can be captured in a CUDA graph and
replayed with other lengths.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(
    query_starts,
    seq_lens,
    sequence,
    tile,
    fewest,
    most,
    window,
    QUERIES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """First row, number of rows and first position of a tile's queries, its positions, length of a span."""
    row = tl.load(query_starts + sequence)
    count = tl.load(query_starts + sequence + 1) - row
    length = tl.load(seq_lens + sequence)
    first = tile * QUERIES
    here = tl.minimum(count - first, QUERIES)
    here = tl.where((count < fewest) | (count > most), 0, here)
    position = length - count + first
    lowest = position * 0
    if WINDOWED:
        lowest = tl.maximum(position - window + 1, 0) // BLOCK_N * BLOCK_N
    stop = position + here
    span = tl.maximum(tl.cdiv(tl.cdiv(stop - lowest, SPANS), BLOCK_N) * BLOCK_N, SPAN)
    return row + first, here, position, lowest, stop, span


@triton.jit
def _rows(
    m,
    row,
    here,
    kv_head,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Of each place ``m`` of a tile: whether there is something, its row of the batch, its head."""
    mine = (m // GROUP) < here
    if BLOCK_M > QUERIES * GROUP:
        mine = mine & (m < QUERIES * GROUP)
    return mine, (row + m // GROUP).to(tl.int64), kv_head * GROUP + m % GROUP


@triton.jit
def _finish(
    out,
    out_stride,
    rows,
    head,
    v,
    mine,
    kept,
    peak,
    total,
    acc,
    sinks,
    VALUE_DIM: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Store what the sums of whole rows come to, with a sink's share of the softmax."""
    if SINKS:
        sink = tl.load(sinks + head, mask=mine, other=0.0).to(tl.float32) * 1.4426950408889634
        higher = tl.maximum(peak, sink)
        acc = acc * tl.exp2(peak - higher)[:, None]
        total = total * tl.exp2(peak - higher) + tl.exp2(sink - higher)
    result = acc / tl.where(mine, total, 1.0)[:, None]
    place = out + rows[:, None] * out_stride + head[:, None] * VALUE_DIM + v[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=kept)


# They change from step to step, and each value that is 1 or divides by 16 would be compiled anew.
@triton.jit(do_not_specialize=["first_sequence", "fewest", "most", "splits", "window"])
def attend(
    query,
    keys,
    values,
    out,
    partial_out,
    partial_peak,
    partial_sum,
    sinks,
    page_table,
    query_starts,
    seq_lens,
    first_sequence,
    fewest,
    most,
    table_stride,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    out_stride,
    heads,
    splits,
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
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid ``(tiles * splits, kv_heads, sequences)``; sequences of fewer rows than ``fewest``, or more than
    ``most``, are left to another launch.

    ``scale`` carries log2(e), so that powers are of 2; with SOFTCAP it does not, ``softcap`` is the cap. With
    SPLIT the unnormalised sums go to ``partial_out`` ``[T, heads, splits, VALUE_DIM]``, their peaks and
    weights beside it; else the result to ``out``. WIDE is for the interpreter, which multiplies bfloat16 as
    if its bits were integers. With DEPENDENT the kernel may start while the one before it runs, and lets the
    next one start.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sequence = first_sequence + tl.program_id(2)
    kv_head = tl.program_id(1)
    tile = tl.program_id(0) // splits
    part = tl.program_id(0) % splits
    row, here, position, lowest, stop, span = _tile(
        query_starts, seq_lens, sequence, tile, fewest, most, window, QUERIES, BLOCK_N, SPAN, SPANS, WINDOWED
    )
    begin = lowest
    if SPLIT:
        begin = lowest + part * span
        stop = tl.minimum(stop, begin + span)
    if (here <= 0) | (begin >= stop):
        return

    m = tl.arange(0, BLOCK_M)
    mine, rows, head = _rows(m, row, here, kv_head, GROUP, QUERIES, BLOCK_M)
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
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE_BLOCK], tl.float32)
    table = page_table + sequence.to(tl.int64) * table_stride
    for start in range(begin, stop, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < stop
        if WINDOWED:
            inside = inside & (n > position - window)
        page = tl.load(table + n // PAGE, mask=inside, other=0)
        slot = page.to(tl.int64) * PAGE + n % PAGE
        key = tl.load(
            keys + slot[None, :] * key_stride + kv_head * key_head_stride + k[:, None],
            mask=inside[None, :] & (k < KEY_DIM)[:, None],
            other=0.0,
        )
        if WIDE:
            key = key.to(tl.float32)
        score = tl.dot(q, key.to(q.dtype), input_precision="ieee") * scale
        if SOFTCAP:
            # tanh by powers of e; the product with log2(e) comes after it.
            twice = tl.exp(-2.0 * tl.abs(score) / softcap)
            bent = softcap * (1.0 - twice) / (1.0 + twice) * 1.4426950408889634
            score = tl.where(score < 0, -bent, bent)
        seen = inside[None, :] & (n[None, :] <= at[:, None]) & mine[:, None]
        if WINDOWED:
            seen = seen & (n[None, :] > at[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        # A row that has seen nothing yet has no peak to subtract.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(score - base[:, None])
        shrink = tl.exp2(peak - base)
        value = tl.load(
            values + slot[:, None] * value_stride + kv_head * value_head_stride + v[None, :],
            mask=inside[:, None] & (v < VALUE_DIM)[None, :],
            other=0.0,
        )
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        if WIDE:
            weight = weight.to(value.dtype).to(tl.float32)
            value = value.to(tl.float32)
        acc += tl.dot(weight.to(q.dtype), value.to(q.dtype), input_precision="ieee")
        peak = higher

    kept = mine[:, None] & (v < VALUE_DIM)[None, :]
    if SPLIT:
        place = (rows * heads + head) * splits + part
        tl.store(partial_peak + place, peak, mask=mine)
        tl.store(partial_sum + place, total, mask=mine)
        tl.store(partial_out + place[:, None] * VALUE_DIM + v[None, :], acc, mask=kept)
    else:
        _finish(out, out_stride, rows, head, v, mine, kept, peak, total, acc, sinks, VALUE_DIM, SINKS)


@triton.jit(do_not_specialize=["first_sequence", "fewest", "most", "splits", "window"])
def merge(
    partial_out,
    partial_peak,
    partial_sum,
    sinks,
    out,
    query_starts,
    seq_lens,
    first_sequence,
    fewest,
    most,
    out_stride,
    heads,
    splits,
    window,
    GROUP: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr,
    SPANS: tl.constexpr,
    WINDOWED: tl.constexpr,
    SINKS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid ``(tiles, kv_heads, sequences)``: add up the spans of each tile, from the first to the last."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    sequence = first_sequence + tl.program_id(2)
    kv_head = tl.program_id(1)
    tile = tl.program_id(0)
    row, here, _position, lowest, stop, span = _tile(
        query_starts, seq_lens, sequence, tile, fewest, most, window, QUERIES, BLOCK_N, SPAN, SPANS, WINDOWED
    )
    if (here <= 0) | (stop <= 0):
        return
    m = tl.arange(0, BLOCK_M)
    mine, rows, head = _rows(m, row, here, kv_head, GROUP, QUERIES, BLOCK_M)
    v = tl.arange(0, VALUE_BLOCK)
    kept = mine[:, None] & (v < VALUE_DIM)[None, :]
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, VALUE_BLOCK], tl.float32)
    for part in range(tl.cdiv(stop - lowest, span)):
        place = (rows * heads + head) * splits + part
        other = tl.load(partial_peak + place, mask=mine, other=float("-inf"))
        higher = tl.maximum(peak, other)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(peak - base)
        grow = tl.exp2(other - base)
        total = total * shrink + tl.load(partial_sum + place, mask=mine, other=0.0) * grow
        more = tl.load(partial_out + place[:, None] * VALUE_DIM + v[None, :], mask=kept, other=0.0)
        acc = acc * shrink[:, None] + more * grow[:, None]
        peak = higher
    _finish(out, out_stride, rows, head, v, mine, kept, peak, total, acc, sinks, VALUE_DIM, SINKS)
