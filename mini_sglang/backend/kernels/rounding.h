// Rows of x to int8 in blocks, as the products with ggml's blocks take them (kernels.h, Activations).

#pragma once

#include "vectors.h"

namespace {

#if defined(__AVX512VNNI__)

// The lanes of eight vectors folded: of each vector's first half, and of its second.
struct Folded {
    __m256i first, last;
};

template <class Fold>
inline Folded fold_lanes(const __m256i* v, Fold fold) {
    __m256i two[4], four[2];
    UNROLL for (int i = 0; i < 4; i++) {
        const __m256i a = v[2 * i], b = v[2 * i + 1];
        two[i] = fold(_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b));
    }
    UNROLL for (int i = 0; i < 2; i++) {
        const __m256i a = two[2 * i], b = two[2 * i + 1];
        four[i] = fold(_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b));
    }
    return {_mm256_permute2x128_si256(four[0], four[1], 0x20), _mm256_permute2x128_si256(four[0], four[1], 0x31)};
}

// Eight blocks that follow each other, each to its place: what is counted for a block is so for all in one vector.
struct EightBlocks {
    const float* x;
    Activations* out[8];
    float inverses[8];
    __m256 scale;
    __m256i sums[8];

    void find_scales() {
        const __m512i no_sign = _mm512_set1_epi32(0x7fffffff);
        __m256i tops[8];
        UNROLL for (int i = 0; i < 8; i++) {
            const __m512i top = _mm512_max_epi32(_mm512_and_si512(_mm512_loadu_si512(x + BLOCK * i), no_sign),
                                                 _mm512_and_si512(_mm512_loadu_si512(x + BLOCK * i + 16), no_sign));
            tops[i] = _mm256_max_epi32(_mm512_castsi512_si256(top), _mm512_extracti64x4_epi64(top, 1));
        }
        // Magnitudes compare like their bit patterns, infinities and NaN above all numbers.
        const Folded folded = fold_lanes(tops, [](__m256i a, __m256i b) { return _mm256_max_epi32(a, b); });
        const __m256i largest = _mm256_max_epi32(folded.first, folded.last);
        const __m256 magnitude = _mm256_castsi256_ps(largest);
        const __mmask8 endless = _mm256_cmpge_epi32_mask(largest, _mm256_set1_epi32(0x7f800000));
        const __mmask8 usual = ~endless & _mm256_cmp_ps_mask(magnitude, _mm256_set1_ps(0x1p-100f), _CMP_GE_OQ);
        scale = _mm256_mask_mov_ps(_mm256_maskz_mul_ps(usual, magnitude, _mm256_set1_ps(1.0f / 127.0f)), endless,
                                   _mm256_set1_ps(from_bits(0x7fc00000)));
        _mm256_storeu_ps(inverses, _mm256_maskz_div_ps(usual, _mm256_set1_ps(127.0f), magnitude));
    }

    void round() {
        UNROLL for (int i = 0; i < 8; i++) {
            const __m512 inverse = _mm512_set1_ps(inverses[i]);
            // What is not finite times 0 has no whole number: the conversion gives -2^31, of which the lowest byte is 0.
            auto sixteen = [&](const float* from) {
                return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from), inverse)));
            };
            const __m256i q = _mm256_set_m128i(sixteen(x + BLOCK * i + 16), sixteen(x + BLOCK * i));
            _mm256_storeu_si256((__m256i*)out[i]->q, q);
            sums[i] = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), q);
        }
    }

    void store_fields() {
        const Folded folded = fold_lanes(sums, [](__m256i a, __m256i b) { return _mm256_add_epi32(a, b); });
        const __m256i sum = _mm256_add_epi32(folded.first, folded.last), none = _mm256_setzero_si256();
        auto times_minus = [&](__m256i v, int power) {
            return (Eights)_mm256_sub_epi32(none, _mm256_slli_epi32(v, power));
        };
        const __m256 number = _mm256_cvtepi32_ps(sum);
        Eights fields[8] = {(Eights)scale, (Eights)number, (Eights)_mm256_mul_ps(scale, number), times_minus(sum, 3),
                            times_minus(sum, 7), times_minus(folded.first, 5), times_minus(folded.last, 5), Eights{}};
        transpose(fields);
        UNROLL for (int i = 0; i < 8; i++) memcpy(&out[i]->scale, &fields[i], sizeof fields[i]);
    }
};

