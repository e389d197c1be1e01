// Some sequences of a step, job by job: each job shared out among the threads, or all of them done by one.

#pragma once

#include "adapters.h"
#include "attention_tasks.h"
#include "kernels.h"
#include "kv_ahead.h"
#include "pool.h"

#include <algorithm>
#include <vector>

namespace {

// Rows of x that are prepared at a time.
constexpr int64_t SLAB = 512;
// Rows whose products leave memory time for something else.
constexpr int64_t MANY = 8;
// Numbers that one thread has gone through before another would have begun.
constexpr int64_t ALONE = 12 << 10;
// The same of an attention's scores.
constexpr int64_t SCORES = 2048;
// Rows whose gates and ups are more than the caches nearby keep until SiLU follows.
constexpr int64_t GATED = 32;
// Of a product to come what a thread fetches at most while it has nothing to do, of its second-level cache a part.
constexpr int64_t FETCHED = 128 << 10;

// Rows of a step, and the sequences that have them.
struct Range {
    int64_t first, last, first_sequence, last_sequence;
    int64_t rows() const { return last - first; }
};

class Part {
public:
    // alone: by the thread that calls, while others do other parts.
    Part(const Variant* variant, ThreadPool& pool, bool far, bool alone)
        : variant(variant), pool(pool), far(far), alone(alone), threads(alone ? 1 : pool.threads()),
          kv_ahead(threads, KVAhead::cache_bytes() * threads / pool.threads()) {}

    // What run() is to do its jobs for.
    void begin(const Range& its) {
        range = its;
        kv_ahead.begin(its.first_sequence, its.last_sequence);
    }

    // Does the jobs before stop one after another; those before end follow.
    void run(const Entry* entries, const Entry* stop, const Entry* end) {
        auto is_product = [](const Entry& entry) { return entry.kind == PRODUCT; };
        for (const Entry* entry = entries; entry < stop; entry++) {
            const void* job = entry->job;
            if (!alone && is_product(*entry)) {
                const Entry* next = std::find_if(entry + 1, end, is_product);
                if (next < end) expect(*static_cast<const Product*>(next->job), is_gated(next, stop));
                else expect_none();
            }
            if (entry == entries || entry->kind == ATTENTION) look_ahead(entry, end);
            if (is_gated(entry, stop)) {
                run(*static_cast<const Product*>(job), *static_cast<const SiluAndMul*>((++entry)->job));
                continue;
            }
            switch (entry->kind) {
                case PRODUCT: run(*static_cast<const Product*>(job)); break;
                case ATTENTION: run(*static_cast<const Attention*>(job)); break;
                case NORM: run(*static_cast<const Norm*>(job)); break;
                case ROTATE: run(*static_cast<const Rotate*>(job)); break;
                case EMBED: run(*static_cast<const Embed*>(job)); break;
                case ADAPT: run(*static_cast<const Adapt*>(job)); break;
                case SILU_AND_MUL: run(*static_cast<const SiluAndMul*>(job)); break;
            }
        }
    }

    void expect_none() {
        for (int i = 0; i < threads; i++) pool.fetch_meanwhile(i, nullptr, nullptr);
    }

    template <class Work>
    void share(int64_t count, int64_t bytes_each, Work work) {
        struct Chunks {
            Work& work;
            Split split;
            void take(int64_t chunk, int thread) {
                const int64_t first = chunk * split.size;
                work(first, std::min(split.count, first + split.size), thread);
            }
        } chunks = {work, split(count, bytes_each)};
        if (alone) {
            for (int64_t chunk = 0; chunk < chunks.split.chunks; chunk++) chunks.take(chunk, 0);
            return;
        }
        pool.run(
            [](void* context, int64_t chunk, int thread) { static_cast<Chunks*>(context)->take(chunk, thread); },
            &chunks, chunks.split.chunks);
    }

    // What the products between this entry, be it an attention, and the next attention fetch for that.
    void look_ahead(const Entry* entry, const Entry* end) {
        kv_ahead.end_plan();
        int64_t multiplications = 0;
        for (entry += entry->kind == ATTENTION; entry < end && entry->kind != ATTENTION; entry++)
            if (entry->kind == PRODUCT) {
                const Product& job = *static_cast<const Product*>(entry->job);
                multiplications += job.n * job.k * range.rows();
            }
        if (range.rows() >= MANY && entry < end)
            kv_ahead.plan(*static_cast<const Attention*>(entry->job), multiplications);
    }

