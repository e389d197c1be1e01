// What threads would fetch of the KV before an attention, for test_kv_ahead.py.

#include "api.cpp"

const Variant generic_variant = {};

// The distances of the lines that each thread has fetched when it has done some of the multiplications that were
// planned with, in steps: counts[thread] of them side by side in lines; how many in all. Of the sequences from first to
// before last. The job before, or null, is of another layer of the same step, or of another step.
extern "C" int64_t lines_ahead(const Attention* before, bool same_step, const Attention* job, int threads, int64_t first,
                               int64_t last, int64_t limit, int64_t planned, int64_t done, int64_t step, int64_t* lines,
                               int64_t* counts) {
    KVAhead ahead(threads, limit);
    if (before) ahead.plan(*before, planned);
    if (!same_step) ahead.begin(first, last);
    ahead.plan(*job, planned);
    int64_t total = 0;
    for (int thread = 0; thread < threads; thread++) {
        counts[thread] = 0;
        Aside* aside = ahead.of(thread);
        for (int64_t at = 0; aside && at < done; at += step) {
            // A step fetches whole runs of lines: what of the run it was in, runs that it went through, what of the
            // run that it is in now.
            const uint8_t* from = aside->at;
            const uint8_t* stop = aside->stop;
            const Run* run = aside->run;
            aside->fetch(step);
            auto add = [&](const uint8_t* first, const uint8_t* last) {
                for (; first < last; first += 64, counts[thread]++) lines[total++] = first - aside->base;
            };
            if (run == aside->run) {
                add(from, aside->at);
                continue;
            }
            add(from, stop);
            for (; run + 1 < aside->run; run++) add(aside->base + run->from, aside->base + run->from + run->bytes);
            add(aside->base + run->from, aside->at);
        }
    }
    return total;
}

// Where the KV begins that two threads fetch from the job at an index on, or null, and at which rate.
extern "C" const uint8_t* looked_ahead(const Entry* entries, int64_t count, int64_t index, int64_t rows,
                                       int64_t* rate) {
    ThreadPool pool(2);
    Part part(&generic_variant, pool, false, false);
    part.range = {0, rows, 0, INT64_MAX};
    part.look_ahead(entries, entries + count);
    if (index) part.look_ahead(entries + index, entries + count);
    const Aside* aside = part.kv_ahead.of(1);
    *rate = aside ? aside->rate : 0;
    return aside ? aside->base : nullptr;
}
