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
def _whole(codes, dtype: tl.constexpr, BITS: tl.constexpr, OFFSET: tl.constexpr):
    """``codes - OFFSET`` in a float type."""
    if BITS < 8 and dtype == tl.bfloat16:
        # Under the exponent of 128 a code is bfloat16's last bits: cheaper than a conversion.
        whole = (codes.to(tl.int16) | 0x4300).to(dtype, bitcast=True) - (128.0 + OFFSET)
    elif BITS < 8 and dtype == tl.float16:
        whole = (codes.to(tl.int16) | 0x6400).to(dtype, bitcast=True) - (1024.0 + OFFSET)
    else:
        whole = (codes.to(tl.int16) - OFFSET).to(dtype)
    return whole


@triton.jit
def _tiles(place, inside, BITS: tl.constexpr):
    """A unit's bytes as tiles of 32 or 16 columns; ``place`` is the first tile's."""
    first = tl.load(place, mask=inside, other=0)
    if BITS == 8:
        tiles = (first, tl.load(place + 32, mask=inside, other=0))
    elif BITS == 6:
        second = tl.load(place + 16, mask=inside, other=0)
        tiles = (first, second, tl.load(place + 32, mask=inside, other=0))
    else:
        tiles = (first,)
    return tiles


@triton.jit
def _codes(tiles, step: tl.constexpr, BITS: tl.constexpr):
    """The codes of 32 or 16 columns of a unit, from what ``_tiles`` gave for it."""
    if BITS == 8:
        codes = tiles[step]
    elif BITS == 6:
        four = tiles[step // 2] & 15 if step % 2 == 0 else tiles[step // 2] >> 4
        codes = four | (tiles[2] >> (2 * step) & 3) << 4
    else:
        codes = tiles[0] & 15 if step == 0 else tiles[0] >> 4
    return codes


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
    UNITS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Grid ``(tiles of rows, tiles of features, parts of the columns)``.

    With SPLIT ``out`` is float32 ``[parts, rows, features]`` for ``add_parts``, else the result. UNITS are
    walked at a time. WIDE is for the interpreter, which multiplies bfloat16 as if its bits were integers.
    """
    GROUPS: tl.constexpr = 64 // GROUP
    WIDTH: tl.constexpr = 16 if BITS == 6 else 32
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mine = m < rows
    row = m.to(tl.int64) * x_stride
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < features
    part = tl.program_id(2)
    first = part * units_of_part
    last = tl.minimum(first + units_of_part, units)
    line = codes + n.to(tl.int64)[None, :] * code_stride + tl.arange(0, WIDTH)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, last, UNITS):
        # All scales before the first product: what waits for them waits once.
        held = ()
        lows = ()
        for place in tl.static_range(UNITS * GROUPS):
            group = start * GROUPS + place
            there = inside & (group < last * GROUPS)
            held += (_scale(scales, supers, group, n, there, scale_stride, GROUP, NESTED),)
            if MINIMUM and not EXACT:
                lows += (_scale(minima, super_minima, group, n, there, scale_stride, GROUP, NESTED),)
        for offset in tl.static_range(UNITS):
            unit = start + offset
            here = inside & (unit < last)
            tiles = _tiles(line + unit * (8 * BITS), here[None, :], BITS)
            for step in tl.static_range(64 // WIDTH):
                k = unit * 64 + step * WIDTH + tl.arange(0, WIDTH)
                wanted = mine[:, None] & (k < columns)[None, :] & (unit < last)
                a = tl.load(x + row[:, None] + k[None, :], mask=wanted, other=0.0)
                found = _codes(tiles, step, BITS)
                if WIDE:
                    a = a.to(tl.float32)
                scale = held[(offset * 64 + step * WIDTH) // GROUP][None, :]
                if EXACT:
                    b = _whole(found, a.dtype, BITS, OFFSET)
                    acc += tl.dot(a, b, input_precision="ieee") * scale
                else:
                    numbers = (found.to(tl.int16) - OFFSET).to(tl.float32) * scale
                    if MINIMUM:
                        numbers += lows[(offset * 64 + step * WIDTH) // GROUP][None, :]
                    b = numbers.to(x.dtype.element_ty)
                    acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee")
    if EXACT and MINIMUM:
        # A group's minimum counts as often as the sum of its columns of x says; 16 groups at a time.
        stop = last * GROUPS
        for start in range(first * GROUPS, stop, 16):
            group = start + tl.arange(0, 16)
            k = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
            wanted = (group < stop)[:, None] & (k < columns)
            a = tl.load(
                x + row[:, None, None] + k[None, :, :],
                mask=mine[:, None, None] & wanted[None, :, :],
                other=0.0,
            )
            sums = tl.sum(a.to(tl.float32), 2)
            low = _scale(
                minima,
                super_minima,
                group[:, None],
                n[None, :],
                (group < stop)[:, None] & inside[None, :],
                scale_stride,
                GROUP,
                NESTED,
            )
            acc += tl.dot(sums, low, input_precision="ieee")
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
    WIDTH: tl.constexpr = 16 if BITS == 6 else 32
    inside = (r < count)[:, None]
    n = (first + r).to(tl.int64)[:, None]
    if CHOSEN:
        n = tl.load(ids + r, mask=r < count, other=0).to(tl.int64)[:, None]
    line = codes + n * code_stride + tl.arange(0, WIDTH)[None, :]
    target = out + r.to(tl.int64)[:, None] * columns
    for offset in tl.static_range(UNITS):
        unit = tl.program_id(1) * UNITS + offset
        here = inside & (unit * 64 < columns)
        tiles = _tiles(line + unit * (8 * BITS), here, BITS)
        for step in tl.static_range(64 // WIDTH):
            group = unit * (64 // GROUP) + step * WIDTH // GROUP
            scale = _scale(scales, supers, group, n, here, scale_stride, GROUP, NESTED)
            numbers = (_codes(tiles, step, BITS).to(tl.int16) - OFFSET).to(tl.float32) * scale
            if MINIMUM:
                numbers += _scale(minima, super_minima, group, n, here, scale_stride, GROUP, NESTED)
            k = unit * 64 + step * WIDTH + tl.arange(0, WIDTH)[None, :]
            tl.store(target + k, numbers.to(out.dtype.element_ty), mask=here & (k < columns))