    const Variant* const variant;
    ThreadPool& pool;
    const bool far, alone;
    const int threads;
    Range range = {};
    KVAhead kv_ahead;

private:
    // How count things are split into chunks: several for each thread, none above 64 KiB of weights, or as much work.
    struct Split {
        int64_t count, size, chunks;
    };
    Split split(int64_t count, int64_t bytes_each) const {
        const int64_t most = std::min(count / (8 * threads), (64 << 10) / std::max<int64_t>(bytes_each, 1));
        const int64_t size = std::max<int64_t>(most, 1);
        return {count, size, (count + size - 1) / size};
    }

    // What product() works on together of a matrix, of its gates where their ups go with them: bytes of it, and what
    // to share its rows' work by.
    struct Units {
        int64_t groups, together, count, bytes, work;
    };
    Units units_of(const Product& job, int64_t rows, bool gated) const {
        const int format = static_cast<int>(job.format), parts = gated ? 2 : 1;
        const int64_t groups = (job.n / parts + GROUP - 1) / GROUP, together = variant->groups_together(format);
        const int64_t bytes = together * group_bytes(format, job.k);
        const int64_t work = parts * bytes * std::max<int64_t>(rows / 16, 1);
        return {groups, together, (groups + together - 1) / together, bytes, work};
    }

    // Whether this is a product of gates and ups, of one matrix, and SiLU is next.
    bool is_gated(const Entry* entry, const Entry* stop) const {
        if (range.rows() < GATED || stop - entry < 2 || entry[0].kind != PRODUCT || entry[1].kind != SILU_AND_MUL)
            return false;
        const Product& product = *static_cast<const Product*>(entry[0].job);
        const SiluAndMul& job = *static_cast<const SiluAndMul*>(entry[1].job);
        return product.y == job.gate_up && product.n == 2 * job.width && job.width % GROUP == 0;
    }

    // Whoever waits from now on fetches what it will begin this product with.
    void expect(const Product& next, bool gated) {
        const Units units = units_of(next, std::min(range.rows(), SLAB), gated);
        const Split parts = split(units.count, units.work);
        const uint8_t* const weight = static_cast<const uint8_t*>(next.weight);
        auto begin = [&](int thread) {
            return std::min(pool.first_chunk(thread, parts.chunks) * parts.size, units.count) * units.bytes;
        };
        for (int i = 0; i < threads; i++)
            pool.fetch_meanwhile(i, weight + begin(i), weight + std::min(begin(i + 1), begin(i) + FETCHED));
    }

    // So many rows of x from start on as product() takes them.
    const void* prepared(const Product& job, int64_t start, int64_t count) {
        const int format = static_cast<int>(job.format);
        const float* plain = job.x + start * job.k;
        const size_t needed = variant->prepared_bytes(format, std::min(range.rows(), SLAB), job.k);
        if (!needed) return plain;
        uint8_t* const to = prepared_.of(needed);
        auto prepare = [&](int64_t first, int64_t last, int) {
            variant->prepare(format, plain, first, last, count, job.k, to);
        };
        if (count * job.k < ALONE) prepare(0, count, 0);
        else share(count, 4 * job.k, prepare);
        return to;
    }

    // Groups first to last of the matrix by count rows, to y, where the first of these columns is.
    void multiply(const Product& job, int64_t first, int64_t last, const void* x, int64_t count, float* y,
                  int64_t stride, int thread) {
        const int format = static_cast<int>(job.format);
        const int64_t column = first * GROUP;
        const uint8_t* weight = static_cast<const uint8_t*>(job.weight) + first * group_bytes(format, job.k);
        const float* bias = job.bias ? job.bias + column : nullptr;
        variant->product(format, weight, 0, last - first, job.k, x, count, bias, y, job.n - column, stride,
                         {far, kv_ahead.of(thread)});
    }

    void run(const Product& job) {
        for (int64_t start = range.first; start < range.last; start += SLAB) {
            const int64_t count = std::min(SLAB, range.last - start);
            const void* x = prepared(job, start, count);
            const Units units = units_of(job, count, false);
            share(units.count, units.work, [&](int64_t first, int64_t last, int thread) {
                first *= units.together, last = std::min(units.groups, units.together * last);
                float* y = job.y + start * job.stride + first * GROUP;
                multiply(job, first, last, x, count, y, job.stride, thread);
            });
        }
    }

