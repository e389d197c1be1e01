// The C interface that linear.py calls: the choice of the variant, the threads, packing.

#include "linear.h"
#include "pool.h"

#include <algorithm>
#include <cstring>
#include <mutex>

namespace {

// Rows of x whose int8 copies exist at a time.
constexpr int64_t SLAB = 256;

const Variant* find_variant(const char* wanted) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool vnni = avx2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl");
    const struct {
        const Variant* variant;
        bool supported;
    } choices[] = {{&avx512vnni_variant, vnni}, {&avx2_variant, avx2}, {&generic_variant, true}};
    for (const auto& choice : choices)
        if (choice.supported && (!*wanted || !strcmp(wanted, choice.variant->name))) return choice.variant;
    return nullptr;
#else
    return !*wanted || !strcmp(wanted, generic_variant.name) ? &generic_variant : nullptr;
#endif
}

struct Kernels {
    const Variant* variant;
    Pool pool;
    std::mutex busy;
    std::vector<Activations> scratch;

    Kernels(const Variant* variant, int threads) : variant(variant), pool(threads) {}

    // Splits count things into chunks: several for each thread, none above 64 KiB of weights.
    template <class Work>
    void share(int64_t count, int64_t bytes_each, Work work) {
        int64_t size = std::min(count / (8 * pool.threads()), (64 << 10) / std::max<int64_t>(bytes_each, 1));
        struct Job {
            Work& work;
            int64_t count, size;
        } job = {work, count, std::max<int64_t>(size, 1)};
        pool.run(
            [](void* context, int64_t chunk) {
                Job& job = *static_cast<Job*>(context);
                job.work(chunk * job.size, std::min(job.count, (chunk + 1) * job.size));
            },
            &job, (count + job.size - 1) / job.size);
    }
};

// The file's blocks of one group, interleaved. Rows from n on are zeros.
void pack_group(int format, const uint8_t* blocks, uint8_t* out, int64_t group, int64_t n, int64_t k) {
    const Layout layout = layout_of(format);
    const int64_t count = k / BLOCK / layout.source_blocks;
    memset(out, 0, group_bytes(layout, k / BLOCK));
    for (int64_t b = 0; b < count; b++) {
        uint8_t* header = out;
        uint8_t* tiles = out + layout.header_bytes;
        out = tiles + layout.source_blocks * layout.tile_bytes;
        for (int r = 0; r < GROUP && group * GROUP + r < n; r++) {
            const uint8_t* block = blocks + ((group * GROUP + r) * count + b) * layout.source_bytes;
            memcpy(header + 2 * r, block + (format == Q6_K ? 208 : 0), 2);
            if (layout.header_bytes == 32) memcpy(header + 16 + 2 * r, block + 2, 2);
            for (int t = 0; t < layout.source_blocks; t++) {
                uint8_t* tile = tiles + t * layout.tile_bytes;
                if (format == Q4_K) {
                    // Twelve bytes hold 8 scales and 8 minima: see _scales_and_mins in quant.py.
                    const uint8_t* s = block + 4;
                    tile[r] = t < 4 ? s[t] & 63 : (s[t + 4] & 15) | (s[t - 4] >> 2 & 48);
                    tile[8 + r] = t < 4 ? s[t + 4] & 63 : s[t + 4] >> 4 | (s[t] >> 2 & 48);
                } else if (format == Q6_K) {
                    tile[r] = block[192 + 2 * t];
                    tile[8 + r] = block[193 + 2 * t];
                }
                uint8_t* packed = tile + (layout.source_blocks > 1 ? 16 : 0);
                for (int i = 0; i < BLOCK; i++) {
                    const int at = i % 16 / 4 * 32 + 4 * r + i % 4, high = i / 16;
                    if (format == Q8_0) {
                        packed[i / 4 * 32 + 4 * r + i % 4] = block[2 + i];
                    } else if (format == Q4_K) {
                        packed[at] |= (block[16 + t / 2 * 32 + i] >> 4 * (t % 2) & 15) << 4 * high;
                    } else if (format == Q6_K) {
                        const uint8_t low = block[t / 4 * 64 + t % 2 * 32 + i] >> (t % 4 < 2 ? 0 : 4);
                        const uint8_t top = block[128 + t / 4 * 32 + i] >> 2 * (t % 4) & 3;
                        packed[at] |= (low & 15) << 4 * high;
                        packed[128 + 32 * high + 4 * r + i % 4] |= top << 2 * (i % 16 / 4);
                    } else {
                        packed[at] |= (block[layout.source_bytes - 16 + i % 16] >> 4 * high & 15) << 4 * high;
                    }
                }
            }
        }
    }
}

}  // namespace

