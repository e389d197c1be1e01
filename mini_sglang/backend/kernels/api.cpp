// The C interface that library.py calls.

#include "cpu.h"
#include "division.h"
#include "kernels.h"
#include "pack.h"
#include "part.h"
#include "pool.h"

#include <algorithm>
#include <exception>
#include <mutex>

namespace {

struct Kernels {
    const Variant* const variant;
    ThreadPool pool;
    std::mutex busy;
    const bool far = fetches_far();
    Part whole;
    Division division;
    std::vector<Part> parts;  // one for each thread

    Kernels(const Variant* variant, int threads)
        : variant(variant), pool(threads), whole(variant, pool, far, false) {
        parts.reserve(threads);
        for (int i = 0; i < threads; i++) parts.emplace_back(variant, pool, far, true);
    }

    void run(const Entry* entries, const Entry* end, int64_t rows) {
        whole.begin({0, rows, 0, INT64_MAX});
        const auto kind = pool.owned() ? division.find(entries, end, rows, pool.threads()) : Division::NONE;
        if (kind == Division::NONE) return whole.run(entries, end, end);
        for (int i = 0; i < pool.threads(); i++) parts[i].begin(division.ranges()[i]);
        if (kind == Division::BY_SEQUENCES) return apart(entries, end, end);
        // Rows of one sequence wait for each other's KV.
        while (entries < end) {
            const Entry* stop = std::find_if(entries, end, [](const Entry& entry) { return entry.kind == ATTENTION; });
            if (entries < stop) apart(entries, stop, end);
            if (stop < end) whole.run(stop, stop + 1, stop + 1), stop++;
            entries = stop;
        }
    }

    // Each thread all of these jobs for its rows.
    void apart(const Entry* entries, const Entry* stop, const Entry* end) {
        whole.expect_none();
        auto work = [&](int64_t i) { parts[i].run(entries, stop, end); };
        pool.run([](void* context, int64_t i, int) { (*static_cast<decltype(work)*>(context))(i); }, &work,
                 pool.threads());
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
    kernels.run(entries, entries + count, rows);
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
    kernels.whole.share((n + GROUP - 1) / GROUP, bytes, [&](int64_t first, int64_t last, int) {
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
