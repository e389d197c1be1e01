// The products, attention and what stands between them: compiled once for each instruction set, named by VARIANT.
//
// Nothing here comes from the C++ library: its inline functions, compiled for AVX, could be the copies that
// the linker keeps for everybody.

#include "attention.h"
#include "dense.h"
#include "quantized.h"
#include "rounding.h"

namespace {

#if defined(__AVX512BF16__)
constexpr bool HAS_BF16 = true;
#else
constexpr bool HAS_BF16 = false;
#endif

int groups_together(int format) { return is_dense(format) ? WIDE : LANES == 16 ? 2 : 1; }

int64_t prepared_bytes(int format, int64_t rows, int64_t k) {
    if (format == BF16 && HAS_BF16) return rows * (k + k % 2) * 2;
    if (is_dense(format)) return 0;
    const int64_t panel = panel_of(format, rows);
    return (rows + panel - 1) / panel * panel * (k / BLOCK) * (int64_t)sizeof(Activations);
}

void prepare(int format, const float* x, int64_t first, int64_t last, int64_t rows, int64_t k, void* out) {
    if (!is_dense(format)) return quantize(x, first, last, k, panel_of(format, rows), (Activations*)out);
#if defined(__AVX512BF16__)
    to_bfloats(x, first, last, k, (uint16_t*)out);
#endif
}

void product(int format, const uint8_t* packed, int64_t first, int64_t last, int64_t k, const void* x,
             int64_t rows, const float* bias, float* y, int64_t n, int64_t stride, Fetching fetching) {
    auto quantized = [&](auto groups) {
        groups(packed, first, last, k, (const Activations*)x, rows, bias, y, n, stride, fetching);
    };
    auto dense = [&](auto groups) {
        groups(packed, first, last, k, (const float*)x, rows, bias, y, n, stride, fetching);
    };
    switch (format) {
        case F32: return dense(dense_times<Float32>);
        case F16: return dense(dense_times<Float16>);
#if defined(__AVX512BF16__)
        case BF16:
            return dense_groups(packed, group_bytes(BF16, k), first, last, k + k % 2, (const uint16_t*)x, rows,
                                bias, y, n, stride, fetching, [](auto count, auto groups, auto fetches) {
                                    return bfloat_tile<(int)decltype(count)::value, (int)decltype(groups)::value,
                                                       (bool)decltype(fetches)::value>;
                                });
#else
        case BF16: return dense(dense_times<BFloat16>);
#endif
        case Q4_0: return quantized(groups_times<TileQ4_0>);
        case Q4_1: return quantized(groups_times<TileQ4_1>);
        case Q8_0: return quantized(groups_times<TileQ8_0>);
        case Q4_K: return quantized(groups_times<TileQ4_K>);
        case Q6_K: return quantized(groups_times<TileQ6_K>);
    }
}

void embed(const Embed& job, int64_t first, int64_t last) {
    switch (job.format) {
        case F32: return dense_rows<Float32>(job, first, last);
        case F16: return dense_rows<Float16>(job, first, last);
        case BF16: return dense_rows<BFloat16>(job, first, last);
        case Q4_0: return block_rows<TileQ4_0>(job, first, last);
        case Q4_1: return block_rows<TileQ4_1>(job, first, last);
        case Q8_0: return block_rows<TileQ8_0>(job, first, last);
        case Q4_K: return block_rows<TileQ4_K>(job, first, last);
        case Q6_K: return block_rows<TileQ6_K>(job, first, last);
    }
}

}  // namespace

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)

extern const Variant JOIN(VARIANT, _variant) = {
    TEXT(VARIANT), groups_together, prepared_bytes, prepare, product, embed, attend, merge_spans, norm, rotate, silu_and_mul};
