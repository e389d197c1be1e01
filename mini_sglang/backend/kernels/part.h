// Some sequences of a step, job by job: each job shared out among the threads, or all of them done by one.

#pragma once

#include "adapters.h"
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
                if (next < end) expect(*static_cast<const Product*>(next->job));
                else expect_none();
            }
            if (entry == entries || entry->kind == ATTENTION) look_ahead(entry, end);
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
    void expect(const Product& next) {
        const Units units = units_of(next, std::min(range.rows(), SLAB));
        const Split parts = split(units.count, units.work);
        const uint8_t* const weight = static_cast<const uint8_t*>(next.weight);
        auto begin = [&](int thread) {
            return std::min(pool.first_chunk(thread, parts.chunks) * parts.size, units.count) * units.bytes;
        };
        for (int i = 0; i < threads; i++)
            pool.fetch_meanwhile(i, weight + begin(i), weight + std::min(begin(i + 1), begin(i) + FETCHED));
    }

    void run(const Product& job) {
        const int format = static_cast<int>(job.format);
        const uint8_t* weight = static_cast<const uint8_t*>(job.weight);
        const size_t needed = variant->prepared_bytes(format, std::min(range.rows(), SLAB), job.k);
        if (prepared_.size() < needed + 64) prepared_.resize(needed + 64);
        uint8_t* const aligned = prepared_.data() + (-reinterpret_cast<uintptr_t>(prepared_.data()) & 63);
        for (int64_t start = range.first; start < range.last; start += SLAB) {
            const int64_t count = std::min(SLAB, range.last - start);
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

    void run(const Embed& job) { each_row(job, job.k, variant->embed); }
    void run(const Norm& job) { each_row(job, job.width, variant->norm); }
    void run(const Rotate& job) {
        each_row(job, (job.heads + 2 * job.pool.kv_heads) * job.pool.head_dim, variant->rotate);
    }
    void run(const SiluAndMul& job) { each_row(job, 2 * job.width, variant->silu_and_mul); }

    void run(const Attention& job) {
        const Sequences& sequences = *job.sequences;
        const int64_t kv_heads = job.pool.kv_heads, group = job.heads / kv_heads;
        const int64_t from = range.first_sequence, to = std::min(range.last_sequence, sequences.count);
        tasks_.clear();
        int64_t scores = 0, split = 0;
        auto rows_of = [&](int64_t s) { return sequences.starts[s + 1] - sequences.starts[s]; };
        auto first_span = [&](int64_t s) {
            return job.window ? std::max<int64_t>(0, sequences.lengths[s] - job.window) / SPAN : 0;
        };
        auto spans_of = [&](int64_t s) { return (sequences.lengths[s] - 1) / SPAN + 1 - first_span(s); };
        int64_t decodes = 0;
        for (int64_t s = from; s < to; s++)
            if (rows_of(s) == 1) decodes += spans_of(s), split += spans_of(s) > 1 ? spans_of(s) : 0;
        if (partials_.size() < static_cast<size_t>(split * job.heads)) partials_.resize(split * job.heads);
        Partial* next = partials_.data();
        for (int64_t s = from; s < to; s++) {
            const int64_t rows = rows_of(s);
            scores += rows * sequences.lengths[s] * job.heads;
            // All heads of a decode together read its KV in one stream, where there are decodes enough for
            // the threads; a chunk has more from many rows of one head.
            const bool stream = rows == 1 && decodes >= 2 * threads;
            const int64_t heads = stream ? std::min(kv_heads, MAX_PARTIALS / group) : 1;
            const int64_t size = MAX_PARTIALS / (heads * group);
            const bool spans = rows == 1 && spans_of(s) > 1;
            // The last rows of a chunk see the most: they are begun first.
            for (int64_t last = rows; last > 0; last -= size)
                for (int64_t head = 0; head < kv_heads; head += heads) {
                    AttentionTask task = {s,    std::max<int64_t>(0, last - size),  last,
                                          head, std::min(kv_heads, head + heads), 0,
                                          nullptr, far};
                    if (!spans) tasks_.push_back(task);
                    for (int64_t span = 0; spans && span < spans_of(s); span++) {
                        task.span = first_span(s) + span;
                        task.partials = next + span * job.heads;
                        tasks_.push_back(task);
                    }
                }
            if (spans) next += spans_of(s) * job.heads;
        }
        auto attend = [&](int64_t first, int64_t last, int) {
            for (int64_t i = first; i < last; i++)
                variant->attend(job, tasks_[i], i + 1 < static_cast<int64_t>(tasks_.size()) ? &tasks_[i + 1] : nullptr);
        };
        // Less than this is done before another thread would have begun.
        if (scores < 2048) attend(0, static_cast<int64_t>(tasks_.size()), 0);
        else share(static_cast<int64_t>(tasks_.size()), 64 << 10, attend);
        next = partials_.data();
        for (int64_t s = from; s < to; s++)
            if (rows_of(s) == 1 && spans_of(s) > 1) {
                variant->merge_spans(job, s, next, spans_of(s));
                next += spans_of(s) * job.heads;
            }
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
    template <class Fields>
    void each_row(const Fields& job, int64_t width, void (*work)(const Fields&, int64_t, int64_t)) {
        const int64_t begin = range.first;
        if (range.rows() * width < ALONE) return work(job, begin, range.last);
        share(range.rows(), 4 * width,
              [&](int64_t first, int64_t last, int) { work(job, begin + first, begin + last); });
    }

    std::vector<uint8_t> prepared_;
    std::vector<AttentionTask> tasks_;
    std::vector<Partial> partials_;
    AdapterScratch adapters_;
};

}  // namespace
