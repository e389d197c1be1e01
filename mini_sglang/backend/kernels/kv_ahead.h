// The KV that the next attention of a step will read, shared out among the threads: products of many rows, which
// leave memory time, fetch it into the caches. Attention alone would wait for it.

#pragma once

#include "kernels.h"

#include <unistd.h>

#include <algorithm>
#include <vector>

namespace {

class KVAhead {
public:
    explicit KVAhead(int threads) : limit_(cache_bytes() / threads), asides_(threads) {}

    // Of one thread; null where there is nothing to be fetched.
    Aside* of(int thread) { return runs_.empty() ? nullptr : &asides_[thread]; }

    void clear() { runs_.clear(); }

    // What products of so many multiplications in all are to fetch for the attention after them.
    void plan(const Attention& job, int64_t multiplications) {
        const Sequences& sequences = *job.sequences;
        const int64_t row_bytes = pool_row_bytes(job.pool), page_bytes = job.page_size * row_bytes;
        const int64_t each = in_tiles(job.pool) ? GROUP : 1;
        runs_.clear();
        for (int64_t s = 0; s < sequences.count; s++) {
            const int64_t rows = sequences.starts[s + 1] - sequences.starts[s], length = sequences.lengths[s];
            int64_t at = job.window ? std::max<int64_t>(0, length - rows + 1 - job.window) : 0;
            for (at -= at % job.page_size; at < length; at += job.page_size) {
                const int64_t filled = std::min(job.page_size, length - at);
                const int64_t page = sequences.pages[s * sequences.stride + at / job.page_size];
                runs_.push_back({page * page_bytes, (filled + each - 1) / each * each * row_bytes});
            }
        }
        const int64_t threads = asides_.size(), count = runs_.size();
        for (int64_t i = 0; i < threads; i++) {
            const Run *first = runs_.data() + count * i / threads, *last = runs_.data() + count * (i + 1) / threads;
            int64_t bytes = 0;
            const Run* end = first;
            // What is attended first: the rest would push it out of the caches.
            while (end < last && bytes + end->bytes <= limit_) bytes += end++->bytes;
            asides_[i] = {job.pool.data, first, end, nullptr, nullptr, 0, bytes / 64 * threads * Aside::LINE / std::max<int64_t>(multiplications, 1)};
        }
    }

private:
    // Half of the last cache: others use it too.
    static int64_t cache_bytes() {
        int64_t bytes = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
        bytes = sysconf(_SC_LEVEL3_CACHE_SIZE) / 2;
#endif
        return std::max<int64_t>(bytes, 1 << 20);
    }

    const int64_t limit_;  // of a thread
    std::vector<Run> runs_;
    std::vector<Aside> asides_;
};

}  // namespace
