// The C interface that library.py calls: the threads, who does what part of a job.

#include "adapters.h"
#include "cpu.h"
#include "kernels.h"
#include "kv_ahead.h"
#include "pack.h"
#include "pool.h"

#include <algorithm>
#include <exception>
#include <mutex>

namespace {

// Rows of x that are prepared at a time.
constexpr int64_t SLAB = 512;
// Rows whose products leave memory time for something else.
constexpr int64_t MANY = 8;
// Numbers that one thread has gone through before another would have begun.
constexpr int64_t ALONE = 12 << 10;
// Of a product to come what a thread fetches at most while it has nothing to do, of its second-level cache a part.
constexpr int64_t FETCHED = 128 << 10;

struct Kernels {
    const Variant* variant;
    ThreadPool pool;
    std::mutex busy;
    std::vector<uint8_t> prepared;
    std::vector<AttentionTask> tasks;
    std::vector<Partial> partials;
    AdapterScratch adapters;
    KVAhead kv_ahead;
    const bool far = fetches_far();

    Kernels(const Variant* variant, int threads) : variant(variant), pool(threads), kv_ahead(threads) {}

    // How count things are split into chunks: several for each thread, none above 64 KiB of weights, or as much work.
    struct Split {
        int64_t count, size, chunks;
    };
    Split split(int64_t count, int64_t bytes_each) const {
        const int64_t most = std::min(count / (8 * pool.threads()), (64 << 10) / std::max<int64_t>(bytes_each, 1));
        const int64_t size = std::max<int64_t>(most, 1);
        return {count, size, (count + size - 1) / size};
    }

    template <class Work>
    void share(int64_t count, int64_t bytes_each, Work work) {
        struct Chunks {
            Work& work;
            Split split;
        } chunks = {work, split(count, bytes_each)};
        pool.run(
            [](void* context, int64_t chunk, int thread) {
                Chunks& chunks = *static_cast<Chunks*>(context);
                const Split& split = chunks.split;
                const int64_t first = chunk * split.size, last = std::min(split.count, first + split.size);
                chunks.work(first, last, thread);
            },
            &chunks, chunks.split.chunks);
    }

    // What product() works on together of a matrix: bytes of it, and what to share its rows' work by.
    struct Units {
        int64_t groups, together, count, bytes, work;
    };
    Units units_of(const Product& job, int64_t rows) const {
        const int format = static_cast<int>(job.format);
        const int64_t groups = (job.n + GROUP - 1) / GROUP, together = variant->groups_together(format);
        const int64_t bytes = together * group_bytes(format, job.k);
        return {groups, together, (groups + together - 1) / together, bytes, bytes * std::max<int64_t>(rows / 16, 1)};
    }

    // Whoever waits from now on fetches what it will begin this product with.
    void expect(const Product& next, int64_t rows) {
        const Units units = units_of(next, std::min(rows, SLAB));
        const Split parts = split(units.count, units.work);
        const uint8_t* const weight = static_cast<const uint8_t*>(next.weight);
        auto begin = [&](int thread) {
            return std::min(pool.first_chunk(thread, parts.chunks) * parts.size, units.count) * units.bytes;
        };
        for (int i = 0; i < pool.threads(); i++)
            pool.fetch_meanwhile(i, weight + begin(i), weight + std::min(begin(i + 1), begin(i) + FETCHED));
    }

    void expect_none() {
        for (int i = 0; i < pool.threads(); i++) pool.fetch_meanwhile(i, nullptr, nullptr);
    }

    // What the products between this entry, be it an attention, and the next attention fetch for that.
    void look_ahead(const Entry* entry, const Entry* end, int64_t rows) {
        kv_ahead.end_plan();
        int64_t multiplications = 0;
        for (entry += entry->kind == ATTENTION; entry < end && entry->kind != ATTENTION; entry++)
            if (entry->kind == PRODUCT) {
                const Product& job = *static_cast<const Product*>(entry->job);
                multiplications += job.n * job.k * rows;
            }
        if (rows >= MANY && entry < end) kv_ahead.plan(*static_cast<const Attention*>(entry->job), multiplications);
    }

