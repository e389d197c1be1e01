// x W^T for dense W, interleaved, in float32, float16 or bfloat16; added up in float32, column after column.

#pragma once

#include "vectors.h"

namespace {

// COLUMNS at a time: the numbers of LANES rows.
struct Float32 {
    static constexpr int FORMAT = F32, COLUMNS = 1;
    static void load_columns(const uint8_t* p, Floats* w) { w[0] = load<Floats>(p); }
};
struct Float16 {
    static constexpr int FORMAT = F16, COLUMNS = 1;
    static void load_columns(const uint8_t* p, Floats* w) { w[0] = halves(p); }
};
struct BFloat16 {
    static constexpr int FORMAT = BF16, COLUMNS = 2;
    static void load_columns(const uint8_t* p, Floats* w) {
        const Ints both = load<Ints>(p);
        w[0] = (Floats)(both << 16);
        w[1] = (Floats)(both & (int32_t)0xffff0000);
    }
};

template <class N>
void dense_rows(const Embed& job, int64_t first, int64_t last) {
    constexpr int VECTOR = (N::FORMAT == F32 ? 4 : 2) * N::COLUMNS * LANES;
    for (int64_t row = first; row < last; row++) {
        const int64_t id = job.ids[row];
        const int lane = id % GROUP % LANES, half = id % GROUP / LANES;
        const uint8_t* w = (const uint8_t*)job.weight + id / GROUP * group_bytes(N::FORMAT, job.k);
        for (int64_t c = 0; c < job.k; c += N::COLUMNS, w += HALVES * VECTOR) {
            Floats columns[N::COLUMNS];
            N::load_columns(w + half * VECTOR, columns);
            for (int i = 0; i < N::COLUMNS && c + i < job.k; i++) job.out[row * job.k + c + i] = columns[i][lane];
        }
    }
}

// So many rows of x, and groups, whose sums fit in the registers.
enum { TALL = LANES == 16 ? 8 : 6, WIDE = LANES == 16 ? 3 : 1 };
// Columns after which a tile fetches what is aside: inside the innermost loop it would take its registers.
enum { STRETCH = 64 };

template <int ROWS, int GROUPS>
struct Sums {
    Floats at[ROWS][GROUPS][HALVES] = {};

    // A bias that is y itself is a row's own.
    void write(const float* bias, float* y, int64_t stride, int64_t valid) const {
        const int64_t bias_stride = bias == y ? stride : 0;
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int g = 0; g < GROUPS; g++) {
                const int64_t column = g * GROUP;
                write_group(at[r][g], bias ? bias + r * bias_stride + column : nullptr, y + r * stride + column,
                            valid - column);
            }
    }
};

template <class N, int ROWS, int GROUPS, bool FETCHES>
void dense_tile(const uint8_t* w, int64_t bytes, int64_t k, const float* x, const float* bias, float* y,
                int64_t stride, int64_t valid, Ahead ahead) {
    constexpr int STEP = N::COLUMNS, VECTOR = (N::FORMAT == F32 ? 4 : 2) * STEP * LANES;
    Sums<ROWS, GROUPS> sums;
    const bool near = ROWS == TALL || !ahead.fetching.far;  // see Fetching::NEAR
    auto add = [&](const uint8_t* at, int64_t column, auto columns) {
        Floats weights[GROUPS][HALVES][STEP];
        UNROLL for (int g = 0; g < GROUPS; g++)
            UNROLL for (int h = 0; h < HALVES; h++) N::load_columns(at + g * bytes + h * VECTOR, weights[g][h]);
        UNROLL for (int c = 0; c < columns.value; c++)
            UNROLL for (int r = 0; r < ROWS; r++) {
                const Floats part = all(x[r * k + column + c]);
                UNROLL for (int g = 0; g < GROUPS; g++)
                    UNROLL for (int h = 0; h < HALVES; h++)
                        sums.at[r][g][h] = fused(weights[g][h][c], part, sums.at[r][g][h]);
            }
    };
    struct Step { enum { value = STEP }; };
    struct One { enum { value = 1 }; };
    int64_t column = 0;
    while (column + STEP <= k) {
        const int64_t stop = column + STRETCH < k ? column + STRETCH : k;
        if (ROWS == TALL && ahead.fetching.aside) ahead.fetching.aside->fetch(ROWS * GROUPS * GROUP * STRETCH);
        for (; column + STEP <= stop; column += STEP, w += HALVES * VECTOR) {
#if defined(__AVX2__)
            UNROLL for (int g = 0; near && g < GROUPS; g++) __builtin_prefetch(w + g * bytes + Fetching::NEAR);
            if (FETCHES) ahead.fetch<GROUPS>(w, bytes, HALVES * VECTOR);
#endif
            add(w, column, Step{});
        }
    }
    if (column < k) add(w, column, One{});
    sums.write(bias, y, stride, valid);
}

#if defined(__AVX512BF16__)