void quantize(const float* x, int64_t first, int64_t last, int64_t k, int64_t panel, Activations* out) {
    const int64_t blocks = k / BLOCK, count = (last - first) * blocks;
    float few[8 * BLOCK];
    if (count < 8) {
        memset(few, 0, sizeof few);
        memcpy(few, x + first * k, (size_t)count * BLOCK * sizeof *few);
    }
    x = count < 8 ? few : x + first * k;
    Activations beyond;
    auto eight = [&](int64_t begin) {
        EightBlocks result;
        result.x = x + begin * BLOCK;
        int64_t row = first + begin / blocks, block = begin % blocks;
        Activations* to = out + (row / panel * blocks + block) * panel + row % panel;
        for (int i = 0; i < 8; i++, to += panel) {
            if (block++ == blocks) row++, block = 1, to = out + row / panel * blocks * panel + row % panel;
            result.out[i] = begin + i < count ? to : &beyond;
        }
        return result;
    };
    const int64_t end = count < 8 ? 0 : count - 8;
    for (int64_t done = 0; done < count; done += 16) {
        // Many rows do not come from the caches nearby.
        constexpr int AHEAD = 32;
        for (int i = 0; done + AHEAD + 16 <= count && i < 16 * BLOCK; i += 16)
            _mm_prefetch((const char*)(x + (done + AHEAD) * BLOCK + i), _MM_HINT_T0);
        // Sixteen at a time, step by step: eight would wait for themselves. The last may be some of those before, too.
        EightBlocks both[] = {eight(done < end ? done : end), eight(done + 8 < end ? done + 8 : end)};
        UNROLL for (int i = 0; i < 2; i++) both[i].find_scales();
        UNROLL for (int i = 0; i < 2; i++) both[i].round();
        UNROLL for (int i = 0; i < 2; i++) both[i].store_fields();
    }
}

#else

inline void quantize_block(const float* x, Activations* out) {
    // Magnitudes compare like their bit patterns, infinities and NaN above all numbers.
    Ints top = {};
    UNROLL for (int i = 0; i < BLOCK; i += LANES) {
        const Ints bits = load<Ints>(x + i) & 0x7fffffff;
        top = bits > top ? bits : top;
    }
    int32_t largest = 0;
    for (int i = 0; i < LANES; i++) largest = top[i] > largest ? top[i] : largest;
    const float magnitude = from_bits((uint32_t)largest);
    if (largest >= 0x7f800000 || magnitude < 0x1p-100f) {
        memset(out, 0, sizeof *out);
        out->scale = largest >= 0x7f800000 ? from_bits(0x7fc00000) : 0.0f;
        return;
    }
    const float inverse = 127.0f / magnitude;
    Ints sums[2] = {};  // of q[0..15] and q[16..31]
    UNROLL for (int i = 0; i < BLOCK; i += LANES) {
        // Adding 1.5 * 2^23 leaves the number rounded to even in the low bits.
        const Floats shifted = load<Floats>(x + i) * all(inverse) + 12582912.0f;
        const Ints codes = (Ints)shifted - 0x4b400000;
        store_bytes(out->q + i, codes);
        sums[2 * i / BLOCK] += codes;
    }
    int32_t first = 0, last = 0;
    for (int i = 0; i < LANES; i++) first += sums[0][i], last += sums[1][i];
    const int32_t sum = first + last;
    out->scale = magnitude * (1.0f / 127.0f);
    out->sum = (float)sum;
    out->scaled_sum = out->scale * out->sum;
    out->from_8 = -8 * sum;
    out->from_128 = -128 * sum;
    out->from_32[0] = -32 * first;
    out->from_32[1] = -32 * last;
}

void quantize(const float* x, int64_t first, int64_t last, int64_t k, int64_t panel, Activations* out) {
    const int64_t blocks = k / BLOCK;
    for (int64_t row = first; row < last; row++) {
        Activations* to = out + row / panel * panel * blocks + row % panel;
        for (int64_t b = 0; b < blocks; b++) quantize_block(x + row * k + b * BLOCK, to + b * panel);
    }
}

#endif

}  // namespace
