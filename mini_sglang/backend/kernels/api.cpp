// The C interface that library.py calls: the choice of the variant, the threads, who does what part of a job.

#include "kernels.h"
#include "pack.h"
#include "pool.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <mutex>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

// Rows of x whose int8 copies exist at a time.
constexpr int64_t SLAB = 256;

const Variant* find_variant(const char* wanted) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    unsigned a, b, c = 0, d;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
    const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool vnni = avx2 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vl");
    const struct {
        const Variant* variant;
        bool supported;
    } choices[] = {{&avx512vnni_variant, vnni}, {&avx2_variant, avx2}, {&generic_variant, true}};
    for (const auto& choice : choices) {
        if (!choice.supported || !choice.variant) continue;
        if (!*wanted || !strcmp(wanted, choice.variant->name)) return choice.variant;
    }
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
    std::vector<AttentionTask> tasks;

    Kernels(const Variant* variant, int threads) : variant(variant), pool(threads) {}

    // Splits count things into chunks: several for each thread, none above 64 KiB of weights.
    template <class Work>
    void share(int64_t count, int64_t bytes_each, Work work) {
        int64_t size = std::min(count / (8 * pool.threads()), (64 << 10) / std::max<int64_t>(bytes_each, 1));
        struct Chunks {
            Work& work;
            int64_t count, size;
        } chunks = {work, count, std::max<int64_t>(size, 1)};
        pool.run(
            [](void* context, int64_t chunk) {
                Chunks& chunks = *static_cast<Chunks*>(context);
                chunks.work(chunk * chunks.size, std::min(chunks.count, (chunk + 1) * chunks.size));
            },
            &chunks, (count + chunks.size - 1) / chunks.size);
    }

    void run(const Product& job, int64_t rows) { job.packed ? quantized(job, rows) : dense(job, rows); }
    void run(const Norm& job, int64_t rows) { each_row(job, rows, job.width, variant->norm); }
    void run(const Rotate& job, int64_t rows) {
        each_row(job, rows, (job.heads + 2 * job.kv_heads) * job.head_dim, variant->rotate);
    }
    void run(const SiluAndMul& job, int64_t rows) { each_row(job, rows, 2 * job.width, variant->silu_and_mul); }

    void run(const Attention& job) {
        const Sequences& sequences = *job.sequences;
        const int64_t group = job.heads / job.kv_heads;
        tasks.clear();
        int64_t scores = 0;
        for (int64_t s = 0; s < sequences.count; s++) {
            const int64_t rows = sequences.starts[s + 1] - sequences.starts[s];
            scores += rows * sequences.lengths[s] * job.heads;
            // All heads of a decode together read its KV in one stream, where there are decodes enough for
            // the threads; a chunk has more from many rows of one head.
            const bool stream = rows == 1 && sequences.count >= 2 * pool.threads();
            const int64_t heads = stream ? std::min(job.kv_heads, MAX_PARTIALS / group) : 1;
            const int64_t size = MAX_PARTIALS / (heads * group);
            // The last rows of a chunk see the most: they are begun first.
            for (int64_t last = rows; last > 0; last -= size)
                for (int64_t head = 0; head < job.kv_heads; head += heads)
                    tasks.push_back({s, std::max<int64_t>(0, last - size), last, head,
                                     std::min(job.kv_heads, head + heads)});
        }
        auto attend = [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) variant->attend(job, tasks[i]);
        };
        // Less than this is done before another thread would have begun.
        if (scores < 2048) attend(0, static_cast<int64_t>(tasks.size()));
        else share(static_cast<int64_t>(tasks.size()), 64 << 10, attend);
    }

private:
    void dense(const Product& job, int64_t rows) {
        const int number = static_cast<int>(job.format);
        // Four rows of W are multiplied at a time.
        share((job.n + 3) / 4, 4 * job.k * (number == F32 ? 4 : 2), [&](int64_t first, int64_t last) {
            variant->dense(number, job.weight, 4 * first, std::min(job.n, 4 * last), job.k, job.x, rows,
                           job.bias, job.y, job.stride);
        });
    }

    void quantized(const Product& job, int64_t rows) {
        const int format = static_cast<int>(job.format);
        const int64_t blocks = job.k / BLOCK;
        const size_t needed = std::min(rows, SLAB) * blocks;
        if (scratch.size() < needed) scratch.resize(needed);
        Activations* slab = scratch.data();
        for (int64_t start = 0; start < rows; start += SLAB) {
            const int64_t count = std::min(SLAB, rows - start);
            const float* x = job.x + start * job.k;
            auto quantize = [&](int64_t first, int64_t last) {
                variant->quantize(x + first * job.k, (last - first) * blocks, slab + first * blocks);
            };
            if (count < 16) quantize(0, count);
            else share(count, 4 * job.k, quantize);
            share((job.n + GROUP - 1) / GROUP, group_bytes(layout_of(format), blocks),
                  [&](int64_t first, int64_t last) {
                      variant->quantized(format, static_cast<const uint8_t*>(job.weight), first, last, blocks,
                                         slab, count, job.bias, job.y + start * job.stride, job.n,
                                         job.stride);
                  });
        }
    }

    // Rows without weights: by one thread where it would be done before another had begun.
    template <class Fields>
    void each_row(const Fields& job, int64_t rows, int64_t width,
                  void (*work)(const Fields&, int64_t, int64_t)) {
        if (rows * width < 32 << 10) return work(job, 0, rows);
        share(rows, 4 * width, [&](int64_t first, int64_t last) { work(job, first, last); });
    }
};

}  // namespace

extern "C" {

// Null where this CPU has not that variant, or the threads cannot be started; an empty name takes the best.
void* kernels_open(int threads, const char* variant) {
    const Variant* found = find_variant(variant);
    try {
        return found ? new Kernels(found, threads) : nullptr;
    } catch (const std::exception&) {
        return nullptr;
    }
}

void kernels_close(void* handle) {
    Kernels* kernels = static_cast<Kernels*>(handle);
    if (kernels->pool.owned()) delete kernels;
}

const char* kernels_variant(void* handle) { return static_cast<Kernels*>(handle)->variant->name; }

// Does the jobs one after another. x and y of each have so many rows.
void kernels_run(void* handle, const Entry* entries, int64_t count, int64_t rows) {
    Kernels& kernels = *static_cast<Kernels*>(handle);
    std::lock_guard<std::mutex> lock(kernels.busy);
    for (const Entry* entry = entries; entry < entries + count; entry++) {
        const void* job = entry->job;
        switch (entry->kind) {
            case PRODUCT: kernels.run(*static_cast<const Product*>(job), rows); break;
            case ATTENTION: kernels.run(*static_cast<const Attention*>(job)); break;
            case NORM: kernels.run(*static_cast<const Norm*>(job), rows); break;
            case ROTATE: kernels.run(*static_cast<const Rotate*>(job), rows); break;
            case SILU_AND_MUL: kernels.run(*static_cast<const SiluAndMul*>(job), rows); break;
        }
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

// Rows ids of a packed matrix as blocks of the file; false, and nothing done, where an id is no row.
bool kernels_unpack(int format, const uint8_t* packed, const int64_t* ids, uint8_t* out, int64_t count,
                    int64_t n, int64_t k) {
    if (!std::all_of(ids, ids + count, [n](int64_t id) { return 0 <= id && id < n; })) return false;
    unpack_rows(format, packed, ids, out, count, k);
    return true;
}

}  // extern "C"
