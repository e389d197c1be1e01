"""What lies between the products, in Triton; rounds where ``models/operations.py``, its twin in torch,
rounds.

Nothing depends on a length but the grid: all of it can be captured in a CUDA graph.
"""

import triton
import triton.language as tl


@triton.jit
def add_and_norm(
    hidden,
    delta,
    weight,
    out,
    hidden_stride,
    delta_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    """One row per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    x = tl.load(hidden + row * hidden_stride + column, mask=inside, other=0.0)
    if ADD:
        more = tl.load(delta + row * delta_stride + column, mask=inside, other=0.0)
        x = (x.to(tl.float32) + more.to(tl.float32)).to(x.dtype)
        tl.store(hidden + row * hidden_stride + column, x, mask=inside)
    wide = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide, 0) / WIDTH + eps)
    normed = (wide * factor).to(x.dtype).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + column, (normed * w).to(x.dtype), mask=inside)


@triton.jit
def rotate_and_store(
    qkv,
    head_norm,
    rotation,
    keys,
    values,
    slots,
    row_stride,
    rotation_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    NORM: tl.constexpr,
    ROTATE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid ``(T, groups of BLOCK_HEADS heads)``; a row whose slot is negative writes no KV.

    With DEPENDENT the kernel may start while the one before it runs, and lets the next one start.

    The halves of a head are two tiles, so that rotating them against each other moves nothing between
    threads.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    d = tl.arange(0, HALF_BLOCK)
    inside = (head < HEADS + 2 * KV_HEADS)[:, None] & (d < HALF)[None, :]
    turned = (head < HEADS + KV_HEADS)[:, None] & (d < HALF)[None, :]
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = qkv + row * row_stride + head[:, None] * HEAD_DIM + d[None, :]
    one = tl.load(place, mask=inside, other=0.0)
    two = tl.load(place + HALF, mask=inside, other=0.0)
    if NORM:
        left, right = one.to(tl.float32), two.to(tl.float32)
        factor = tl.rsqrt((tl.sum(left * left, 1) + tl.sum(right * right, 1)) / HEAD_DIM + eps)[:, None]
        weights = head_norm + head[:, None] * HEAD_DIM + d[None, :]
        left = (left * factor).to(one.dtype).to(tl.float32)
        right = (right * factor).to(one.dtype).to(tl.float32)
        left = left * tl.load(weights, mask=turned, other=0.0).to(tl.float32)
        right = right * tl.load(weights + HALF, mask=turned, other=0.0).to(tl.float32)
        one = tl.where(turned, left.to(one.dtype), one)
        two = tl.where(turned, right.to(two.dtype), two)
    if ROTATE:
        turns = rotation + row * HEAD_DIM + d
        left, right = one.to(tl.float32), two.to(tl.float32)
        cos = tl.load(turns, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(turns + rotation_stride, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        first = (left * cos).to(one.dtype).to(tl.float32) + (right * sin).to(one.dtype).to(tl.float32)
        cos = tl.load(turns + HALF, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(turns + rotation_stride + HALF, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        second = (right * cos).to(one.dtype).to(tl.float32) + (left * sin).to(one.dtype).to(tl.float32)
        one = tl.where(turned, first.to(one.dtype), one)
        two = tl.where(turned, second.to(two.dtype), two)
    if NORM or ROTATE:
        tl.store(place, one, mask=turned)
        tl.store(place + HALF, two, mask=turned)
    slot = tl.load(slots + row)
    if slot >= 0:
        key_head, value_head = head - HEADS, head - HEADS - KV_HEADS
        is_key = ((key_head >= 0) & (key_head < KV_HEADS))[:, None] & (d < HALF)[None, :]
        is_value = ((value_head >= 0) & (value_head < KV_HEADS))[:, None] & (d < HALF)[None, :]
        key_place = keys + slot * key_stride + key_head[:, None] * key_head_stride + d[None, :]
        value_place = values + slot * value_stride + value_head[:, None] * value_head_stride + d[None, :]
        tl.store(key_place, one.to(keys.dtype.element_ty), mask=is_key)
        tl.store(key_place + HALF, two.to(keys.dtype.element_ty), mask=is_key)
        tl.store(value_place, one.to(values.dtype.element_ty), mask=is_value)
        tl.store(value_place + HALF, two.to(values.dtype.element_ty), mask=is_value)


@triton.jit
def silu_and_mul(gate_up, out, gate_up_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Grid ``(T, blocks of a row)``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    gate = tl.load(gate_up + row * gate_up_stride + column, mask=inside, other=0.0)
    up = tl.load(gate_up + row * gate_up_stride + WIDTH + column, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(out + row * WIDTH + column, (activated * up.to(tl.float32)).to(gate.dtype), mask=inside)


@triton.jit
def round_row(x, codes, scales, x_stride, smallest, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One row per program, to e4m3 and its scale; the twin is ``fp8.round_rows``."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    # What is no number is passed over here, and stays what it is below.
    scale = tl.maximum(tl.math.div_rn(tl.max(tl.abs(wide), 0), 448.0), smallest)
    tl.store(scales + row, scale)
    rounded = tl.math.div_rn(wide, scale).to(codes.dtype.element_ty)
    tl.store(codes + row * WIDTH + column, rounded, mask=inside)
