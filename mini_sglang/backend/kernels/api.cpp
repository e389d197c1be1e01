// The C interface that linear.py calls: the choice of the variant, the threads, packing, attention tasks.

#include "linear.h"
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

    // Rows of something without weights, 8 numbers at a time: by one thread where it would be done before
    // another had begun.
    template <class Job>
    void rows(const Job& job, int64_t width, void (*work)(const Job&, int64_t, int64_t)) {
        if (job.rows * width < 32 << 10) return work(job, 0, job.rows);
        share(job.rows, 4 * width, [&](int64_t first, int64_t last) { work(job, first, last); });
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

void kernels_dense(void* handle, int number, const void* weight, const float* x, const float* bias,
                   float* y, int64_t rows, int64_t n, int64_t k) {
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

// Attention of one step for one layer. Sequence s has the rows starts[s] to starts[s + 1] and lengths[s]
// positions after them; its pages are row s of pages, [sequences, stride]. out is [rows, heads, head_dim].
void kernels_attention(void* handle, const AttentionShape* shape, const float* kv, const int64_t* pages,
                       int64_t stride, const int64_t* starts, const int64_t* lengths, int64_t sequences,
                       const float* query, float* out) {
    Kernels& kernels = *static_cast<Kernels*>(handle);
    std::lock_guard<std::mutex> lock(kernels.busy);
    const int64_t group = shape->heads / shape->kv_heads;
    std::vector<AttentionTask>& tasks = kernels.tasks;
    tasks.clear();
    int64_t scores = 0;
    for (int64_t s = 0; s < sequences; s++) {
        const int64_t count = starts[s + 1] - starts[s];
        scores += count * lengths[s] * shape->heads;
        // All heads of a decode together read its KV in one stream, where there are decodes enough for the
        // threads; a chunk has more from many rows of one head.
        const bool stream = count == 1 && sequences >= 2 * kernels.pool.threads();
        const int64_t heads = stream ? std::min(shape->kv_heads, MAX_PARTIALS / group) : 1;
        const int64_t rows = MAX_PARTIALS / (heads * group);
        // The last rows of a chunk see the most: they are begun first.
        for (int64_t last = count; last > 0; last -= rows)
            for (int64_t head = 0; head < shape->kv_heads; head += heads)
                tasks.push_back({s, std::max<int64_t>(0, last - rows), last, head,
                                 std::min(shape->kv_heads, head + heads)});
    }
    auto run = [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) {
            const int64_t s = tasks[i].sequence, row = starts[s];
            kernels.variant->attend(*shape, tasks[i], kv, pages + s * stride,
                                    lengths[s] - (starts[s + 1] - row), query + row * shape->query_stride,
                                    out + row * shape->heads * shape->head_dim);
        }
    };
    // Less than this is done before another thread would have begun.
    if (scores < 2048) run(0, static_cast<int64_t>(tasks.size()));
    else kernels.share(static_cast<int64_t>(tasks.size()), 64 << 10, run);
}

void kernels_norm(void* handle, const Norm* job) {
    Kernels& kernels = *static_cast<Kernels*>(handle);
    std::lock_guard<std::mutex> lock(kernels.busy);
    kernels.rows(*job, job->width, kernels.variant->norm);
}

void kernels_rotate(void* handle, const Rotate* job) {
    Kernels& kernels = *static_cast<Kernels*>(handle);
    std::lock_guard<std::mutex> lock(kernels.busy);
    kernels.rows(*job, (job->heads + 2 * job->kv_heads) * job->head_dim, kernels.variant->rotate);
}

void kernels_silu_times(void* handle, const SiluTimes* job) {
    Kernels& kernels = *static_cast<Kernels*>(handle);
    std::lock_guard<std::mutex> lock(kernels.busy);
    kernels.rows(*job, 2 * job->width, kernels.variant->silu_times);
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
