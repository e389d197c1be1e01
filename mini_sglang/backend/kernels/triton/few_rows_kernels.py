"""Products of few rows with a dense matrix, and what lies before and after them, in Triton.

Such a product waits for the matrix. So a program takes a few of its rows, walks all their columns with loads
that are as wide as they can be, the next tile under way while it works on one, and multiplies and adds in
float32 without tensor cores. What it rounds is what ``elementwise_kernels.py`` and torch round between the
products. A row of ``x`` is added up in one order, whatever the number of rows.
"""

import triton
import triton.language as tl


@triton.jit
def _sums(tile, numbers, LANES: tl.constexpr):
    """Products of a tile ``[N, K]`` with ``[1, K]``, added up in runs of LANES columns: ``[N, K // LANES]``.

    A run is what a thread loads at once, so that nothing passes between threads.
    """
    products = tile.to(tl.float32) * numbers
    return tl.sum(tl.reshape(products, [tile.shape[0], tile.shape[1] // LANES, LANES]), 2)


@triton.jit
def _finished(sums, bias, n, inside, BIAS: tl.constexpr, dtype: tl.constexpr):
    """A product's results, rounded."""
    total = tl.sum(sums, 1)
    if BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    return total.to(dtype)


# Each number of rows that is 1 or divides by 16 would be compiled anew.
@triton.jit(do_not_specialize=["rows"])
def few_rows(
    x,
    norm,
    weight,
    bias,
    residual,
    out,
    rows,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    FEATURES: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LANES: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid ``(tiles of results,)``: FEATURES results for each of at most ROWS rows of COLUMNS numbers.

    With NORM the RMSNorm of ``x`` is what is multiplied, WIDTH being a power of two that holds a row. With
    GATED the matrix has twice FEATURES rows, and results are SiLU of the first half's products times the
    second's. With ADD products are added to ``residual``, which may be ``out``: a program reads of it what it
    writes. With DEPENDENT the kernel may start while the one before it runs; weights alone are read before
    that has ended.
    """
    dtype: tl.constexpr = x.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)[None, :]
    inside = n < FEATURES
    there = inside[:, None]
    place = weight + n.to(tl.int64)[:, None] * COLUMNS + k
    after = place + FEATURES * COLUMNS
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.load(place, mask=there & (k < COLUMNS), other=0.0, eviction_policy="evict_first")
    second = tile
    if GATED:
        second = tl.load(after, mask=there & (k < COLUMNS), other=0.0, eviction_policy="evict_first")
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    factors = ()
    sums = ()
    gates = ()
    for r in tl.static_range(ROWS):
        factor = 1.0
        if NORM:
            column = tl.arange(0, WIDTH)
            row = x + tl.minimum(r, rows - 1).to(tl.int64) * x_stride
            wide = tl.load(row + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
            factor = tl.rsqrt(tl.sum(wide * wide, 0) / COLUMNS + eps)
        factors += (factor,)
        sums += (tl.zeros([BLOCK_N, BLOCK_K // LANES], tl.float32),)
        gates += (tl.zeros([BLOCK_N, BLOCK_K // LANES], tl.float32),)
    for start in range(0, COLUMNS, BLOCK_K):
        # Loads of the next tile are under way while this one is multiplied.
        wanted = there & (k + (start + BLOCK_K) < COLUMNS)
        place += BLOCK_K
        next_tile = tl.load(place, mask=wanted, other=0.0, eviction_policy="evict_first")
        next_second = next_tile
        if GATED:
            after += BLOCK_K
            next_second = tl.load(after, mask=wanted, other=0.0, eviction_policy="evict_first")
        here = start + k < COLUMNS
        new_sums = ()
        new_gates = ()
        for r in tl.static_range(ROWS):
            row = x + tl.minimum(r, rows - 1).to(tl.int64) * x_stride
            numbers = tl.load(row + start + k, mask=here, other=0.0).to(tl.float32)
            if NORM:
                scale = tl.load(norm + start + k, mask=here, other=0.0).to(tl.float32)
                numbers = (numbers * factors[r]).to(dtype).to(tl.float32)
                numbers = (numbers * scale).to(dtype).to(tl.float32)
            new_sums += (sums[r] + _sums(tile, numbers, LANES),)
            if GATED:
                new_gates += (gates[r] + _sums(second, numbers, LANES),)
            else:
                new_gates += (gates[r],)
        sums = new_sums
        gates = new_gates
        tile = next_tile
        second = next_second
    for r in tl.static_range(ROWS):
        mine = inside & (r < rows)
        result = _finished(sums[r], bias, n, inside, BIAS, dtype)
        if GATED:
            wide = result.to(tl.float32)
            activated = (wide / (1.0 + tl.exp(-wide))).to(dtype).to(tl.float32)
            up = _finished(gates[r], bias + FEATURES, n, inside, BIAS, dtype)
            result = (activated * up.to(tl.float32)).to(dtype)
        if ADD:
            before = tl.load(residual + r * residual_stride + n, mask=mine, other=0.0)
            result = (before.to(tl.float32) + result.to(tl.float32)).to(dtype)
        tl.store(out + r * out_stride + n, result, mask=mine)
