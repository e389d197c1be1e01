// A step's rows divided among the threads, each of which goes with its own through job after job: what one thread has
// written is then read by itself, not out of another core's caches, and nobody waits between two jobs. Where whole
// sequences divide evenly, a thread has the attention of its rows too, and one reads KV while another multiplies.

#pragma once

#include "kernels.h"
#include "part.h"

#include <algorithm>
#include <vector>

namespace {

class Division {
public:
    enum Kind { NONE, BY_ROWS, BY_SEQUENCES };

    // Of each thread, where find() found some.
    const std::vector<Range>& ranges() const { return ranges_; }

    // Each thread reads all weights, so that it needs rows enough: the more, the more bytes they have and the more
    // threads do.
    Kind find(const Entry* entries, const Entry* end, int64_t rows, int threads) {
        const int64_t least = ROWS * threads * threads / 2;
        if (threads < 2 || rows < least) return NONE;
        const Attention* attention = nullptr;
        int64_t products = 0, multiplications = 0, bytes = 0, scores = 0;
        for (; entries < end; entries++) {
            if (entries->kind == ADAPT) return NONE;  // it goes by the rows of an adapter
            if (entries->kind == PRODUCT) {
                const Product& job = *static_cast<const Product*>(entries->job);
                products++, multiplications += job.n * job.k;
                bytes += (job.n + GROUP - 1) / GROUP * group_bytes(static_cast<int>(job.format), job.k);
            }
            if (entries->kind == ATTENTION) {
                attention = static_cast<const Attention*>(entries->job);
                scores += 2 * attention->heads * attention->pool.head_dim;
            }
        }
        if (products < 2 || rows * multiplications < bytes * least * 7 / ROWS) return NONE;
        if (attention && by_sequences(*attention->sequences, rows, threads, multiplications, scores)) return BY_SEQUENCES;
        if (rows < threads * MANY_ROWS) return NONE;
        ranges_.clear();
        auto begin = [&](int thread) { return thread == threads ? rows : rows * thread / threads / 4 * 4; };
        for (int i = 0; i < threads; i++) ranges_.push_back({begin(i), begin(i + 1), 0, INT64_MAX});
        return BY_ROWS;
    }

private:
    // Of each of two threads at least, and 7 for each byte of a weight (of bfloat16 8 rows took 1.2 times as long);
    // without the attention it takes more of them until it is worth it.
    enum { ROWS = 8, MANY_ROWS = 128 };
    // A multiplication with KV takes as long as so many with weights: that of a decode waits for memory.
    enum { DECODE = 8, CHUNK = 2 };
    // Of the work that a thread has on average one may have a part more.
    enum { SLACK = 24 };

    // Rows of one sequence see each other's KV in each layer: they stay together.
    bool by_sequences(const Sequences& sequences, int64_t rows, int threads, int64_t multiplications, int64_t scores) {
        if (sequences.count < threads || sequences.starts[sequences.count] != rows) return false;
        auto work_of = [&](int64_t s) {
            const int64_t count = sequences.starts[s + 1] - sequences.starts[s], seen = sequences.lengths[s] - count / 2;
            return count * (multiplications + scores * seen * (count == 1 ? DECODE : CHUNK));
        };
        int64_t total = 0;
        for (int64_t s = 0; s < sequences.count; s++) total += work_of(s);
        ranges_.clear();
        for (int64_t thread = 1, done = 0, s = 0; thread <= threads; thread++) {
            const int64_t first = s, before = done, goal = total / threads * thread;
            // The one that reaches over the goal goes to the side that it lies on more.
            while (s < sequences.count && (thread == threads || done + work_of(s) / 2 <= goal)) done += work_of(s++);
            ranges_.push_back({sequences.starts[first], sequences.starts[s], first, s});
            if (s == first || done - before > (total + total / SLACK) / threads) return false;
        }
        return true;
    }

    std::vector<Range> ranges_;
};

}  // namespace