    void run(const Product& job, int64_t rows) {
        const int format = static_cast<int>(job.format);
        const uint8_t* weight = static_cast<const uint8_t*>(job.weight);
        const size_t needed = variant->prepared_bytes(format, std::min(rows, SLAB), job.k);
        if (prepared.size() < needed + 64) prepared.resize(needed + 64);
        uint8_t* const aligned = prepared.data() + (-reinterpret_cast<uintptr_t>(prepared.data()) & 63);
        for (int64_t start = 0; start < rows; start += SLAB) {
            const int64_t count = std::min(SLAB, rows - start);
            const float* plain = job.x + start * job.k;
            const void* x = plain;
            if (needed) {
                x = aligned;
                auto prepare = [&](int64_t first, int64_t last, int) {
                    variant->prepare(format, plain, first, last, count, job.k, aligned);
                };
                if (count * job.k < ALONE) prepare(0, count, 0);
                else share(count, 4 * job.k, prepare);
            }
            const Units units = units_of(job, count);
            share(units.count, units.work, [&](int64_t first, int64_t last, int thread) {
                variant->product(format, weight, units.together * first, std::min(units.groups, units.together * last),
                                 job.k, x, count, job.bias, job.y + start * job.stride, job.n, job.stride,
                                 {far, kv_ahead.of(thread)});
            });
        }
    }

    void run(const Embed& job, int64_t rows) { each_row(job, rows, job.k, variant->embed); }
    void run(const Norm& job, int64_t rows) { each_row(job, rows, job.width, variant->norm); }
    void run(const Rotate& job, int64_t rows) {
        each_row(job, rows, (job.heads + 2 * job.pool.kv_heads) * job.pool.head_dim, variant->rotate);
    }
    void run(const SiluAndMul& job, int64_t rows) { each_row(job, rows, 2 * job.width, variant->silu_and_mul); }

    void run(const Attention& job) {
        const Sequences& sequences = *job.sequences;
        const int64_t kv_heads = job.pool.kv_heads, group = job.heads / kv_heads;
        tasks.clear();
        int64_t scores = 0, split = 0;
        auto rows_of = [&](int64_t s) { return sequences.starts[s + 1] - sequences.starts[s]; };
        auto first_span = [&](int64_t s) {
            return job.window ? std::max<int64_t>(0, sequences.lengths[s] - job.window) / SPAN : 0;
        };
        auto spans_of = [&](int64_t s) { return (sequences.lengths[s] - 1) / SPAN + 1 - first_span(s); };
        int64_t decodes = 0;
        for (int64_t s = 0; s < sequences.count; s++)
            if (rows_of(s) == 1) decodes += spans_of(s), split += spans_of(s) > 1 ? spans_of(s) : 0;
        if (partials.size() < static_cast<size_t>(split * job.heads)) partials.resize(split * job.heads);
        Partial* next = partials.data();
        for (int64_t s = 0; s < sequences.count; s++) {
            const int64_t rows = rows_of(s);
            scores += rows * sequences.lengths[s] * job.heads;
            // All heads of a decode together read its KV in one stream, where there are decodes enough for
            // the threads; a chunk has more from many rows of one head.
            const bool stream = rows == 1 && decodes >= 2 * pool.threads();
            const int64_t heads = stream ? std::min(kv_heads, MAX_PARTIALS / group) : 1;
            const int64_t size = MAX_PARTIALS / (heads * group);
            const bool spans = rows == 1 && spans_of(s) > 1;
            // The last rows of a chunk see the most: they are begun first.
            for (int64_t last = rows; last > 0; last -= size)
                for (int64_t head = 0; head < kv_heads; head += heads) {
                    AttentionTask task = {s,    std::max<int64_t>(0, last - size),  last,
                                          head, std::min(kv_heads, head + heads), 0,
                                          nullptr, far};
                    if (!spans) tasks.push_back(task);
                    for (int64_t span = 0; spans && span < spans_of(s); span++) {
                        task.span = first_span(s) + span;
                        task.partials = next + span * job.heads;
                        tasks.push_back(task);
                    }
                }
            if (spans) next += spans_of(s) * job.heads;
        }
        auto attend = [&](int64_t first, int64_t last, int) {
            for (int64_t i = first; i < last; i++)
                variant->attend(job, tasks[i], i + 1 < static_cast<int64_t>(tasks.size()) ? &tasks[i + 1] : nullptr);
        };
        // Less than this is done before another thread would have begun.
        if (scores < 2048) attend(0, static_cast<int64_t>(tasks.size()), 0);
        else share(static_cast<int64_t>(tasks.size()), 64 << 10, attend);
        next = partials.data();
        for (int64_t s = 0; s < sequences.count; s++)
            if (rows_of(s) == 1 && spans_of(s) > 1) {
                variant->merge_spans(job, s, next, spans_of(s));
                next += spans_of(s) * job.heads;
            }
    }