extern "C" {

// Null where this CPU has not that variant; an empty name takes the best.
void* kernels_open(int threads, const char* variant) {
    const Variant* found = find_variant(variant);
    return found ? new Kernels(found, threads) : nullptr;
}

void kernels_close(void* handle) {
    Kernels* kernels = static_cast<Kernels*>(handle);
    if (kernels->pool.owned()) delete kernels;
}

const char* kernels_variant(void* handle) { return static_cast<Kernels*>(handle)->variant->name; }

void kernels_dense(void* handle, int number, const void* weight, const float* x, const float* bias, float* y,
                   int64_t rows, int64_t n, int64_t k) {
    Kernels& kernels = *static_cast<Kernels*>(handle);
    std::lock_guard<std::mutex> lock(kernels.busy);
    // Four rows of W are multiplied at a time.
    kernels.share((n + 3) / 4, 4 * k * (number == F32 ? 4 : 2), [&](int64_t first, int64_t last) {
        kernels.variant->dense(number, weight, 4 * first, std::min(n, 4 * last), k, x, rows, bias, y, n);
    });
}

void kernels_quantized(void* handle, int format, const uint8_t* packed, const float* x, const float* bias,
                       float* y, int64_t rows, int64_t n, int64_t k) {
    Kernels& kernels = *static_cast<Kernels*>(handle);
    std::lock_guard<std::mutex> lock(kernels.busy);
    const int64_t blocks = k / BLOCK;
    const size_t needed = std::min(rows, SLAB) * blocks;
    if (kernels.scratch.size() < needed) kernels.scratch.resize(needed);
    Activations* quantized = kernels.scratch.data();
    for (int64_t start = 0; start < rows; start += SLAB, x += SLAB * k, y += SLAB * n) {
        const int64_t count = std::min(SLAB, rows - start);
        auto quantize = [&](int64_t first, int64_t last) {
            kernels.variant->quantize(x + first * k, (last - first) * blocks, quantized + first * blocks);
        };
        if (count < 16) quantize(0, count);
        else kernels.share(count, 4 * k, quantize);
        kernels.share((n + GROUP - 1) / GROUP, group_bytes(layout_of(format), blocks),
                      [&](int64_t first, int64_t last) {
                          kernels.variant->quantized(format, packed, first, last, blocks, quantized, count,
                                                     bias, y, n);
                      });
    }
}

// Bytes of the packed form of a matrix [n, k]; 0 for a format without a kernel.
int64_t kernels_packed_bytes(int format, int64_t n, int64_t k) {
    const Layout layout = layout_of(format);
    return layout.tile_bytes ? (n + GROUP - 1) / GROUP * group_bytes(layout, k / BLOCK) : 0;
}

void kernels_pack(void* handle, int format, const uint8_t* blocks, uint8_t* packed, int64_t n, int64_t k) {
    Kernels& kernels = *static_cast<Kernels*>(handle);
    std::lock_guard<std::mutex> lock(kernels.busy);
    const int64_t bytes = group_bytes(layout_of(format), k / BLOCK);
    kernels.share((n + GROUP - 1) / GROUP, bytes, [&](int64_t first, int64_t last) {
        for (int64_t g = first; g < last; g++) pack_group(format, blocks, packed + g * bytes, g, n, k);
    });
}

// The opposite of kernels_pack for the rows ids, as blocks of the file: [count, bytes of a row]. False, and
// nothing done, where an id is no row.
bool kernels_unpack(int format, const uint8_t* packed, const int64_t* ids, uint8_t* out, int64_t count,
                    int64_t n, int64_t k) {
    if (!std::all_of(ids, ids + count, [n](int64_t id) { return 0 <= id && id < n; })) return false;
    const Layout layout = layout_of(format);
    const int64_t bytes = group_bytes(layout, k / BLOCK);
    memset(out, 0, count * (k / BLOCK / layout.source_blocks) * layout.source_bytes);
    for (int64_t row = 0; row < count; row++) {
        const int r = ids[row] % GROUP;
        const uint8_t* header = packed + ids[row] / GROUP * bytes;
        for (int64_t b = 0; b < k / BLOCK / layout.source_blocks; b++, out += layout.source_bytes) {
            const uint8_t* tiles = header + layout.header_bytes;
            memcpy(out + (format == Q6_K ? 208 : 0), header + 2 * r, 2);
            if (layout.header_bytes == 32) memcpy(out + 2, header + 16 + 2 * r, 2);
            header = tiles + layout.source_blocks * layout.tile_bytes;
            for (int t = 0; t < layout.source_blocks; t++) {
                const uint8_t* tile = tiles + t * layout.tile_bytes;
                const uint8_t* codes = tile + (layout.source_blocks > 1 ? 16 : 0);
                if (format == Q4_K) {
                    uint8_t* s = out + 4;
                    const uint8_t scale = tile[r], minimum = tile[8 + r];
                    if (t < 4) {
                        s[t] |= scale;
                        s[t + 4] |= minimum;
                    } else {
                        s[t + 4] |= (scale & 15) | minimum << 4;
                        s[t - 4] |= scale >> 4 << 6;
                        s[t] |= minimum >> 4 << 6;
                    }
                } else if (format == Q6_K) {
                    out[192 + 2 * t] = tile[r];
                    out[193 + 2 * t] = tile[8 + r];
                }
                for (int i = 0; i < BLOCK; i++) {
                    const uint8_t code = codes[i % 16 / 4 * 32 + 4 * r + i % 4] >> 4 * (i / 16) & 15;
                    if (format == Q8_0) {
                        out[2 + i] = codes[i / 4 * 32 + 4 * r + i % 4];
                    } else if (format == Q4_K) {
                        out[16 + t / 2 * 32 + i] |= code << 4 * (t % 2);
                    } else if (format == Q6_K) {
                        const uint8_t top = codes[128 + 32 * (i / 16) + 4 * r + i % 4] >> 2 * (i % 16 / 4) & 3;
                        out[t / 4 * 64 + t % 2 * 32 + i] |= code << (t % 4 < 2 ? 0 : 4);
                        out[128 + t / 4 * 32 + i] |= top << 2 * (t % 4);
                    } else {
                        out[layout.source_bytes - 16 + i % 16] |= code << 4 * (i / 16);
                    }
                }
            }
        }
    }
    return true;
}

}  // extern "C"
