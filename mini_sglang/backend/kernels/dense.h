// x W^T for dense, row-major W in float32, float16 or bfloat16, computed in float32.

#pragma once

#include "vectors.h"

namespace {

struct Float32 {
    typedef float Type;
    static Floats load8(const float* p) { return load<Floats>(p); }
};
struct Float16 {
    typedef uint16_t Type;
    static Floats load8(const uint16_t* p) { return halves(p); }
};
struct BFloat16 {
    typedef uint16_t Type;
    static Floats load8(const uint16_t* p) { return bfloats(p); }
};

// WIDE rows of W by ROWS rows of x: lane i of a sum has the columns i, i + 8, i + 16 and so on, in order.
template <class N, int WIDE, int ROWS>
void tile_times(const typename N::Type* w, int64_t k, const float* x, const float* bias, float* y,
                int64_t stride) {
    Floats sums[WIDE][ROWS] = {};
    const int64_t whole = k / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8) {
        Floats part[ROWS];
        UNROLL for (int r = 0; r < ROWS; r++) part[r] = load<Floats>(x + r * k + i);
        UNROLL for (int c = 0; c < WIDE; c++) {
            const Floats weights = N::load8(w + c * k + i);
            UNROLL for (int r = 0; r < ROWS; r++) sums[c][r] = fused(weights, part[r], sums[c][r]);
        }
    }
    if (whole < k) {
        UNROLL for (int c = 0; c < WIDE; c++) {
            typename N::Type end[8] = {};
            memcpy(end, w + c * k + whole, (size_t)(k - whole) * sizeof *end);
            const Floats weights = N::load8(end);
            UNROLL for (int r = 0; r < ROWS; r++) {
                float part[8] = {};
                memcpy(part, x + r * k + whole, (size_t)(k - whole) * sizeof *part);
                sums[c][r] = fused(weights, load<Floats>(part), sums[c][r]);
            }
        }
    }
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int c = 0; c < WIDE; c++) y[r * stride + c] = sum_of(sums[c][r]) + (bias ? bias[c] : 0.0f);
}

template <class N, int WIDE>
void rows_times(const typename N::Type* w, int64_t k, const float* x, int64_t start, int64_t stop,
                const float* bias, float* y, int64_t stride) {
    int64_t r = start;
    for (; r + 3 <= stop; r += 3) tile_times<N, WIDE, 3>(w, k, x + r * k, bias, y + r * stride, stride);
    if (stop - r == 2) tile_times<N, WIDE, 2>(w, k, x + r * k, bias, y + r * stride, stride);
    if (stop - r == 1) tile_times<N, WIDE, 1>(w, k, x + r * k, bias, y + r * stride, stride);
}

template <class N>
void dense_times(const void* weight, int64_t first, int64_t last, int64_t k, const float* x, int64_t rows,
                 const float* bias, float* y, int64_t y_stride) {
    const typename N::Type* w = (const typename N::Type*)weight;
    int64_t stride = CACHED_BYTES / (k * 4) / 3 * 3;
    stride = stride < 3 ? 3 : stride;
    for (int64_t start = 0; start < rows; start += stride) {
        const int64_t stop = start + stride < rows ? start + stride : rows;
        int64_t c = first;
        auto part = [&](auto times, int wide) {
            for (; c + wide <= last; c += wide)
                times(w + c * k, k, x, start, stop, bias ? bias + c : nullptr, y + c, y_stride);
        };
        part(rows_times<N, 4>, 4);
        part(rows_times<N, 1>, 1);
    }
}

void dense(int number, const void* weight, int64_t first, int64_t last, int64_t k, const float* x,
           int64_t rows, const float* bias, float* y, int64_t stride) {
    switch (number) {
        case F32: return dense_times<Float32>(weight, first, last, k, x, rows, bias, y, stride);
        case F16: return dense_times<Float16>(weight, first, last, k, x, rows, bias, y, stride);
        case BF16: return dense_times<BFloat16>(weight, first, last, k, x, rows, bias, y, stride);
    }
}

}  // namespace
