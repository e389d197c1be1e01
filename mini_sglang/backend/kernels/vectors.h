// Vectors of numbers and integer dot products, with AVX2, AVX-512 VNNI or what every CPU has.

#pragma once

#include "kernels.h"

#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512VNNI__)
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
enum { HALVES = GROUP / LANES };  // vectors that hold one number of each row of a group

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

typedef float Eights __attribute__((vector_size(32)));

template <class T>
inline T load(const void* from) {
    T value;
    memcpy(&value, from, sizeof value);
    return value;
}

inline void store(float* to, Floats v) { memcpy(to, &v, sizeof v); }

// Loops over registers must be unrolled to be loops over registers, and -O2 leaves it to us.
#if defined(__AVX2__)
#define UNROLL _Pragma("GCC unroll 32")
#else
#define UNROLL
#endif

inline float from_bits(uint32_t bits) { return load<float>(&bits); }
inline Floats all(float value) { return value - Floats{}; }
inline Ints lane_numbers() {
    Ints out;
    for (int i = 0; i < LANES; i++) out[i] = i;
    return out;
}
// The second where one of them is NaN.
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

// The lines of weights to come: of every so many steps one fetches, so many bytes behind what it takes, first after
// turn others.
struct Ahead {
    Fetching fetching;
    int64_t distance;
    int64_t every, turn;

    // In a step that takes size bytes from w on, and of each of so many groups, bytes apart.
    template <int GROUPS>
    void fetch(const uint8_t* w, int64_t bytes, int size) {
        if (turn--) return;
        turn = every - 1;
        UNROLL for (int g = 0; g < GROUPS; g++)
            for (int line = 0; line < size; line += 64) fetch_line(w + g * bytes + distance + line, fetching.far);
    }
};

// ---- numbers in memory to vectors

#if defined(__AVX512VNNI__)