    // Gates, their ups, and SiLU of them while they are in the caches: of many rows all of them go out to memory.
    void run(const Product& job, const SiluAndMul& next) {
        for (int64_t start = range.first; start < range.last; start += SLAB) {
            const int64_t count = std::min(SLAB, range.last - start);
            const void* x = prepared(job, start, count);
            const Units units = units_of(job, count, true);
            const int64_t most = split(units.count, units.work).size * units.together * GROUP * count;
            float* const gates = reinterpret_cast<float*>(gates_.of(2 * threads * most * sizeof(float)));
            share(units.count, units.work, [&](int64_t first, int64_t last, int thread) {
                first *= units.together, last = std::min(units.groups, units.together * last);
                const int64_t width = (last - first) * GROUP;
                float *gate = gates + 2 * thread * most, *up = gate + most;
                multiply(job, first, last, x, count, gate, width, thread);
                multiply(job, units.groups + first, units.groups + last, x, count, up, width, thread);
                float* out = next.out + start * next.width + first * GROUP;
                variant->silu_and_mul(gate, up, width, out, next.width, count, width);
            });
        }
    }

    void run(const Embed& job) { each_row(job, job.k, variant->embed); }
    void run(const Norm& job) { each_row(job, job.width, variant->norm); }
    void run(const Rotate& job) {
        each_row(job, (job.heads + 2 * job.pool.kv_heads) * job.pool.head_dim, variant->rotate);
    }
    void run(const SiluAndMul& job) {
        each_row(job, 2 * job.width, [this](const SiluAndMul& job, int64_t first, int64_t last) {
            const float* gate = job.gate_up + 2 * first * job.width;
            variant->silu_and_mul(gate, gate + job.width, 2 * job.width, job.out + first * job.width, job.width,
                                  last - first, job.width);
        });
    }

    void run(const Attention& job) {
        attention_.plan(job, range.first_sequence, range.last_sequence, threads, far);
        const std::vector<AttentionTask>& tasks = attention_.tasks;
        const int64_t count = static_cast<int64_t>(tasks.size());
        auto attend = [&](int64_t first, int64_t last, int) {
            for (int64_t i = first; i < last; i++)
                variant->attend(job, tasks[i], i + 1 < count ? &tasks[i + 1] : nullptr);
        };
        if (attention_.scores < SCORES) attend(0, count, 0);
        else share(count, 64 << 10, attend);
        attention_.merge(*variant, job);
    }

    void run(const Adapt& job) {
        const int64_t numbers = adapters_.begin(job);
        if (!numbers) return;
        auto stage = [&](auto work) {
            auto tasks = [&](int64_t first, int64_t last, int) {
                for (int64_t i = first; i < last; i++) work(adapters_.tasks[i]);
            };
            const int64_t count = static_cast<int64_t>(adapters_.tasks.size());
            if (numbers < ALONE) tasks(0, count, 0);
            else share(count, 64 << 10, tasks);
        };
        const int together = variant->groups_together(F32);
        adapters_.plan_down(job, together);
        stage([&](const AdapterTask& task) { adapters_.down(*variant, job, task); });
        adapters_.plan_up(job, together);
        stage([&](const AdapterTask& task) { adapters_.up(*variant, job, task); });
    }

    // Rows without weights: by one thread where it would be done before another had begun.
    template <class Fields, class Work>
    void each_row(const Fields& job, int64_t width, Work work) {
        const int64_t begin = range.first;
        if (range.rows() * width < ALONE) return work(job, begin, range.last);
        share(range.rows(), 4 * width,
              [&](int64_t first, int64_t last, int) { work(job, begin + first, begin + last); });
    }

    // Bytes from the beginning of a cache line on, whose contents are left over.
    class Scratch {
    public:
        uint8_t* of(size_t bytes) {
            if (bytes_.size() < bytes + 64) bytes_.resize(bytes + 64);
            return bytes_.data() + (-reinterpret_cast<uintptr_t>(bytes_.data()) & 63);
        }

    private:
        std::vector<uint8_t> bytes_;
    };

    Scratch prepared_, gates_;
    AttentionTasks attention_;
    AdapterScratch adapters_;
};

}  // namespace
