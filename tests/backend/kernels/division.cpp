// How a step is divided among threads, for test_division.py.

#include "api.cpp"

const Variant generic_variant = {};

// The kind, and of each thread first and last row, first and last sequence.
extern "C" int divided(const Entry* entries, int64_t count, int64_t rows, int threads, int64_t* ranges) {
    Division division;
    const auto kind = division.find(entries, entries + count, rows, threads);
    if (kind == Division::NONE) return 0;
    for (const Range& range : division.ranges())
        for (int64_t number : {range.first, range.last, range.first_sequence, range.last_sequence}) *ranges++ = number;
    return kind == Division::BY_ROWS ? 1 : 2;
}
