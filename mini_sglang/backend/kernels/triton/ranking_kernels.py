"""Draws under top_k and top_p in Triton, exactly those of ``Sampler``: the few largest logits, ranked.

A row's logits are divided into parts. Of the parts' largest the n-th is a threshold that at least n logits
reach; those that reach it, a few more, are gathered and sorted, equal ones by ascending id, so that the order
in which they were gathered cannot show. They begin the row's ranking, and where a filter ends within them
they are all that there is to draw from.
"""

import triton
import triton.language as tl

from mini_sglang.backend.kernels.triton.choosing_kernels import _ordered, _weights


@triton.jit
def find_peaks(
    logits,
    peaks,
    row_stride,
    VOCAB: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    HERE: tl.constexpr,
):
    """Grid ``(R, ceil(PARTS / HERE))``: the largest of each of ``HERE`` parts, as a whole number."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) * HERE + tl.arange(0, HERE)
    column = part[:, None] * PART + tl.arange(0, PART)[None, :]
    inside = column < VOCAB
    lowest: tl.constexpr = -(2**31)
    order = _ordered(tl.load(logits + row * row_stride + column, mask=inside, other=-float("inf")))
    order = tl.where(inside, order, lowest)
    tl.store(peaks + row * PARTS + part, tl.max(order, 1), mask=part < PARTS)


@triton.jit
def find_thresholds(
    peaks,
    thresholds,
    counts,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """Grid ``(R,)``: the ``NUMBER``-th largest of a row's peaks; its count of logits begins at 0."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS_BLOCK)
    lowest: tl.constexpr = -(2**31)
    order = tl.sort(tl.load(peaks + row * PARTS + part, mask=part < PARTS, other=lowest), descending=True)
    tl.store(thresholds + row, tl.max(tl.where(part == NUMBER - 1, order, lowest), 0))
    tl.store(counts + row, 0)


@triton.jit
def gather_largest(
    logits,
    thresholds,
    counts,
    gathered,
    columns,
    sums,
    row_stride,
    column_stride,
    VOCAB: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Grid ``(R, BLOCKS)``: value and id of the logits that reach the threshold, in any order; where there is
    no top_k the sum of a block's weights too."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < VOCAB
    x = tl.load(logits + row * row_stride + column, mask=inside, other=-float("inf")).to(tl.float32)
    if tl.load(columns + 3 * column_stride + row) == 0.0:
        peak, scale = tl.load(columns + row), tl.load(columns + column_stride + row)
        tl.store(sums + row * BLOCKS + tl.program_id(1), tl.sum(_weights(x, peak, scale, 0.0, UNIT), 0))
    order = _ordered(x)
    wanted = inside & (order >= tl.load(thresholds + row))
    before = tl.cumsum(wanted.to(tl.int32), 0)
    found = tl.max(before, 0)
    if found > 0:
        place = tl.atomic_add(counts + row, found) + before - 1
        packed = (order.to(tl.int64) << 32) | (0xFFFFFFFF - column.to(tl.int64))
        tl.store(gathered + row * ROOM + place, packed, mask=wanted & (place < ROOM))


@triton.jit
def pick_ranked(
    gathered,
    counts,
    columns,
    sums,
    ids,
    enough,
    column_stride,
    VOCAB: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCKS: tl.constexpr,
    SUMS: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Grid ``(R,)``: the token, and whether the gathered logits were enough to know it.

    ``columns`` has for each row the peak, 1 over the temperature, the random number, top_k (0 for none),
    top_p, and the weight below which min_p drops a token.
    """
    row = tl.program_id(0).to(tl.int64)
    peak = tl.load(columns + row)
    scale = tl.load(columns + column_stride + row)
    uniform = tl.load(columns + 2 * column_stride + row)
    top_k = tl.load(columns + 3 * column_stride + row).to(tl.int32)
    top_p = tl.load(columns + 4 * column_stride + row)
    floor = tl.load(columns + 5 * column_stride + row)
    block = tl.arange(0, SUMS)
    total = tl.sum(tl.load(sums + row * BLOCKS + block, mask=block < BLOCKS, other=0.0), 0)
    count = tl.load(counts + row)
    rank = tl.arange(0, ROOM)
    there = rank < count
    lowest: tl.constexpr = -(2**63)
    packed = tl.sort(tl.load(gathered + row * ROOM + rank, mask=there, other=lowest), descending=True)
    order = (packed >> 32).to(tl.int32)
    x = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    weight = tl.where(there, _weights(tl.where(there, x, 0.0), peak, scale, 0.0, UNIT), 0.0)
    # Behind one of no weight there are no others.
    last = rank == count - 1
    complete = (count == VOCAB) | (tl.sum(tl.where(last, weight, 0.0), 0) == 0.0)
    kept = weight
    if top_k > 0:
        smallest: tl.constexpr = -(2**31)
        kth = tl.max(tl.where(rank == top_k - 1, order, smallest), 0)
        kept = tl.where(order >= kth, kept, 0.0)
        total = tl.sum(kept, 0)
        complete = complete | (top_k <= count)
    up_to = tl.cumsum(kept, 0)
    kept = tl.where(up_to - kept >= top_p * total, 0.0, kept)
    kept = tl.where(weight < floor, 0.0, kept)
    if top_k == 0:
        # Weights descend: behind one that a filter drops all are dropped.
        complete = complete | (tl.sum(tl.where(last, kept, 0.0), 0) == 0.0)
    # Of more than there is room for nobody knows which are here.
    complete = complete & (count <= ROOM)
    up_to = tl.cumsum(kept, 0)
    target = tl.floor(uniform * tl.sum(kept, 0))
    place = tl.sum((there & (up_to <= target)).to(tl.int32), 0)
    chosen = tl.sum(tl.where(rank == place, 0xFFFFFFFF - (packed & 0xFFFFFFFF), 0), 0)
    chosen = tl.minimum(tl.maximum(chosen, 0), VOCAB - 1)
    tl.store(ids + row, chosen)
    tl.store(enough + row, complete.to(enough.dtype.element_ty))