inline Floats to_floats(Ints v) { return (Floats)_mm512_cvtepi32_ps((__m512i)v); }
inline Floats halves(const void* p) {
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
inline Floats bfloats(const void* p) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
inline Floats bytes(const uint8_t* p) {
    return to_floats((Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline Floats bytes(const int8_t* p) {
    return to_floats((Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline void store_bytes(int8_t* p, Ints v) {
    _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
}
inline void store_halves(void* p, Floats v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
inline void store_shorts(void* p, Ints v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)v));
}
inline Floats fused(Floats a, Floats b, Floats c) {
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline Eights eight_halves(const void* p) { return (Eights)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline Eights eight_bfloats(const void* p) {
    return (Eights)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
inline Eights eight_bytes(const int8_t* p) {
    return (Eights)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}

#elif defined(__AVX2__)

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
inline void store_halves(void* p, Floats v) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
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

// Rounded to the nearest, to even between two.
inline uint16_t to_half(float value) {
    const uint32_t bits = load<uint32_t>(&value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (size >= 0x47800000) return (uint16_t)(sign | 0x7c00);
    if (size < 0x38800000) {
        // Below the normal numbers the unit is 2^-24; this sum leaves their count in the low bits.
        const float sum = from_bits(size) + 0.5f;
        return (uint16_t)(sign | (load<uint32_t>(&sum) - 0x3f000000));
    }
    return (uint16_t)(sign | (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13);
}

template <class Make>
inline Floats each(Make make) {
    Floats out;
    for (int i = 0; i < LANES; i++) out[i] = make(i);
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
inline void store_halves(void* p, Floats v) {
    uint16_t out[LANES];
    for (int i = 0; i < LANES; i++) out[i] = to_half(v[i]);
    memcpy(p, out, sizeof out);
}
inline Floats fused(Floats a, Floats b, Floats c) { return a * b + c; }

#endif

#if !defined(__AVX512VNNI__)

inline Eights eight_halves(const void* p) { return halves(p); }
inline Eights eight_bfloats(const void* p) { return bfloats(p); }
inline Eights eight_bytes(const int8_t* p) { return bytes(p); }
inline void store_bytes(int8_t* p, Ints v) {
    for (int i = 0; i < LANES; i++) p[i] = (int8_t)v[i];
}
inline void store_shorts(void* p, Ints v) {
    uint16_t out[LANES];
    for (int i = 0; i < LANES; i++) out[i] = (uint16_t)v[i];
    memcpy(p, out, sizeof out);
}

#endif

// To bfloat16, rounded to the nearest, to even between two.
inline void store_bfloats(void* p, Floats v) {
    const Ints bits = (Ints)v;
    const Ints rounded = bits + 0x7fff + (bits >> 16 & 1);
    store_shorts(p, (v == v ? rounded : bits | 0x400000) >> 16);
}

// The numbers of a group, of which valid are there, plus bias, which may be null.
inline void write_group(const Floats* sums, const float* bias, float* y, int64_t valid) {
    if (valid >= GROUP) {
        UNROLL for (int h = 0; h < HALVES; h++) {
            const Floats sum = bias ? sums[h] + load<Floats>(bias + h * LANES) : sums[h];
            store(y + h * LANES, sum);
        }
        return;
    }
    float out[GROUP];
    memcpy(out, sums, sizeof out);
    for (int64_t i = 0; i < valid; i++) y[i] = bias ? out[i] + bias[i] : out[i];
}

// The same for products of bfloat16, which take numbers below the normal ones for zeros.
inline void store_factors(void* p, Floats v) {
#if defined(__AVX512BF16__)
    _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    store_bfloats(p, v);
#endif
}

// All lanes to one, folding the vector in half each time.
template <class Fold>
inline float folded(Floats v, Fold fold) {
    typedef float Four __attribute__((vector_size(16)));
    Eights eight;
#if defined(__AVX512VNNI__)
    eight = fold((Eights)_mm512_castps512_ps256((__m512)v), (Eights)_mm512_extractf32x8_ps((__m512)v, 1));
#else
    eight = v;
#endif
    const Four low = __builtin_shufflevector(eight, eight, 0, 1, 2, 3);
    const Four high = __builtin_shufflevector(eight, eight, 4, 5, 6, 7);
    const Four four = fold(low, high);
    const Four two = fold(four, (Four)__builtin_shufflevector(four, four, 2, 3, 0, 1));
    return fold(two, (Four)__builtin_shufflevector(two, two, 1, 0, 3, 2))[0];
}
inline float sum_of(Floats v) {
    return folded(v, [](auto a, auto b) { return a + b; });
}
inline float largest_of(Floats v) {
    return folded(v, [](auto a, auto b) { return a > b ? a : b; });
}

// Rows of 8 numbers to columns: with AVX-512 too, whose wider shuffles take more than twice the time.
inline void transpose(Eights* v) {
#if defined(__AVX2__)
    __m256 a[8], b[8];
    UNROLL for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_ps((__m256)v[i], (__m256)v[i + 1]);
        a[i + 1] = _mm256_unpackhi_ps((__m256)v[i], (__m256)v[i + 1]);
    }
    UNROLL for (int q = 0; q < 2; q++) {
        UNROLL for (int h = 0; h < 2; h++) {
            b[4 * q + 2 * h] = _mm256_shuffle_ps(a[4 * q + h], a[4 * q + 2 + h], 0x44);
            b[4 * q + 2 * h + 1] = _mm256_shuffle_ps(a[4 * q + h], a[4 * q + 2 + h], 0xee);
        }
    }
    UNROLL for (int c = 0; c < 4; c++) {
        v[c] = (Eights)_mm256_permute2f128_ps(b[c], b[4 + c], 0x20);
        v[4 + c] = (Eights)_mm256_permute2f128_ps(b[c], b[4 + c], 0x31);
    }
#else
    Eights columns[8];
    for (int i = 0; i < 8; i++)
        for (int j = 0; j < 8; j++) columns[j][i] = v[i][j];
    memcpy(v, columns, sizeof columns);
#endif
}

// ---- integer dot products: LANES rows by 4 columns a vector

#if defined(__AVX512VNNI__)

typedef __m512i Codes;

inline Codes codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Codes low_nibbles(Codes v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Codes high_nibbles(Codes v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
inline Codes four(const int8_t* q) { return _mm512_set1_epi32(load<int>(q)); }

template <int SHIFT>
inline Codes with_high_bits(Codes low, Codes high) {
    Codes bits = _mm512_and_si512(_mm512_srli_epi16(high, SHIFT), _mm512_set1_epi8(3));
    return _mm512_or_si512(low, _mm512_slli_epi16(bits, 4));
}

// first plus the products with COUNT vectors of codes.
template <int COUNT, int LARGEST>
inline Ints dot(const Codes* w, const int8_t* q, int32_t first) {
    __m512i sum = _mm512_set1_epi32(first);
    UNROLL for (int v = 0; v < COUNT; v++) sum = _mm512_dpbusd_epi32(sum, w[v], four(q + 4 * v));
    return (Ints)sum;
}

// Signed codes as unsigned ones, 128 larger; their dot product begins at minus 128 times the sum of q.
inline int signed_code(uint8_t code) { return code - 128; }
inline Codes signed_codes(const uint8_t* p) { return _mm512_xor_si512(codes(p), _mm512_set1_epi8(-128)); }
inline Ints signed_dot(const Codes* w, const int8_t* q, int32_t from_128) {
    return dot<8, 255>(w, q, from_128);
}

#elif defined(__AVX2__)

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
inline Codes add_dot(Codes sum, Codes w, Codes q) {
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, q));
}
inline Ints whole_dot(Codes sum) { return (Ints)_mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

// Products of neighbours are added in 16 bits: so many vectors may be added there before they overflow.
template <int COUNT, int LARGEST>
inline Ints dot(const Codes* w, const int8_t* q, int32_t first) {
    constexpr int SAFE = 32767 / (2 * 127 * LARGEST);
    constexpr int STEP = SAFE < COUNT ? SAFE : COUNT;
    static_assert(SAFE >= 1 && COUNT % STEP == 0, "");
    __m256i total = _mm256_set1_epi32(first);
    UNROLL for (int v = 0; v < COUNT; v += STEP) {
        __m256i sum = _mm256_maddubs_epi16(w[v], four(q + 4 * v));
        UNROLL for (int i = v + 1; i < v + STEP; i++)
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(w[i], four(q + 4 * i)));
        total = _mm256_add_epi32(total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
    }
    return (Ints)total;
}

inline int signed_code(uint8_t code) { return (int8_t)code; }
inline Codes signed_codes(const uint8_t* p) { return codes(p); }

// |w| as unsigned, -128 too, times x with the sign of w: two such products just fit in 16 bits.
inline Ints signed_dot(const Codes* w, const int8_t* q, int32_t) {
    __m256i total = _mm256_setzero_si256();
    UNROLL for (int v = 0; v < 8; v++) {
        Codes x = _mm256_sign_epi8(four(q + 4 * v), w[v]);
        __m256i sum = _mm256_maddubs_epi16(_mm256_abs_epi8(w[v]), x);
        total = _mm256_add_epi32(total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
    }
    return (Ints)total;
}

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
inline Ints plain_dot(const Codes* w, const int8_t* q, int32_t first) {
    Ints total = first - Ints{};
    for (int v = 0; v < COUNT; v += STEP) {
        Shorts sums[4] = {};
        for (int i = v; i < v + STEP; i++) {
            const uint64_t twice = load<uint32_t>(q + 4 * i) * 0x100000001u;
            const Shorts x = widen<int8_t>(&twice);
            for (int h = 0; h < 4; h++) sums[h] += widen<Byte>((const uint8_t*)(w + i) + 8 * h) * x;
        }
        for (int r = 0; r < LANES; r++)
            for (int j = 0; j < 4; j++) total[r] += sums[r / 2][r % 2 * 4 + j];
    }
    return total;
}

template <int COUNT, int LARGEST>
inline Ints dot(const Codes* w, const int8_t* q, int32_t first) {
    static_assert(COUNT * 127 * LARGEST < 32768, "");
    return plain_dot<uint8_t, COUNT, COUNT>(w, q, first);
}

inline int signed_code(uint8_t code) { return (int8_t)code; }
inline Codes signed_codes(const uint8_t* p) { return codes(p); }
inline Ints signed_dot(const Codes* w, const int8_t* q, int32_t) { return plain_dot<int8_t, 8, 2>(w, q, 0); }

#endif

}  // namespace
