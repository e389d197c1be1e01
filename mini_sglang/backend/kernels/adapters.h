// What low-rank adapters add to a product: which rows and columns go together, by the variants' own products, so
// that a row is added up in one order whoever shares the step with it.

#pragma once

#include "kernels.h"

#include <algorithm>
#include <vector>

namespace {

// So many rows of one run, groups first to last of a matrix; part is meant where that is an up.
struct AdapterTask {
    int64_t slot, first_row, last_row, part, first, last;
};

class AdapterScratch {
public:
    std::vector<AdapterTask> tasks;

    // Takes room for a step; the numbers of the adapters that are gone through, once for each row.
    int64_t begin(const Adapt& job) {
        rank_ = 0;
        int64_t numbers = 0, rows = 0;
        for (int64_t i = 0; i < job.runs->count; i++) {
            const AdapterRun& run = job.runs->runs[i];
            const AdapterSlot& slot = job.slots[run.slot];
            rank_ = std::max(rank_, slot.rank);
            rows = std::max(rows, run.last);
            int64_t each = slot.rank * job.k;
            for (int64_t p = 0; p < slot.parts; p++) each += slot.part[p].rank * slot.part[p].n;
            numbers += (run.last - run.first) * each;
        }
        if (middle_.size() < static_cast<size_t>(rows * rank_)) middle_.resize(rows * rank_);
        return numbers;
    }

    void plan_down(const Adapt& job, int64_t together) {
        tasks.clear();
        each_block(job, [&](const AdapterSlot& slot, AdapterTask task) { split(task, slot.rank, together); });
    }

    void plan_up(const Adapt& job, int64_t together) {
        tasks.clear();
        each_block(job, [&](const AdapterSlot& slot, AdapterTask task) {
            for (task.part = 0; task.part < slot.parts; task.part++) {
                const AdapterPart& part = slot.part[task.part];
                const int64_t bytes = std::max<int64_t>(group_bytes(F32, part.rank), 1);
                split(task, part.n, std::max(together, UP_BYTES / bytes));
            }
        });
    }

    void down(const Variant& variant, const Adapt& job, const AdapterTask& task) {
        const AdapterSlot& slot = job.slots[task.slot];
        variant.product(F32, static_cast<const uint8_t*>(slot.down), task.first, task.last, job.k,
                        job.x + task.first_row * job.k, task.last_row - task.first_row, nullptr,
                        middle_.data() + task.first_row * rank_, slot.rank, rank_, Fetching{});
    }

    void up(const Variant& variant, const Adapt& job, const AdapterTask& task) {
        const AdapterSlot& slot = job.slots[task.slot];
        const AdapterPart& part = slot.part[task.part];
        int64_t offset = 0;
        for (int64_t p = 0; p < task.part; p++) offset += slot.part[p].rank;
        const int64_t rows = task.last_row - task.first_row;
        const float* x = middle_.data() + task.first_row * rank_ + offset;
        if (rows > 1 && part.rank < rank_) {
            // Rows of x lie side by side.
            thread_local std::vector<float> gathered;
            gathered.resize(rows * part.rank);
            for (int64_t row = 0; row < rows; row++)
                std::copy_n(x + row * rank_, part.rank, gathered.data() + row * part.rank);
            x = gathered.data();
        }
        float* y = job.y + task.first_row * job.stride + part.first;
        variant.product(F32, static_cast<const uint8_t*>(part.up), task.first, task.last, part.rank, x, rows, y, y,
                        part.n, job.stride, Fetching{});
    }

private:
    static constexpr int64_t ROWS = 32;           // of one task
    static constexpr int64_t UP_BYTES = 16 << 10;  // of one task's part of an up

    template <class Add>
    void each_block(const Adapt& job, Add add) {
        for (int64_t i = 0; i < job.runs->count; i++) {
            const AdapterRun& run = job.runs->runs[i];
            const AdapterSlot& slot = job.slots[run.slot];
            if (!slot.rank) continue;
            for (int64_t row = run.first; row < run.last; row += ROWS)
                add(slot, AdapterTask{run.slot, row, std::min(run.last, row + ROWS), 0, 0, 0});
        }
    }

    void split(AdapterTask task, int64_t n, int64_t together) {
        const int64_t groups = (n + GROUP - 1) / GROUP;
        for (task.first = 0; task.first < groups; task.first += together) {
            task.last = std::min(groups, task.first + together);
            tasks.push_back(task);
        }
    }

    int64_t rank_ = 0;           // of a row of middle_
    std::vector<float> middle_;  // down x
};

}  // namespace
