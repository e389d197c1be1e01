// What stands between the matrix products of a layer, in float32: norm, rotation with the KV write, SiLU.

#pragma once

#include "vectors.h"

namespace {

// e^x for x <= 0 to about one unit in the last place; 0 below -87. NaN stays NaN.
inline Floats exp_of(Floats x) {
    const Floats shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const Floats shifted = fused(x, all(1.44269504f), shift);
    const Floats n = shifted - shift;
    const Floats r = fused(n, all(-1.42860677e-6f), fused(n, all(-0.693145752f), x));
    Floats p = all(1.0f / 5040);
    UNROLL for (int i = 0; i < 7; i++) {
        const float factors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
        p = fused(p, r, all(factors[i]));
    }
    const Ints exponent = ((Ints)shifted - (Ints)shift + 127) << 23;
    const Floats result = p * (Floats)exponent;
    return x < all(-87.0f) ? Floats{} : result;
}

inline void store(float* to, Floats v) { memcpy(to, &v, sizeof v); }

// x * weight / root mean square of x, over width numbers.
inline void normed(const float* x, const float* weight, float* out, int64_t width, float eps) {
    Floats squares[2] = {};
    for (int64_t i = 0; i < width; i += 8) {
        const Floats v = load<Floats>(x + i);
        squares[i / 8 % 2] = fused(v, v, squares[i / 8 % 2]);
    }
    const float mean = sum_of(squares[0] + squares[1]) / (float)width;
    const Floats scale = all(1.0f / __builtin_sqrtf(mean + eps));
    for (int64_t i = 0; i < width; i += 8)
        store(out + i, load<Floats>(x + i) * scale * load<Floats>(weight + i));
}

void norm(const Norm& job, int64_t first, int64_t last) {
    const int64_t width = job.width;
    for (int64_t row = first; row < last; row++) {
        float* x = job.x + row * width;
        if (job.delta)
            for (int64_t i = 0; i < width; i += 8)
                store(x + i, load<Floats>(x + i) + load<Floats>(job.delta + row * width + i));
        normed(x, job.weight, job.out + row * width, width, job.eps);
    }
}

void rotate(const Rotate& job, int64_t first, int64_t last) {
    const int64_t dim = job.head_dim, half = dim / 2, turning = job.heads + job.kv_heads;
    const int64_t width = (turning + job.kv_heads) * dim, kept = 2 * job.kv_heads * dim;
    for (int64_t row = first; row < last; row++) {
        float* qkv = job.qkv + row * width;
        for (int64_t h = 0; job.head_norm && h < turning; h++)
            normed(qkv + h * dim, job.head_norm + h * dim, qkv + h * dim, dim, job.eps);
        if (job.cos) {
            // The first half of the sine is negated.
            const float* cos = job.cos + row * dim;
            const float* sin = job.sin + row * dim;
            for (float* head = qkv; head < qkv + turning * dim; head += dim)
                for (int64_t i = 0; i < half; i += 8) {
                    const Floats low = load<Floats>(head + i), high = load<Floats>(head + half + i);
                    store(head + i, low * load<Floats>(cos + i) + high * load<Floats>(sin + i));
                    store(head + half + i,
                          high * load<Floats>(cos + half + i) + low * load<Floats>(sin + half + i));
                }
        }
        memcpy(job.kv + job.slots[row] * kept, qkv + job.heads * dim, (size_t)kept * sizeof(float));
    }
}

void silu_and_mul(const SiluAndMul& job, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
        const float* gate = job.gate_up + 2 * row * job.width;
        const float* up = gate + job.width;
        for (int64_t i = 0; i < job.width; i += 8) {
            const Floats x = load<Floats>(gate + i);
            const Floats e = exp_of(x < Floats{} ? x : -x);
            const Floats numerator = x < Floats{} ? e : all(1.0f);
            store(job.out + row * job.width + i, x * (numerator / (e + 1.0f)) * load<Floats>(up + i));
        }
    }
}

}  // namespace
