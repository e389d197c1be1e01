// The KV that the next attention of a step will read: products of many rows, which leave memory time, fetch it into
// the caches on their way. Attention by itself waits for memory.

#pragma once

#include "kernels.h"

#include <unistd.h>

#include <algorithm>
#include <vector>

namespace {

class KVAhead {
public:
    KVAhead(int threads, int64_t bytes) : limit_(bytes / threads), asides_(threads) {}

    // Half of the last cache, which others use too; a virtual machine may be told of more than it has.
    static int64_t cache_bytes() {
        int64_t bytes = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
        bytes = sysconf(_SC_LEVEL3_CACHE_SIZE) / 2;
#endif
        return std::min<int64_t>(std::max<int64_t>(bytes, 1 << 20), 16 << 20);
    }

    // Of one thread; null where there is nothing to be fetched.
    Aside* of(int thread) { return planned_ ? &asides_[thread] : nullptr; }

    // The sequences are those of another step, or others of it: from first on and before last.
    void begin(int64_t first = 0, int64_t last = INT64_MAX) {
        runs_.clear();
        planned_ = false;
        first_ = first, last_ = last;
    }

    void end_plan() { planned_ = false; }

    // For this attention, by products of so many multiplications in all.
    void plan(const Attention& job, int64_t multiplications) {
        // Layers differ in where their pool begins, and few in what their rows see.
        if (runs_.empty() || job.window != window_) find(job);
        window_ = job.window;
        planned_ = true;
        const int64_t threads = asides_.size(), count = runs_.size();
        for (int64_t i = 0; i < threads; i++) {
            // About what the thread will attend, of that what comes first: more would push it out of the caches.
            const Run* const first = runs_.data() + count * i / threads;
            const Run* const last = runs_.data() + count * (i + 1) / threads;
            const Run* end = first;
            int64_t lines = 0;
            while (end < last && (lines + end->lines()) * 64 <= limit_) lines += end++->lines();
            const int64_t own = std::max<int64_t>(multiplications / threads, 1);
            asides_[i] = {job.pool.data, first, end, nullptr, nullptr, 0, (lines * Aside::LINE + own - 1) / own};
        }
    }

private:
    // Every position that one of a sequence's rows sees, page by page, but for those that a chunk itself writes before.
    void find(const Attention& job) {
        const Sequences& sequences = *job.sequences;
        const int64_t row_bytes = pool_row_bytes(job.pool), each = in_tiles(job.pool) ? GROUP : 1;
        runs_.clear();
        for (int64_t s = first_; s < std::min(last_, sequences.count); s++) {
            const int64_t rows = sequences.starts[s + 1] - sequences.starts[s], length = sequences.lengths[s];
            const int64_t low = job.window ? std::max<int64_t>(0, length - rows + 1 - job.window) : 0;
            const int64_t end = rows == 1 ? length : length - rows;
            for (int64_t at = low / each * each; at < end;) {
                const int64_t page = at / job.page_size, offset = at % job.page_size;
                const int64_t count = std::min((end - at + each - 1) / each * each, job.page_size - offset);
                const int64_t row = sequences.pages[s * sequences.stride + page] * job.page_size + offset;
                runs_.push_back({row * row_bytes, count * row_bytes});
                at += count;
            }
        }
    }

    const int64_t limit_;  // of a thread
    bool planned_ = false;
    int64_t window_ = 0;  // that the runs are of
    int64_t first_ = 0, last_ = INT64_MAX;  // sequences
    std::vector<Run> runs_;
    std::vector<Aside> asides_;
};

}  // namespace
