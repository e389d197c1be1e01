// x W^T for W in ggml's blocks, interleaved, and x in int8.

#pragma once

#include "vectors.h"

namespace {

// ---- one tile of each format: load() once, then the product with a block of each row of x

struct Nibbles {
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
    Floats times(const Activations& x) const { return d * to_floats(dot<8, 15>(w, x.q) - 8 * x.sum); }
};

struct TileQ4_1 : Nibbles {
    static constexpr int FORMAT = Q4_1;
    Floats d, m;
    void load(const uint8_t* header, const uint8_t* tile) {
        d = halves(header);
        m = halves(header + 16);
        load_codes(tile);
    }
    Floats times(const Activations& x) const { return d * to_floats(dot<8, 15>(w, x.q)) + m * (float)x.sum; }
};

struct TileQ8_0 {
    static constexpr int FORMAT = Q8_0;
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
    Floats times(const Activations& x) const { return d * to_floats(dot<8, 15>(w, x.q)) - m * (float)x.sum; }
};

struct TileQ6_K : Nibbles {
    static constexpr int FORMAT = Q6_K;
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
                 int64_t n, int valid) {
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
        for (int i = 0; i < valid; i++) y[r * n + i] = bias ? sums[r][i] + bias[i] : sums[r][i];
}

template <class Tile>
void groups_times(const uint8_t* packed, int64_t first, int64_t last, int64_t blocks, const Activations* x,
                  int64_t rows, const float* bias, float* y, int64_t n) {
    const int64_t bytes = group_bytes(layout_of(Tile::FORMAT), blocks);
    int64_t stride = CACHED_BYTES / (blocks * (int64_t)sizeof(Activations)) / 8 * 8;
    stride = stride < 8 ? 8 : stride;
    for (int64_t start = 0; start < rows; start += stride) {
        const int64_t stop = start + stride < rows ? start + stride : rows;
        for (int64_t g = first; g < last; g++) {
            const uint8_t* w = packed + g * bytes;
            const int64_t column = g * GROUP;
            const int valid = n - column < GROUP ? (int)(n - column) : GROUP;
            const float* b = bias ? bias + column : nullptr;
            int64_t r = start;
            auto part = [&](auto times, int count) {
                for (; r + count <= stop; r += count)
                    times(w, blocks, x + r * blocks, b, y + r * n + column, n, valid);
            };
            part(group_times<Tile, 8>, 8);
            part(group_times<Tile, 4>, 4);
            part(group_times<Tile, 2>, 2);
            part(group_times<Tile, 1>, 1);
        }
    }
}

void quantized(int format, const uint8_t* packed, int64_t first, int64_t last, int64_t blocks,
               const Activations* x, int64_t rows, const float* bias, float* y, int64_t n) {
    switch (format) {
        case Q4_0: return groups_times<TileQ4_0>(packed, first, last, blocks, x, rows, bias, y, n);
        case Q4_1: return groups_times<TileQ4_1>(packed, first, last, blocks, x, rows, bias, y, n);
        case Q8_0: return groups_times<TileQ8_0>(packed, first, last, blocks, x, rows, bias, y, n);
        case Q4_K: return groups_times<TileQ4_K>(packed, first, last, blocks, x, rows, bias, y, n);
        case Q6_K: return groups_times<TileQ6_K>(packed, first, last, blocks, x, rows, bias, y, n);
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
    }
}

}  // namespace
