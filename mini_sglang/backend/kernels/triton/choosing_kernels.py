"""Tokens from rows of logits, in Triton: exactly those of ``Sampler`` (``distribution.py`` says what weights
are).

Nothing depends on the values but what is computed: all of it can be captured in a CUDA graph. A row of
``table`` is for each row of logits: 1 over the temperature, 0 for greedy; the random number; the weight below
which min_p drops a token; where ``ids`` begin that this row's goes to.
"""

import triton
import triton.language as tl


@triton.jit
def _ordered(x):
    """Whole numbers in the order of ``x``: of equal zeros, and NaN the largest."""
    x = x.to(tl.float32) + 0.0
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _best(best, row, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr):
    """A row's largest logit, float64, and its index."""
    part = tl.arange(0, PARTS_BLOCK)
    lowest: tl.constexpr = -(2**63)
    packed = tl.max(tl.load(best + row * PARTS + part, mask=part < PARTS, other=lowest), 0)
    order = (packed >> 32).to(tl.int32)
    peak = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return peak.to(tl.float64), 0xFFFFFFFF - (packed & 0xFFFFFFFF)


@triton.jit
def _is_drawn(peak, scale):
    return (scale > 0.0) & (peak > -float("inf")) & (peak < float("inf"))


@triton.jit
def _weights(x, peak, scale, floor, UNIT: tl.constexpr):
    """``distribution.weights_of``, 0 for what min_p drops."""
    half: tl.constexpr = 4503599627370496.0
    weight = tl.exp((x.to(tl.float32).to(tl.float64) - peak) * scale) * UNIT
    # Of float64 beyond 2**52 all are whole: it rounds as torch does, halves to the even.
    weight = (weight + half) - half
    return tl.where(weight < floor, 0.0, weight)


@triton.jit
def find_best(
    logits,
    best,
    row_stride,
    VOCAB: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid ``(R, PARTS)``: the largest logit of a part and its lowest index, as one whole number."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * PART
    lane = tl.arange(0, BLOCK)
    lowest: tl.constexpr = -(2**31)
    top = tl.full((BLOCK,), lowest, tl.int32)
    at = first + lane
    for start in range(0, PART, BLOCK):
        column = first + start + lane
        x = tl.load(logits + row * row_stride + column, mask=column < VOCAB, other=-float("inf"))
        order = _ordered(x)
        # Not what is equal, nor what lies past the end: lower indices come first.
        better = order > top
        top = tl.where(better, order, top)
        at = tl.where(better, column, at)
    packed = (top.to(tl.int64) << 32) | (0xFFFFFFFF - at.to(tl.int64))
    tl.store(best + row * PARTS + tl.program_id(1), tl.max(packed, 0))


@triton.jit
def weigh_parts(
    logits,
    best,
    table,
    sums,
    row_stride,
    table_stride,
    VOCAB: tl.constexpr,
    UNIT: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid ``(R, PARTS)``: the sum of a part's weights, where the row's token is drawn."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(table + row)
    peak, _ = _best(best, row, PARTS, PARTS_BLOCK)
    if _is_drawn(peak, scale):
        floor = tl.load(table + 2 * table_stride + row)
        first = tl.program_id(1) * PART
        lane = tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, PART, BLOCK):
            column = first + start + lane
            x = tl.load(logits + row * row_stride + column, mask=column < VOCAB, other=-float("inf"))
            total += _weights(x, peak, scale, floor, UNIT)
        tl.store(sums + row * PARTS + tl.program_id(1), tl.sum(total, 0))


@triton.jit
def pick_tokens(
    logits,
    best,
    sums,
    table,
    ids,
    numbers,
    row_stride,
    table_stride,
    VOCAB: tl.constexpr,
    UNIT: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
):
    """Grid ``(R,)``: the token, and for the host the token and the row's largest logit."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(table + row)
    peak, token = _best(best, row, PARTS, PARTS_BLOCK)
    if _is_drawn(peak, scale):
        floor = tl.load(table + 2 * table_stride + row)
        part = tl.arange(0, PARTS_BLOCK)
        weights = tl.load(sums + row * PARTS + part, mask=part < PARTS, other=0.0)
        target = tl.floor(tl.load(table + table_stride + row) * tl.sum(weights, 0))
        chosen = tl.sum((tl.cumsum(weights, 0) <= target).to(tl.int32), 0)
        chosen = tl.minimum(chosen, PARTS - 1)
        target -= tl.sum(tl.where(part < chosen, weights, 0.0), 0)
        column = chosen * PART + tl.arange(0, PART)
        x = tl.load(logits + row * row_stride + column, mask=column < VOCAB, other=-float("inf"))
        up_to = tl.cumsum(_weights(x, peak, scale, floor, UNIT), 0)
        token = (chosen * PART + tl.sum((up_to <= target).to(tl.int32), 0)).to(tl.int64)
        token = tl.minimum(token, VOCAB - 1)
    place = tl.load(table + 3 * table_stride + row).to(tl.int64)
    tl.store(ids + place + row, token)
    tl.store(numbers + 2 * row, token.to(tl.float64))
    tl.store(numbers + 2 * row + 1, peak)


@triton.jit
def take_chosen(token_ids, ids, rows, BLOCK: tl.constexpr):
    """One program: each token id that is negative, ``-1 - i``, becomes ``ids[i]``."""
    row = tl.arange(0, BLOCK)
    token = tl.load(token_ids + row, mask=row < rows, other=0)
    chosen = tl.load(ids - 1 - token, mask=token < 0, other=0)
    tl.store(token_ids + row, chosen, mask=token < 0)