// x in bfloat16 too, [rows, k + k % 2]: exact products of two columns at a time.
template <int ROWS, int GROUPS, bool FETCHES>
void bfloat_tile(const uint8_t* w, int64_t bytes, int64_t k, const uint16_t* x, const float* bias, float* y,
                 int64_t stride, int64_t valid, Ahead ahead) {
    Sums<ROWS, GROUPS> sums;
    const bool near = ROWS == TALL || !ahead.fetching.far;  // see Fetching::NEAR
    for (int64_t column = 0; column < k;) {
        const int64_t stop = column + STRETCH < k ? column + STRETCH : k;
        if (ROWS == TALL && ahead.fetching.aside) ahead.fetching.aside->fetch(ROWS * GROUPS * GROUP * STRETCH);
        for (; column < stop; column += 2, w += 64) {
            UNROLL for (int g = 0; near && g < GROUPS; g++) __builtin_prefetch(w + g * bytes + Fetching::NEAR);
            if (FETCHES) ahead.fetch<GROUPS>(w, bytes, 64);
            __m512bh weights[GROUPS];
            UNROLL for (int g = 0; g < GROUPS; g++) weights[g] = (__m512bh)_mm512_loadu_si512(w + g * bytes);
            UNROLL for (int r = 0; r < ROWS; r++) {
                const __m512bh part = (__m512bh)_mm512_set1_epi32(load<int>(x + r * k + column));
                UNROLL for (int g = 0; g < GROUPS; g++)
                    sums.at[r][g][0] = (Floats)_mm512_dpbf16_ps((__m512)sums.at[r][g][0], weights[g], part);
            }
        }
    }
    sums.write(bias, y, stride, valid);
}

void to_bfloats(const float* x, int64_t first, int64_t last, int64_t k, uint16_t* out) {
    const int64_t width = k + k % 2, whole = k / LANES * LANES;
    for (int64_t row = first; row < last; row++) {
        const float* from = x + row * k;
        uint16_t* to = out + row * width;
        for (int64_t i = 0; i < whole; i += LANES) store_factors(to + i, load<Floats>(from + i));
        if (whole == k) continue;
        float rest[LANES] = {};
        uint16_t rounded[LANES];
        memcpy(rest, from + whole, (size_t)(k - whole) * sizeof *rest);
        store_factors(rounded, load<Floats>(rest));
        memcpy(to + whole, rounded, (size_t)(width - whole) * sizeof *to);
    }
}

#endif

// Groups first to last of W by all rows of x, with tiles of so many rows and groups.
template <class X, class Tiles>
void dense_groups(const uint8_t* packed, int64_t bytes, int64_t first, int64_t last, int64_t width, const X* x,
                  int64_t rows, const float* bias, float* y, int64_t n, int64_t y_stride, Fetching fetching,
                  Tiles tiles) {
    int64_t g = first;
    const int64_t bias_stride = bias == y ? y_stride : 0;
    struct Yes { enum { value = 1 }; };
    struct No { enum { value = 0 }; };
    auto block = [&](auto groups) {
        for (; g + groups.value <= last; g += groups.value) {
            const int64_t column = g * GROUP;
            int64_t row = 0;
            auto times = [&](auto count, auto fetches, Ahead ahead) {
                tiles(count, groups, fetches)(packed + g * bytes, bytes, width, x + row * width,
                                              bias ? bias + row * bias_stride + column : nullptr,
                                              y + row * y_stride + column, y_stride, n - column, ahead);
                row += count.value;
            };
            struct Tall { enum { value = TALL }; };
            struct Four { enum { value = 4 }; };
            struct Two { enum { value = 2 }; };
            struct One { enum { value = 1 }; };
            // Of the first rows' passes through these weights each fetches a part of the next: alone they would
            // wait for memory and the later ones for the first. One pass does both anyway.
            const int64_t passes = rows < 2 * TALL ? 0 : rows < 4 * TALL ? rows / TALL : 4;
            for (int64_t pass = 0; pass < passes; pass++)
                times(Tall{}, Yes{}, Ahead{fetching, groups.value * bytes, passes, pass});
            while (row + TALL <= rows) times(Tall{}, No{}, Ahead{fetching});
            while (row + 4 <= rows) times(Four{}, No{}, Ahead{fetching});
            while (row + 2 <= rows) times(Two{}, No{}, Ahead{fetching});
            while (row + 1 <= rows) times(One{}, No{}, Ahead{fetching});
        }
    };
    struct Wide { enum { value = WIDE }; };
    struct One { enum { value = 1 }; };
    block(Wide{});
    block(One{});
}

template <class N>
void dense_times(const uint8_t* packed, int64_t first, int64_t last, int64_t k, const float* x, int64_t rows,
                 const float* bias, float* y, int64_t n, int64_t stride, Fetching fetching) {
    dense_groups(packed, group_bytes(N::FORMAT, k), first, last, k, x, rows, bias, y, n, stride, fetching,
                 [](auto count, auto groups, auto fetches) {
                     return dense_tile<N, (int)decltype(count)::value, (int)decltype(groups)::value,
                                       (bool)decltype(fetches)::value>;
                 });
}

}  // namespace
