"""Products with repacked blocks (``block_layout.py``), and their numbers as such, in Triton.

A program walks its columns a unit of 64 at a time. With EXACT, for few rows, codes meet ``x`` as they are,
small whole numbers that every float type holds, and the group's scale comes to the sum in float32: the
weights' exact values are what is multiplied. Without, for many rows, a tile of weights is made dense in the
type of ``x``, as their twin in torch does.

A weight in float32 is exact whichever way the compiler fuses it: of code times scale no bit is lost.
"""

import triton
import triton.language as tl


@triton.jit
def _scale(own, shared, group, n, inside, stride, GROUP: tl.constexpr, NESTED: tl.constexpr):
    """One group's scales or minima of rows ``n`` of the matrix, float32 in the shape of ``n``."""
    value = tl.load(own + group * stride + n, mask=inside, other=0).to(tl.float32)
    if NESTED:
        value *= tl.load(shared + group * GROUP // 256 * stride + n, mask=inside, other=0).to(tl.float32)
    return value


@triton.jit
def _numbers(
    codes,
    group,
    scales,
    minima,
    supers,
    super_minima,
    n,
    inside,
    stride,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    MINIMUM: tl.constexpr,
    NESTED: tl.constexpr,
):
    """A group's weights in float32, in the shape of ``codes``; ``n`` and ``inside`` broadcast to it."""
    scale = _scale(scales, supers, group, n, inside, stride, GROUP, NESTED)
    numbers = (codes.to(tl.int16) - OFFSET).to(tl.float32) * scale
    if MINIMUM:
        numbers += _scale(minima, super_minima, group, n, inside, stride, GROUP, NESTED)
    return numbers


@triton.jit
def _product(
    acc,
    codes,
    group,
    x,
    row,
    mine,
    columns,
    scales,
    minima,
    supers,
    super_minima,
    n,
    inside,
    stride,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    MINIMUM: tl.constexpr,
    NESTED: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``acc`` and what a group's columns add to it; ``codes`` are ``[GROUP, BLOCK_N]``."""
    k = group * GROUP + tl.arange(0, GROUP)
    a = tl.load(x + row[:, None] + k[None, :], mask=mine[:, None] & (k < columns)[None, :], other=0.0)
    if EXACT:
        b = (codes.to(tl.int16) - OFFSET).to(a.dtype)
        if WIDE:
            a = a.to(tl.float32)
            b = (codes.to(tl.int16) - OFFSET).to(tl.float32)
        scale = _scale(scales, supers, group, n, inside, stride, GROUP, NESTED)
        acc += tl.dot(a, b, input_precision="ieee") * scale[None, :]
    else:
        numbers = _numbers(
            codes,
            group,
            scales,
            minima,
            supers,
            super_minima,
            n[None, :],
            inside[None, :],
            stride,
            OFFSET,
            GROUP,
            MINIMUM,
            NESTED,
        )
        b = numbers.to(a.dtype)
        if WIDE:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


# Each number of rows that is 1 or divides by 16 would be compiled anew.
@triton.jit(do_not_specialize=["rows"])
def multiply(
    x,
    codes,
    scales,
    minima,
    supers,
    super_minima,
    bias,
    out,
    rows,
    features,
    columns,
    units,
    units_of_part,
    x_stride,
    code_stride,
    scale_stride,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    MINIMUM: tl.constexpr,
    NESTED: tl.constexpr,
    BIAS: tl.constexpr,
    EXACT: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Grid ``(tiles of rows, tiles of features, parts of the columns)``.

    With SPLIT ``out`` is float32 ``[parts, rows, features]`` for ``add_parts``, else the result. WIDE is for
    the interpreter, which multiplies bfloat16 as if its bits were integers.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mine = m < rows
    row = m.to(tl.int64) * x_stride
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < features
    part = tl.program_id(2)
    first = part * units_of_part
    last = tl.minimum(first + units_of_part, units)
    line = codes + n.to(tl.int64)[None, :] * code_stride
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for unit in range(first, last):
        if BITS == 6:
            place = line + unit * 48 + tl.arange(0, 16)[:, None]
            left = tl.load(place, mask=inside[None, :], other=0)
            right = tl.load(place + 16, mask=inside[None, :], other=0)
            high = tl.load(place + 32, mask=inside[None, :], other=0)
        elif BITS == 4:
            place = line + unit * 32 + tl.arange(0, 32)[:, None]
            left = tl.load(place, mask=inside[None, :], other=0)
        for step in tl.static_range(64 // GROUP):
            if BITS == 6:
                four = left if step < 2 else right
                four = four & 15 if step % 2 == 0 else four >> 4
                part_codes = four | (high >> (2 * step) & 3) << 4
            elif BITS == 4:
                part_codes = left & 15 if step == 0 else left >> 4
            else:
                place = line + unit * 64 + step * GROUP + tl.arange(0, GROUP)[:, None]
                part_codes = tl.load(place, mask=inside[None, :], other=0)
            acc = _product(
                acc,
                part_codes,
                unit * (64 // GROUP) + step,
                x,
                row,
                mine,
                columns,
                scales,
                minima,
                supers,
                super_minima,
                n,
                inside,
                scale_stride,
                OFFSET,
                GROUP,
                MINIMUM,
                NESTED,
                EXACT,
                WIDE,
            )
    if EXACT and MINIMUM:
        # A group's minimum counts as often as the sum of its columns of x says; 16 groups at a time.
        stop = last * (64 // GROUP)
        for start in range(first * (64 // GROUP), stop, 16):
            group = start + tl.arange(0, 16)
            k = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            wanted = (group < stop)[:, None] & (k < columns)
            a = tl.load(
                x + row[:, None, None] + k[None, :, :],
                mask=mine[:, None, None] & wanted[None, :, :],
                other=0.0,
            )
            sums = tl.sum(a.to(tl.float32), 2)
            lows = _scale(
                minima,
                super_minima,
                group[:, None],
                n[None, :],
                (group < stop)[:, None] & inside[None, :],
                scale_stride,
                GROUP,
                NESTED,
            )
            acc += tl.dot(sums, lows, input_precision="ieee")
    kept = mine[:, None] & inside[None, :]
    if SPLIT:
        place = (part.to(tl.int64) * rows + m)[:, None] * features + n[None, :]
        tl.store(out + place, acc, mask=kept)
    else:
        if BIAS:
            acc += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
        place = m.to(tl.int64)[:, None] * features + n[None, :]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["rows"])
def add_parts(parts, bias, out, rows, features, count, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid ``(rows, blocks of features)``: add up the parts of each row, from the first to the last."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < features
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(count):
        total += tl.load(parts + (part * rows + row) * features + n, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * features + n, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first", "count"])
def unpack(
    ids,
    codes,
    scales,
    minima,
    supers,
    super_minima,
    out,
    first,
    count,
    columns,
    code_stride,
    scale_stride,
    BITS: tl.constexpr,
    OFFSET: tl.constexpr,
    GROUP: tl.constexpr,
    MINIMUM: tl.constexpr,
    NESTED: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Grid ``(tiles of rows, runs of UNITS units)``: rows of the matrix in the type of ``out``.

    They are ``count`` rows from ``first`` on, or with CHOSEN those that ``ids`` name.
    """
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (r < count)[:, None]
    n = (first + r).to(tl.int64)[:, None]
    if CHOSEN:
        n = tl.load(ids + r, mask=r < count, other=0).to(tl.int64)[:, None]
    line = codes + n * code_stride
    target = out + r.to(tl.int64)[:, None] * columns
    for offset in tl.static_range(UNITS):
        unit = tl.program_id(1) * UNITS + offset
        here = inside & (unit * 64 < columns)
        if BITS == 6:
            place = line + unit * 48 + tl.arange(0, 16)[None, :]
            left = tl.load(place, mask=here, other=0)
            right = tl.load(place + 16, mask=here, other=0)
            high = tl.load(place + 32, mask=here, other=0)
        elif BITS == 4:
            place = line + unit * 32 + tl.arange(0, 32)[None, :]
            left = tl.load(place, mask=here, other=0)
        for step in tl.static_range(64 // GROUP):
            if BITS == 6:
                four = left if step < 2 else right
                four = four & 15 if step % 2 == 0 else four >> 4
                part_codes = four | (high >> (2 * step) & 3) << 4
            elif BITS == 4:
                part_codes = left & 15 if step == 0 else left >> 4
            else:
                place = line + unit * 64 + step * GROUP + tl.arange(0, GROUP)[None, :]
                part_codes = tl.load(place, mask=here, other=0)
            group = unit * (64 // GROUP) + step
            numbers = _numbers(
                part_codes,
                group,
                scales,
                minima,
                supers,
                super_minima,
                n,
                here,
                scale_stride,
                OFFSET,
                GROUP,
                MINIMUM,
                NESTED,
            )
            k = group * GROUP + tl.arange(0, GROUP)[None, :]
            tl.store(target + k, numbers.to(out.dtype.element_ty), mask=here & (k < columns))
