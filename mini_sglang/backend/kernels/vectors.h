// Vectors of eight numbers and integer dot products, with AVX2, AVX-512 VNNI or what every CPU has.

#pragma once

#include "kernels.h"

#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));

template <class T>
inline T load(const void* from) {
    T value;
    memcpy(&value, from, sizeof value);
    return value;
}

// Loops over registers must be unrolled to be loops over registers, and -O2 leaves it to us.
#if defined(__AVX2__)
#define UNROLL _Pragma("GCC unroll 8")
#else
#define UNROLL
#endif

inline float from_bits(uint32_t bits) { return load<float>(&bits); }

// ---- float16 and integers to eight floats

#if defined(__AVX2__)

inline Floats to_floats(Ints v) { return (Floats)_mm256_cvtepi32_ps((__m256i)v); }
inline Floats halves(const void* p) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline Floats bfloats(const void* p) {
    __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
    return (Floats)_mm256_slli_epi32(wide, 16);
}
inline Floats bytes(const uint8_t* p) {
    return to_floats((Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline Floats bytes(const int8_t* p) {
    return to_floats((Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline Floats fused(Floats a, Floats b, Floats c) {
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

#else

inline float half(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 31) return from_bits(sign | 0x7f800000 | fraction << 13);
    if (exponent == 0) {
        float tiny = (float)fraction * 0x1p-24f;
        return sign ? -tiny : tiny;
    }
    return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
}

template <class Make>
inline Floats each(Make make) {
    Floats out;
    for (int i = 0; i < 8; i++) out[i] = make(i);
    return out;
}

inline Floats to_floats(Ints v) { return each([&](int i) { return (float)v[i]; }); }
inline Floats halves(const void* p) {
    return each([&](int i) { return half(load<uint16_t>((const uint8_t*)p + 2 * i)); });
}
inline Floats bfloats(const void* p) {
    return each([&](int i) { return from_bits((uint32_t)load<uint16_t>((const uint8_t*)p + 2 * i) << 16); });
}
inline Floats bytes(const uint8_t* p) { return each([&](int i) { return (float)p[i]; }); }
inline Floats bytes(const int8_t* p) { return each([&](int i) { return (float)p[i]; }); }
inline Floats fused(Floats a, Floats b, Floats c) { return a * b + c; }

#endif

inline Floats all(float value) { return value - Floats{}; }
inline float sum_of(Floats v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// ---- integer dot products: eight rows by 4 columns a vector

#if defined(__AVX2__)

typedef __m256i Codes;

inline Codes codes(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Codes low_nibbles(Codes v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline Codes high_nibbles(Codes v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
inline Codes four(const int8_t* q) { return _mm256_set1_epi32(load<int>(q)); }

template <int SHIFT>
inline Codes with_high_bits(Codes low, Codes high) {
    Codes bits = _mm256_and_si256(_mm256_srli_epi16(high, SHIFT), _mm256_set1_epi8(3));
    return _mm256_or_si256(low, _mm256_slli_epi16(bits, 4));
}

// A dot product that grows by four columns at a time, 8 times at most with codes up to 15.
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)

inline Codes add_dot(Codes sum, Codes w, Codes q) { return _mm256_dpbusd_epi32(sum, w, q); }
inline Ints whole_dot(Codes sum) { return (Ints)sum; }

template <int COUNT, int LARGEST>
inline Ints dot(const Codes* w, const int8_t* q) {
    __m256i sum = _mm256_setzero_si256();
    UNROLL for (int v = 0; v < COUNT; v++) sum = _mm256_dpbusd_epi32(sum, w[v], four(q + 4 * v));
    return (Ints)sum;
}

inline Ints signed_dot(const uint8_t* w, const int8_t* q) {
    __m256i sum = _mm256_setzero_si256();
    UNROLL for (int v = 0; v < 8; v++) {
        Codes weights = codes(w + 32 * v);
        sum = _mm256_dpbusd_epi32(sum, _mm256_abs_epi8(weights), _mm256_sign_epi8(four(q + 4 * v), weights));
    }
    return (Ints)sum;
}

#else

inline Codes add_dot(Codes sum, Codes w, Codes q) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, q));
}
inline Ints whole_dot(Codes sum) { return (Ints)_mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

// Products of neighbours are added in 16 bits: so many vectors may be added there before they overflow.
template <int COUNT, int LARGEST>
inline Ints dot(const Codes* w, const int8_t* q) {
    constexpr int SAFE = 32767 / (2 * 127 * LARGEST);
    constexpr int STEP = SAFE < COUNT ? SAFE : COUNT;
    static_assert(SAFE >= 1 && COUNT % STEP == 0, "");
    __m256i total = _mm256_setzero_si256();
    UNROLL for (int v = 0; v < COUNT; v += STEP) {
        __m256i sum = _mm256_maddubs_epi16(w[v], four(q + 4 * v));
        UNROLL for (int i = v + 1; i < v + STEP; i++)
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w[i], four(q + 4 * i)));
        total = _mm256_add_epi32(total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
    }
    return (Ints)total;
}

// |w| as unsigned, -128 too, times x with the sign of w: two such products just fit in 16 bits.
inline Ints signed_dot(const uint8_t* w, const int8_t* q) {
    __m256i total = _mm256_setzero_si256();
    UNROLL for (int v = 0; v < 8; v++) {
        Codes weights = codes(w + 32 * v);
        Codes x = _mm256_sign_epi8(four(q + 4 * v), weights);
        __m256i sum = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), x);
        total = _mm256_add_epi32(total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
    }
    return (Ints)total;
}

#endif
#else

// Vectors of 16 bytes, which SSE2 and NEON have.
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(16)));

struct Codes {
    Bytes at[2];
};

inline Codes codes(const uint8_t* p) { return load<Codes>(p); }
inline Codes low_nibbles(Codes v) { return {{v.at[0] & 15, v.at[1] & 15}}; }
inline Codes high_nibbles(Codes v) { return {{v.at[0] >> 4, v.at[1] >> 4}}; }

template <int SHIFT>
inline Codes with_high_bits(Codes low, Codes high) {
    return {{low.at[0] | (high.at[0] >> SHIFT & 3) << 4, low.at[1] | (high.at[1] >> SHIFT & 3) << 4}};
}

template <class Byte>
inline Shorts widen(const void* p) {
    typedef Byte Eight __attribute__((vector_size(8)));
    return __builtin_convertvector(load<Eight>(p), Shorts);
}

// Products with STEP vectors of W are added in 16 bits before they could overflow.
template <class Byte, int COUNT, int STEP>
inline Ints plain_dot(const uint8_t* w, const int8_t* q) {
    Ints total = {};
    for (int v = 0; v < COUNT; v += STEP) {
        Shorts sums[4] = {};
        for (int i = v; i < v + STEP; i++) {
            const uint64_t twice = load<uint32_t>(q + 4 * i) * 0x100000001u;
            const Shorts x = widen<int8_t>(&twice);
            for (int h = 0; h < 4; h++) sums[h] += widen<Byte>(w + 32 * i + 8 * h) * x;
        }
        for (int r = 0; r < GROUP; r++)
            for (int j = 0; j < 4; j++) total[r] += sums[r / 2][r % 2 * 4 + j];
    }
    return total;
}

template <int COUNT, int LARGEST>
inline Ints dot(const Codes* w, const int8_t* q) {
    static_assert(COUNT * 127 * LARGEST < 32768, "");
    return plain_dot<uint8_t, COUNT, COUNT>((const uint8_t*)w, q);
}

inline Ints signed_dot(const uint8_t* w, const int8_t* q) { return plain_dot<int8_t, 8, 2>(w, q); }

#endif

// Of x, to stay in the first-level cache while a chunk's rows of W pass by.
constexpr int64_t CACHED_BYTES = 24 << 10;

}  // namespace
