// What stands between the matrix products of a layer, in float32: norm, rotation with the KV write, SiLU.

#pragma once

#include "vectors.h"

namespace {

inline Floats whole(Floats x) {
#if defined(__AVX512VNNI__)
    return (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
    const Floats shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    return x + shift - shift;
#endif
}

// 2^(n + r) to some units in the last place, for whole n and r of at most half; 0 or next to it for n below -126,
// infinity for n above 127. NaN stays NaN.
inline Floats power_of_two(Floats n, Floats r) {
    constexpr float factors[] = {1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f,
                                 2.40226507e-1f, 6.93147182e-1f, 1.0f};
    Floats p = all(factors[0]);
    UNROLL for (int i = 1; i < 7; i++) p = fused(p, r, all(factors[i]));
#if defined(__AVX512VNNI__)
    return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    const Floats shift = all(12582912.0f);
    const Floats power = (Floats)(((Ints)(n + shift) - (Ints)shift + 127) << 23);
    return n < all(-126.0f) ? Floats{} : n > all(127.0f) ? all(__builtin_inff()) : p * power;
#endif
}

// 2^x.
inline Floats power_of_two(Floats x) {
    x = larger(all(-200.0f), x);  // of -infinity the rest would be none
    const Floats n = whole(x);
    return power_of_two(n, x - n);
}

// e^-x.
inline Floats inverse_exponential(Floats x) {
    x = larger(all(-140.0f), smaller(all(140.0f), x));
    const Floats n = whole(x * all(-1.44269504f));
    // ln 2 in two parts, n times the first of which is exact: where products are rounded by themselves too.
    const Floats r = fused(n, all(-1.42860677e-6f), fused(n, all(-0.693145752f), -x));
    return power_of_two(n, r * all(1.44269504f));
}

// x * weight / root mean square of x, over width numbers, after delta, which may be null, was added to x.
inline void normed(float* x, const float* delta, const float* weight, float* out, int64_t width, float eps) {
    // Sums side by side: one alone would wait for itself.
    Floats squares[4] = {};
    auto add = [&](int64_t i, int sum) {
        Floats v = load<Floats>(x + i);
        if (delta) store(x + i, v += load<Floats>(delta + i));
        squares[sum] = fused(v, v, squares[sum]);
    };
    int64_t i = 0;
    for (; i + 4 * LANES <= width; i += 4 * LANES)
        UNROLL for (int j = 0; j < 4; j++) add(i + j * LANES, j);
    for (; i < width; i += LANES) add(i, 0);
    const float mean = sum_of((squares[0] + squares[1]) + (squares[2] + squares[3])) / (float)width;
    const Floats scale = all(1.0f / __builtin_sqrtf(mean + eps));
    for (i = 0; i < width; i += LANES) store(out + i, load<Floats>(x + i) * scale * load<Floats>(weight + i));
}

void norm(const Norm& job, int64_t first, int64_t last) {
    const int64_t width = job.width;
    for (int64_t at = first * width; at < last * width; at += width)
        normed(job.x + at, job.delta ? job.delta + at : nullptr, job.weight, job.out + at, width, job.eps);
}

// The largest magnitude of count numbers; of any that is NaN, NaN.
inline float largest_magnitude(const float* from, int64_t count) {
    Ints top = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const Ints bits = load<Ints>(from + i) & 0x7fffffff;
        top = bits > top ? bits : top;
    }
    int32_t largest = 0;
    for (int i = 0; i < LANES; i++) largest = top[i] > largest ? top[i] : largest;
    return from_bits((uint32_t)largest);
}

// What count numbers are multiples of, of at most limit: as in quantize_block that of numbers that are not finite
// is not, that of numbers below 2^-100 is 0.
struct Steps {
    float size;
    Floats inverse;
    Steps(float magnitude, float limit)
        : size(magnitude < 0x1p-100f ? 0.0f : magnitude / limit),
          inverse(all(magnitude < 0x1p-100f ? 0.0f : limit / magnitude)) {}
    Ints whole(Floats numbers) const { return (Ints)(numbers * inverse + 12582912.0f) - 0x4b400000; }
};

inline float store_quantized(const float* from, int64_t dim, int8_t* to) {
    const Steps steps(largest_magnitude(from, dim), 127.0f);
    for (int64_t i = 0; i < dim; i += LANES) store_bytes(to + i, steps.whole(load<Floats>(from + i)));
    return steps.size;
}

// Numbers of keys or values to the pool's format; for INT8 each head with its own scale, which goes to scales.
inline void store_heads(const float* from, int format, int64_t heads, int64_t dim, uint8_t* to, float* scales) {
    const int64_t count = heads * dim;
    if (format == F32) memcpy(to, from, (size_t)count * sizeof(float));
    for (int64_t i = 0; format == F16 && i < count; i += LANES) store_halves(to + 2 * i, load<Floats>(from + i));
    for (int64_t i = 0; format == BF16 && i < count; i += LANES) store_bfloats(to + 2 * i, load<Floats>(from + i));
    for (int64_t h = 0; format == INT8 && h < heads; h++)
        scales[h] = store_quantized(from + h * dim, dim, (int8_t*)to + h * dim);
}

// Every second of numbers of BYTES each, from the lane's on, and only those: threads may write neighbouring rows.
template <int BYTES>
inline void store_alternate(const uint8_t* numbers, int64_t count, int odd, uint8_t* to) {
#if defined(__AVX512VNNI__)
    for (int64_t i = 0; i < count * BYTES; i += 32, to += 64) {
        const __m256i some = _mm256_loadu_si256((const __m256i*)(numbers + i));
        if constexpr (BYTES == 2) {
            const __m512i wide = _mm512_cvtepu16_epi32(some);
            _mm512_mask_storeu_epi16(to, odd ? 0xaaaaaaaa : 0x55555555, odd ? _mm512_slli_epi32(wide, 16) : wide);
        } else {
            const int64_t left = count - i;  // 16 or more
            const uint64_t there = left < 32 ? 0xffffffff : ~(uint64_t)0, half = 0x5555555555555555 << odd;
            const __m512i wide = _mm512_cvtepu8_epi16(some);
            _mm512_mask_storeu_epi8(to, half & there, odd ? _mm512_slli_epi16(wide, 8) : wide);
        }
    }
#else
    for (int64_t i = 0; i < count; i++) memcpy(to + (2 * i + odd) * BYTES, numbers + i * BYTES, BYTES);
#endif
}

// The keys and values of one row to its place in a tile.
template <int BYTES>
inline void store_in_tile(const float* from, const Pool& pool, int64_t slot) {
    const int64_t dim = pool.head_dim;
    const int lane = (int)(slot % GROUP);
    uint8_t* to = pool.data + (slot - lane) * pool_row_bytes(pool);
    for (int64_t h = 0; h < 2 * pool.kv_heads; h++, from += dim, to += dim * GROUP * BYTES) {
        uint8_t numbers[MAX_HEAD_DIM * BYTES];
        if constexpr (BYTES == 1) {
            const float scale = store_quantized(from, dim, (int8_t*)numbers);
            memcpy(to + 4 * lane, &scale, 4);
            to += 4 * GROUP;
        } else {
            for (int64_t i = 0; i < dim; i += LANES) store_bfloats(numbers + 2 * i, load<Floats>(from + i));
        }
        if (h < pool.kv_heads)
            for (int64_t i = 0; i < dim; i += 2)
                memcpy(to + (GROUP * i + 2 * lane) * BYTES, numbers + i * BYTES, 2 * BYTES);
        else
            store_alternate<BYTES>(numbers, dim, lane % 2, to + lane / 2 * 2 * dim * BYTES);
    }
}

void rotate(const Rotate& job, int64_t first, int64_t last) {
    const Pool& pool = job.pool;
    const int64_t dim = pool.head_dim, half = dim / 2, turning = job.heads + pool.kv_heads;
    const int64_t width = (turning + pool.kv_heads) * dim, row_bytes = pool_row_bytes(pool);
    // Halves of heads are turned against each other, LANES or, of narrow heads, 8 numbers at a time.
    auto turn = [&](float* head, const float* cos, const float* sin, auto vector) {
        typedef decltype(vector) V;
        for (int64_t i = 0; i < half; i += sizeof(V) / 4) {
            const V low = load<V>(head + i), high = load<V>(head + half + i);
            const V first = low * load<V>(cos + i) + high * load<V>(sin + i);
            const V second = high * load<V>(cos + half + i) + low * load<V>(sin + half + i);
            memcpy(head + i, &first, sizeof first);
            memcpy(head + half + i, &second, sizeof second);
        }
    };
    for (int64_t row = first; row < last; row++) {
        float* qkv = job.qkv + row * width;
        for (int64_t h = 0; job.head_norm && h < turning; h++)
            normed(qkv + h * dim, nullptr, job.head_norm + h * dim, qkv + h * dim, dim, job.eps);
        if (job.turns) {
            const int64_t* positions = job.turns->positions;
            const int64_t position = positions ? positions[row] : row;
            const float* cos = job.turns->cos + position * dim;
            const float* sin = job.turns->sin + position * dim;
            for (float* head = qkv; head < qkv + turning * dim; head += dim) {
                if (half % LANES == 0) turn(head, cos, sin, Floats{});
                else turn(head, cos, sin, Eights{});
            }
        }
        if (in_tiles(pool)) {
            const auto store = pool.format == TILES ? store_in_tile<2> : store_in_tile<1>;
            store(qkv + job.heads * dim, pool, job.slots[row]);
            continue;
        }
        uint8_t* to = pool.data + job.slots[row] * row_bytes;
        float* scales = (float*)(to + 2 * pool.kv_heads * dim);
        store_heads(qkv + job.heads * dim, (int)pool.format, 2 * pool.kv_heads, dim, to, scales);
    }
}

void silu_and_mul(const float* gate, const float* up, int64_t stride, float* out, int64_t out_stride, int64_t rows,
                  int64_t width) {
    for (int64_t row = 0; row < rows; row++, gate += stride, up += stride, out += out_stride) {
        // A division: an approximate reciprocal takes longer with what corrects it.
        for (int64_t i = 0; i < width; i += LANES) {
            const Floats x = load<Floats>(gate + i);
            store(out + i, x / (inverse_exponential(x) + 1.0f) * load<Floats>(up + i));
        }
    }
}

}  // namespace
