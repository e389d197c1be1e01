// y = x W^T for quantised and dense W: compiled once for each instruction set, named by VARIANT.
//
// Nothing here comes from the C++ library: its inline functions, compiled for AVX, could be the copies that
// the linker keeps for everybody. Contraction is off, so that all variants round alike in the
// quantised products.

#include "linear.h"

#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

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
inline Floats bytes(const uint8_t* p) { return to_floats((Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
inline Floats bytes(const int8_t* p) { return to_floats((Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))); }
inline Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }

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

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)

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
        for (int line = 0; line < layout.tile_bytes; line += 64) _mm_prefetch((const char*)w + line + 1024, _MM_HINT_T0);
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

// Of x, to stay in the first-level cache while a chunk's rows of W pass by.
constexpr int64_t CACHED_BYTES = 24 << 10;

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

// ---- dense products

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

inline float sum_of(Floats v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// WIDE rows of W by ROWS rows of x: lane i of a sum has the columns i, i + 8, i + 16 and so on, in order.
template <class N, int WIDE, int ROWS>
void tile_times(const typename N::Type* w, int64_t k, const float* x, const float* bias, float* y, int64_t n) {
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
        UNROLL for (int c = 0; c < WIDE; c++) y[r * n + c] = sum_of(sums[c][r]) + (bias ? bias[c] : 0.0f);
}

template <class N, int WIDE>
void rows_times(const typename N::Type* w, int64_t k, const float* x, int64_t start, int64_t stop,
                const float* bias, float* y, int64_t n) {
    int64_t r = start;
    for (; r + 3 <= stop; r += 3) tile_times<N, WIDE, 3>(w, k, x + r * k, bias, y + r * n, n);
    if (stop - r == 2) tile_times<N, WIDE, 2>(w, k, x + r * k, bias, y + r * n, n);
    if (stop - r == 1) tile_times<N, WIDE, 1>(w, k, x + r * k, bias, y + r * n, n);
}

template <class N>
void dense_times(const void* weight, int64_t first, int64_t last, int64_t k, const float* x, int64_t rows,
                 const float* bias, float* y, int64_t n) {
    const typename N::Type* w = (const typename N::Type*)weight;
    int64_t stride = CACHED_BYTES / (k * 4) / 3 * 3;
    stride = stride < 3 ? 3 : stride;
    for (int64_t start = 0; start < rows; start += stride) {
        const int64_t stop = start + stride < rows ? start + stride : rows;
        int64_t c = first;
        for (; c + 4 <= last; c += 4) rows_times<N, 4>(w + c * k, k, x, start, stop, bias ? bias + c : nullptr, y + c, n);
        for (; c < last; c++) rows_times<N, 1>(w + c * k, k, x, start, stop, bias ? bias + c : nullptr, y + c, n);
    }
}

void dense(int number, const void* weight, int64_t first, int64_t last, int64_t k, const float* x,
           int64_t rows, const float* bias, float* y, int64_t n) {
    switch (number) {
        case F32: return dense_times<Float32>(weight, first, last, k, x, rows, bias, y, n);
        case F16: return dense_times<Float16>(weight, first, last, k, x, rows, bias, y, n);
        case BF16: return dense_times<BFloat16>(weight, first, last, k, x, rows, bias, y, n);
    }
}

}  // namespace

extern const Variant JOIN(VARIANT, _variant) = {TEXT(VARIANT), quantize, quantized, dense};
