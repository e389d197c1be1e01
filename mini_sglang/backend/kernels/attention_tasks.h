// What the attention of some sequences is divided into, for threads to take one by one.

#pragma once

#include "kernels.h"

#include <algorithm>
#include <vector>

namespace {

class AttentionTasks {
public:
    std::vector<AttentionTask> tasks;
    int64_t scores = 0;  // products of a query and a key in all of them

    // Of the sequences from first on and before last.
    void plan(const Attention& job, int64_t first, int64_t last, int threads, bool far) {
        const int64_t kv_heads = job.pool.kv_heads, group = job.heads / kv_heads;
        first_ = first, last_ = std::min(last, job.sequences->count);
        tasks.clear();
        scores = 0;
        int64_t decodes = 0, split = 0;
        for (int64_t s = first_; s < last_; s++)
            if (rows_of(job, s) == 1) decodes += spans_of(job, s), split += in_spans(job, s) ? spans_of(job, s) : 0;
        if (partials_.size() < static_cast<size_t>(split * job.heads)) partials_.resize(split * job.heads);
        Partial* next = partials_.data();
        for (int64_t s = first_; s < last_; s++) {
            const int64_t rows = rows_of(job, s), spans = in_spans(job, s) ? spans_of(job, s) : 0;
            scores += rows * job.sequences->lengths[s] * job.heads;
            // All heads of a decode together read its KV in one stream, where there are decodes enough for
            // the threads; a chunk has more from many rows of one head.
            const bool stream = rows == 1 && decodes >= 2 * threads;
            const int64_t heads = stream ? std::min(kv_heads, MAX_PARTIALS / group) : 1;
            const int64_t size = MAX_PARTIALS / (heads * group);
            // The last rows of a chunk see the most: they are begun first.
            for (int64_t row = rows; row > 0; row -= size)
                for (int64_t head = 0; head < kv_heads; head += heads) {
                    AttentionTask task = {s,    std::max<int64_t>(0, row - size),   row,
                                          head, std::min(kv_heads, head + heads), 0,
                                          nullptr, far};
                    if (!spans) tasks.push_back(task);
                    for (int64_t span = 0; span < spans; span++) {
                        task.span = first_span(job, s) + span;
                        task.partials = next + span * job.heads;
                        tasks.push_back(task);
                    }
                }
            next += spans * job.heads;
        }
    }

    // When all tasks are done: the results of those that were divided by spans.
    void merge(const Variant& variant, const Attention& job) {
        Partial* next = partials_.data();
        for (int64_t s = first_; s < last_; s++)
            if (in_spans(job, s)) {
                variant.merge_spans(job, s, next, spans_of(job, s));
                next += spans_of(job, s) * job.heads;
            }
    }

private:
    static int64_t rows_of(const Attention& job, int64_t s) {
        return job.sequences->starts[s + 1] - job.sequences->starts[s];
    }
    static int64_t first_span(const Attention& job, int64_t s) {
        return job.window ? std::max<int64_t>(0, job.sequences->lengths[s] - job.window) / SPAN : 0;
    }
    static int64_t spans_of(const Attention& job, int64_t s) {
        return (job.sequences->lengths[s] - 1) / SPAN + 1 - first_span(job, s);
    }
    // A decode of several spans.
    static bool in_spans(const Attention& job, int64_t s) { return rows_of(job, s) == 1 && spans_of(job, s) > 1; }

    int64_t first_ = 0, last_ = 0;
    std::vector<Partial> partials_;
};

}  // namespace