    void run(const Adapt& job) {
        const int64_t numbers = adapters.begin(job);
        if (!numbers) return;
        auto stage = [&](auto work) {
            auto tasks = [&](int64_t first, int64_t last, int) {
                for (int64_t i = first; i < last; i++) work(adapters.tasks[i]);
            };
            const int64_t count = static_cast<int64_t>(adapters.tasks.size());
            if (numbers < ALONE) tasks(0, count, 0);
            else share(count, 64 << 10, tasks);
        };
        const int together = variant->groups_together(F32);
        adapters.plan_down(job, together);
        stage([&](const AdapterTask& task) { adapters.down(*variant, job, task); });
        adapters.plan_up(job, together);
        stage([&](const AdapterTask& task) { adapters.up(*variant, job, task); });
    }

private:
    // Rows without weights: by one thread where it would be done before another had begun.
    template <class Fields>
    void each_row(const Fields& job, int64_t rows, int64_t width,
                  void (*work)(const Fields&, int64_t, int64_t)) {
        if (rows * width < ALONE) return work(job, 0, rows);
        share(rows, 4 * width, [&](int64_t first, int64_t last, int) { work(job, first, last); });
    }
};

}  // namespace

extern "C" {

// Null where the library has not that variant for this CPU, or the threads cannot be started; an empty name
// takes the best.
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
    const Entry* const end = entries + count;
    kernels.kv_ahead.begin();
    auto is_product = [](const Entry& entry) { return entry.kind == PRODUCT; };
    for (const Entry* entry = entries; entry < end; entry++) {
        const void* job = entry->job;
        if (is_product(*entry)) {
            const Entry* next = std::find_if(entry + 1, end, is_product);
            if (next < end) kernels.expect(*static_cast<const Product*>(next->job), rows);
            else kernels.expect_none();
        }
        if (entry == entries || entry->kind == ATTENTION) kernels.look_ahead(entry, end, rows);
        switch (entry->kind) {
            case PRODUCT: kernels.run(*static_cast<const Product*>(job), rows); break;
            case ATTENTION: kernels.run(*static_cast<const Attention*>(job)); break;
            case NORM: kernels.run(*static_cast<const Norm*>(job), rows); break;
            case ROTATE: kernels.run(*static_cast<const Rotate*>(job), rows); break;
            case EMBED: kernels.run(*static_cast<const Embed*>(job), rows); break;
            case ADAPT: kernels.run(*static_cast<const Adapt*>(job)); break;
            case SILU_AND_MUL: kernels.run(*static_cast<const SiluAndMul*>(job), rows); break;
        }
    }
}

// Bytes of the packed form of a matrix [n, k]; 0 for a format without a kernel.
int64_t kernels_packed_bytes(int format, int64_t n, int64_t k) {
    return layout_of(format).tile_bytes ? (n + GROUP - 1) / GROUP * group_bytes(format, k) : 0;
}

// rows are those of the file, [n, bytes of a row].
void kernels_pack(void* handle, int format, const uint8_t* rows, uint8_t* packed, int64_t n, int64_t k) {
    Kernels& kernels = *static_cast<Kernels*>(handle);
    std::lock_guard<std::mutex> lock(kernels.busy);
    const int64_t bytes = group_bytes(format, k);
    kernels.share((n + GROUP - 1) / GROUP, bytes, [&](int64_t first, int64_t last, int) {
        for (int64_t g = first; g < last; g++) pack_group(format, rows, packed + g * bytes, g, n, k);
    });
}

// Rows ids of a packed matrix as the file has them; false, and nothing done, where an id is no row.
bool kernels_unpack(int format, const uint8_t* packed, const int64_t* ids, uint8_t* out, int64_t count,
                    int64_t n, int64_t k) {
    if (!std::all_of(ids, ids + count, [n](int64_t id) { return 0 <= id && id < n; })) return false;
    unpack_rows(format, packed, ids, out, count, k);
    return true;
}

}  // extern "C"
