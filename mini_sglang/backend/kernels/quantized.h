// x W^T for W in ggml's blocks, interleaved, and x in int8.

#pragma once

#include "vectors.h"

namespace {

// ---- one tile of each format: load() once, then the product with a block of each row of x

struct Nibbles {
    static constexpr bool PAIRED = true;
    Codes w[8];
    void load_codes(const uint8_t* p) {
        UNROLL for (int v = 0; v < 4; v++) {
            Codes both = codes(p + 32 * v);
            w[v] = low_nibbles(both);
            w[4 + v] = high_nibbles(both);
        }
    }
};

struct TileQ4_0 : Nibbles {
    static constexpr int FORMAT = Q4_0;
    Floats d;
    void load(const uint8_t* header, const uint8_t* tile) {
        d = halves(header);
        load_codes(tile);
    }
    Floats scaled(Ints dot, const Activations& x) const { return d * to_floats(dot - 8 * x.sum); }
    Floats times(const Activations& x) const { return scaled(dot<8, 15>(w, x.q), x); }
};

struct TileQ4_1 : Nibbles {
    static constexpr int FORMAT = Q4_1;
    Floats d, m;
    void load(const uint8_t* header, const uint8_t* tile) {
        d = halves(header);
        m = halves(header + 16);
        load_codes(tile);
    }
    Floats scaled(Ints dot, const Activations& x) const { return d * to_floats(dot) + m * x.float_sum; }
    Floats times(const Activations& x) const { return scaled(dot<8, 15>(w, x.q), x); }
};

struct TileQ8_0 {
    static constexpr int FORMAT = Q8_0;
    static constexpr bool PAIRED = false;
    Floats d;
    const uint8_t* w;
    void load(const uint8_t* header, const uint8_t* tile) {
        d = halves(header);
        w = tile;
    }
    Floats times(const Activations& x) const { return d * to_floats(signed_dot(w, x.q)); }
};

struct TileQ4_K : Nibbles {
    static constexpr int FORMAT = Q4_K;
    Floats d, m;
    void load(const uint8_t* header, const uint8_t* tile) {
        d = halves(header) * bytes(tile);
        m = halves(header + 16) * bytes(tile + 8);
        load_codes(tile + 16);
    }
    Floats scaled(Ints dot, const Activations& x) const { return d * to_floats(dot) - m * x.float_sum; }
    Floats times(const Activations& x) const { return scaled(dot<8, 15>(w, x.q), x); }
};

struct TileQ6_K : Nibbles {
    static constexpr int FORMAT = Q6_K;
    static constexpr bool PAIRED = false;
    Floats d[2];
    void load(const uint8_t* header, const uint8_t* tile) {
        UNROLL for (int h = 0; h < 2; h++) d[h] = halves(header) * bytes((const int8_t*)tile + 8 * h);
        load_codes(tile + 16);
        UNROLL for (int h = 0; h < 2; h++) {
            Codes high = codes(tile + 144 + 32 * h);
            Codes* half = w + 4 * h;
            half[0] = with_high_bits<0>(half[0], high);
            half[1] = with_high_bits<2>(half[1], high);
            half[2] = with_high_bits<4>(half[2], high);
            half[3] = with_high_bits<6>(half[3], high);
        }
    }
    Floats times(const Activations& x) const {
        Ints first = dot<4, 63>(w, x.q) - 32 * x.first_sum;
        Ints last = dot<4, 63>(w + 4, x.q + 16) - 32 * (x.sum - x.first_sum);
        return d[0] * to_floats(first) + d[1] * to_floats(last);
    }
};

// ---- quantised products

// One group by ROWS rows of x.
template <class Tile, int ROWS>
void group_times(const uint8_t* w, int64_t blocks, const Activations* x, const float* bias, float* y,
                 int64_t stride, int valid) {
    const Layout layout = layout_of(Tile::FORMAT);
    Floats sums[ROWS] = {};
    const uint8_t* header = w;
    for (int64_t b = 0; b < blocks; b++) {
        if (b % layout.source_blocks == 0) {
            header = w;
            w += layout.header_bytes;
        }
#if defined(__AVX2__)
        for (int line = 0; line < layout.tile_bytes; line += 64)
            _mm_prefetch((const char*)w + line + 1024, _MM_HINT_T0);
#endif
        Tile tile;
        tile.load(header, w);
        w += layout.tile_bytes;
        UNROLL for (int r = 0; r < ROWS; r++) {
            const Activations& block = x[r * blocks + b];
            sums[r] += tile.times(block) * block.scale;
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < valid; i++) y[r * stride + i] = bias ? sums[r][i] + bias[i] : sums[r][i];
}

// The rows first to last by one group.
template <class Tile>
void group_rows(const uint8_t* packed, int64_t blocks, const Activations* x, int64_t first, int64_t last,
                const float* bias, float* y, int64_t n, int64_t stride, int64_t group) {
    const int64_t column = group * GROUP;
    const int valid = n - column < GROUP ? (int)(n - column) : GROUP;
    auto part = [&](auto times, int count) {
        for (; first + count <= last; first += count)
            times(packed, blocks, x + first * blocks, bias ? bias + column : nullptr,
                  y + first * stride + column, stride, valid);
    };
    part(group_times<Tile, 8>, 8);
    part(group_times<Tile, 4>, 4);
    part(group_times<Tile, 2>, 2);
    part(group_times<Tile, 1>, 1);
}

#if defined(__AVX2__)

// Two groups by ROWS rows of x, four at a time: what is broadcast of x, and the loads it takes, serve both.
template <class Tile, int ROWS>
void pair_times(const uint8_t* const* pair, int64_t blocks, const Activations* x, const float* bias, float* y,
                int64_t stride, int valid) {
    const Layout layout = layout_of(Tile::FORMAT);
    Floats sums[ROWS][2] = {};
    const uint8_t* headers[2] = {};
    int64_t at = 0;
    for (int64_t b = 0; b < blocks; b++) {
        if (b % layout.source_blocks == 0) {
            UNROLL for (int g = 0; g < 2; g++) headers[g] = pair[g] + at;
            at += layout.header_bytes;
        }
        Tile tiles[2];
        UNROLL for (int g = 0; g < 2; g++) {
            for (int line = 0; line < layout.tile_bytes; line += 64)
                _mm_prefetch((const char*)pair[g] + at + line + 1024, _MM_HINT_T0);
            tiles[g].load(headers[g], pair[g] + at);
        }
        at += layout.tile_bytes;
        for (int r = 0; r < ROWS; r += 4) {
            const Activations* rows[4];
            UNROLL for (int i = 0; i < 4; i++) rows[i] = x + (r + i) * blocks + b;
            Codes dots[4][2] = {};
            // Not unrolled, and all sums held in registers: gcc would put some of them on the stack.
            _Pragma("GCC unroll 1") for (int v = 0; v < 8; v++) {
                UNROLL for (int i = 0; i < 4; i++) {
                    const Codes q = four(rows[i]->q + 4 * v);
                    UNROLL for (int g = 0; g < 2; g++) dots[i][g] = add_dot(dots[i][g], tiles[g].w[v], q);
                }
                asm("" : "+x"(dots[0][0]), "+x"(dots[0][1]), "+x"(dots[1][0]), "+x"(dots[1][1]));
                asm("" : "+x"(dots[2][0]), "+x"(dots[2][1]), "+x"(dots[3][0]), "+x"(dots[3][1]));
            }
            UNROLL for (int i = 0; i < 4; i++)
                UNROLL for (int g = 0; g < 2; g++)
                    sums[r + i][g] += tiles[g].scaled(whole_dot(dots[i][g]), *rows[i]) * rows[i]->scale;
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int i = 0; i < valid; i++) {
            const float sum = sums[r][i / GROUP][i % GROUP];
            y[r * stride + i] = bias ? sum + bias[i] : sum;
        }
}

// As many of the rows first to last as go in fours, by group and the next; gives the first row left over.
template <class Tile>
int64_t pair_rows(const uint8_t* packed, int64_t bytes, int64_t blocks, const Activations* x, int64_t first,
                  int64_t last, const float* bias, float* y, int64_t n, int64_t stride, int64_t group) {
    const uint8_t* const pair[] = {packed, packed + bytes};
    const int64_t column = group * GROUP;
    const int valid = n - column < 2 * GROUP ? (int)(n - column) : 2 * GROUP;
    auto part = [&](auto times, int count) {
        for (; first + count <= last; first += count)
            times(pair, blocks, x + first * blocks, bias ? bias + column : nullptr,
                  y + first * stride + column, stride, valid);
    };
    part(pair_times<Tile, 16>, 16);
    part(pair_times<Tile, 8>, 8);
    part(pair_times<Tile, 4>, 4);
    return first;
}

#endif

template <class Tile>
void groups_times(const uint8_t* packed, int64_t first, int64_t last, int64_t blocks, const Activations* x,
                  int64_t rows, const float* bias, float* y, int64_t n, int64_t y_stride) {
    const int64_t bytes = group_bytes(layout_of(Tile::FORMAT), blocks);
    int64_t stride = CACHED_BYTES / (blocks * (int64_t)sizeof(Activations)) / 8 * 8;
    stride = stride < 8 ? 8 : stride;
    for (int64_t start = 0; start < rows; start += stride) {
        const int64_t stop = start + stride < rows ? start + stride : rows;
        for (int64_t g = first, count; g < last; g += count) {
            int64_t row = start;
            count = 1;
#if defined(__AVX2__)
            if constexpr (Tile::PAIRED)
                if (g + 1 < last) {
                    row = pair_rows<Tile>(packed + g * bytes, bytes, blocks, x, start, stop, bias, y, n,
                                          y_stride, g);
                    count = 2;
                }
#endif
            for (int64_t h = g; h < g + count; h++)
                group_rows<Tile>(packed + h * bytes, blocks, x, row, stop, bias, y, n, y_stride, h);
        }
    }
}

void quantized(int format, const uint8_t* packed, int64_t first, int64_t last, int64_t blocks,
               const Activations* x, int64_t rows, const float* bias, float* y, int64_t n, int64_t stride) {
    auto times = [&](auto groups) { groups(packed, first, last, blocks, x, rows, bias, y, n, stride); };
    switch (format) {
        case Q4_0: return times(groups_times<TileQ4_0>);
        case Q4_1: return times(groups_times<TileQ4_1>);
        case Q8_0: return times(groups_times<TileQ8_0>);
        case Q4_K: return times(groups_times<TileQ4_K>);
        case Q6_K: return times(groups_times<TileQ6_K>);
    }
}

void quantize(const float* x, int64_t blocks, Activations* out) {
    for (int64_t b = 0; b < blocks; b++, x += BLOCK, out++) {
        // Magnitudes compare like their bit patterns, infinities and NaN above all numbers.
        int32_t largest = 0;
        for (int i = 0; i < BLOCK; i++) {
            int32_t bits = load<int32_t>(x + i) & 0x7fffffff;
            largest = bits > largest ? bits : largest;
        }
        const float magnitude = from_bits((uint32_t)largest);
        if (largest >= 0x7f800000 || magnitude < 0x1p-100f) {
            memset(out, 0, sizeof *out);
            out->scale = largest >= 0x7f800000 ? from_bits(0x7fc00000) : 0.0f;
            continue;
        }
        const float inverse = 127.0f / magnitude;
        int32_t q[BLOCK], sums[2] = {0, 0};
        // Adding 1.5 * 2^23 leaves the number rounded to even in the low bits.
        for (int i = 0; i < BLOCK; i++) {
            float shifted = x[i] * inverse + 12582912.0f;
            q[i] = load<int32_t>(&shifted) - 0x4b400000;
        }
        for (int i = 0; i < BLOCK; i++) out->q[i] = (int8_t)q[i];
        for (int h = 0; h < 2; h++)
            for (int i = 0; i < 16; i++) sums[h] += q[16 * h + i];
        out->scale = magnitude / 127.0f;
        out->first_sum = sums[0];
        out->sum = sums[0] + sums[1];
        out->float_sum = (float)out->sum;
    }
}

}  // namespace
