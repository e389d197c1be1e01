// Attention over the pages of the KV pool, in float32, in place: FlashAttention's running softmax (Dao et al.,
// 2022) over PagedAttention's pages (Kwon et al., 2023), long contexts in spans (Flash-Decoding, Dao et al., 2023).
//
// Every row of queries adds up its keys in one order, in blocks of KEYS within spans of SPAN positions: what it
// gives depends on its own position and its sequence's KV alone, to the bit, be it a decode whose spans are
// shared out, part of a chunk, or one of many.

#pragma once

#include "attention_block.h"

namespace {

// Where the positions from block on lie, in whole rows of the pool, or tiles of LANES rows.
template <class KV>
inline void locate(const Attention& job, const int64_t* pages, int64_t block, int64_t low, int64_t end,
                   const uint8_t** rows) {
    const int64_t each = TILED<KV> ? LANES : 1, bytes = pool_row_bytes(job.pool);
    int64_t position = (block < low ? low : block) / each * each;
    int64_t page = position / job.page_size, offset = position % job.page_size;
    for (int64_t j = 0; j < KEYS; j += each) {
        *rows++ = job.pool.data + (pages[page] * job.page_size + offset) * bytes;
        // Positions that nobody here may see are not read: a neighbour stands in their place.
        if (block + j + each <= low || position + each >= end) continue;
        position += each;
        if ((offset += each) == job.page_size) offset = 0, page++;
    }
}

inline void clear(Partial& partial, int64_t dim) {
    partial.largest = -__builtin_inff();
    memset(partial.totals, 0, sizeof partial.totals);
    memset(partial.values, 0, (size_t)dim * sizeof(float));
}

// Adds a later span to an earlier one and clears it.
inline void merge(Partial& sum, Partial& span, int64_t dim) {
    if (span.largest == -__builtin_inff() && sum_of(load<Floats>(span.totals)) == 0.0f) return;
    const float largest = span.largest > sum.largest ? span.largest : sum.largest;
    const float old = power_of_two(all(sum.largest - largest))[0];
    const float now = power_of_two(all(span.largest - largest))[0];
    auto add = [&](float* to, const float* from) {
        store(to, load<Floats>(to) * old + load<Floats>(from) * now);
    };
    add(sum.totals, span.totals);
    sum.largest = largest;
    for (int64_t d = 0; d < dim; d += LANES) add(sum.values + d, span.values + d);
    clear(span, dim);
}

inline void write(const Partial& partial, float* out, int64_t dim) {
    const float total = sum_of(load<Floats>(partial.totals));
    for (int64_t d = 0; d < dim; d += LANES) store(out + d, load<Floats>(partial.values + d) / total);
}

// What a task reads: of its sequence the positions from begin, a multiple of KEYS, to stop.
struct Reach {
    const int64_t* pages;
    int64_t begins;  // the sequence's first row in the batch
    int64_t start;   // the position of that row
    int64_t low, end;  // positions that one of the task's rows sees, in all spans
    int64_t begin, stop;
};

inline int64_t lowest_seen(const Attention& job, int64_t position) {
    return job.window && position >= job.window ? position - job.window + 1 : 0;
}

inline Reach reach_of(const Attention& job, const AttentionTask& task) {
    const Sequences& sequences = *job.sequences;
    Reach reach;
    reach.pages = sequences.pages + task.sequence * sequences.stride;
    reach.begins = sequences.starts[task.sequence];
    reach.start = sequences.lengths[task.sequence] - (sequences.starts[task.sequence + 1] - reach.begins);
    reach.low = lowest_seen(job, reach.start + task.first_row);
    reach.end = reach.stop = reach.start + task.last_row;
    reach.begin = reach.low / KEYS * KEYS;
    if (task.partials) {
        reach.begin = task.span * SPAN > reach.begin ? task.span * SPAN : reach.begin;
        reach.stop = (task.span + 1) * SPAN < reach.stop ? (task.span + 1) * SPAN : reach.stop;
    }
    return reach;
}

// What the heads of a task read of a block.
template <class KV>
inline Lines lines_of(const Pool& pool, const uint8_t* const* rows, const AttentionTask& task) {
    const int64_t bytes = head_bytes<KV>(pool.head_dim);
    return {task.far, rows, TILED<KV> ? PARTS : KEYS, task.first_head * bytes,
            (pool.kv_heads + task.first_head) * bytes, (task.last_head - task.first_head) * bytes};
}

// upcoming is what the same thread will probably do next, or null.
template <class KV>
void attend_task(const Attention& job, const AttentionTask& task, const AttentionTask* upcoming) {
    const Reach reach = reach_of(job, task);
    const int64_t begins = reach.begins, start = reach.start, stop = reach.stop;
    const int64_t group = job.heads / job.pool.kv_heads, dim = job.pool.head_dim;
    const int64_t heads = (task.last_head - task.first_head) * group;
    const int64_t count = (task.last_row - task.first_row) * heads;
    Partial sums[MAX_PARTIALS], spans[MAX_PARTIALS];
    for (int64_t i = 0; i < count; i++) clear(sums[i], dim), clear(spans[i], dim);
    // Head by head, so that the rows of one KV head follow each other; queries that are rounded are so once for
    // all blocks.
    Item items[MAX_PARTIALS];
    alignas(64) uint16_t queries[PAIRED<KV> ? MAX_PARTIALS * MAX_HEAD_DIM : 1];
    int64_t place = 0;
    for (int64_t head = task.first_head * group; head < task.last_head * group; head += group)
        for (int64_t row = task.first_row; row < task.last_row; row++)
            for (int64_t h = 0; h < group; h++, place++) {
                const float* query = job.query + (begins + row) * job.query_stride + (head + h) * dim;
                uint16_t* rounded = queries + place * dim;
                Item& item = items[place];
                item = {PAIRED<KV> ? (const void*)rounded : query, 1.0f, spans + place, 0, 0};
                if (WHOLE<KV>) {
                    const Steps steps(largest_magnitude(query, dim), 32767.0f);
                    item.unit = steps.size;
                    for (int64_t d = 0; d < dim; d += LANES)
                        store_shorts(rounded + d, steps.whole(load<Floats>(query + d)));
                } else if (PAIRED<KV>) {
                    for (int64_t d = 0; d < dim; d += LANES) store_factors(rounded + d, load<Floats>(query + d));
                }
            }
    const bool several = !task.partials && reach.begin / SPAN < (stop - 1) / SPAN;
    Block turned;
    bool all_whole = false;
    int64_t first_row = task.first_row, last_row = task.last_row;
    const uint8_t* rows[2][KEYS];
    int current = 0;
    if (reach.begin < stop) locate<KV>(job, reach.pages, reach.begin, reach.low, reach.end, rows[current]);
    for (int64_t block = reach.begin; block < stop; block += KEYS, current ^= 1) {
        Lines next;
        if (block + KEYS < stop) {
            locate<KV>(job, reach.pages, block + KEYS, reach.low, reach.end, rows[current ^ 1]);
            next = lines_of<KV>(job.pool, rows[current ^ 1], task);
        } else if (upcoming) {
            const Reach then = reach_of(job, *upcoming);
            if (then.begin < then.stop) {
                locate<KV>(job, then.pages, then.begin, then.low, then.end, rows[current ^ 1]);
                next = lines_of<KV>(job.pool, rows[current ^ 1], *upcoming);
            }
        }
        turned.rows = rows[current];
        // Blocks that all rows see whole follow each other: then nothing changes.
        const bool whole = block + KEYS <= start + task.first_row + 1 &&
                           lowest_seen(job, start + task.last_row - 1) <= block;
        if (!whole || !all_whole) {
            turned.first = KEYS;
            turned.last = 0;
            // Of later rows a block begins and ends later: those that see some of it follow each other.
            first_row = task.last_row, last_row = task.first_row;
            for (int64_t row = task.first_row; row < task.last_row; row++) {
                int64_t from = lowest_seen(job, start + row) - block, to = start + row + 1 - block;
                from = from < 0 ? 0 : from;
                to = to > KEYS ? KEYS : to;
                if (from >= to) continue;
                first_row = row < first_row ? row : first_row;
                last_row = row + 1;
                turned.first = from < turned.first ? (int)from : turned.first;
                turned.last = to > turned.last ? (int)to : turned.last;
                const int64_t each = (task.last_row - task.first_row) * group;
                for (int64_t i = (row - task.first_row) * group; i < count; i += each)
                    for (int64_t h = 0; h < group; h++) items[i + h].first = (int)from, items[i + h].last = (int)to;
            }
        }
        all_whole = whole;
        for (int64_t head = task.first_head; first_row < last_row && head < task.last_head; head++) {
            const int64_t rows_before = (head - task.first_head) * (task.last_row - task.first_row);
            take_keys<KV>(turned, job.pool, head);
            attend_block<KV>(job, turned, head, items + (rows_before + first_row - task.first_row) * group,
                             (int)((last_row - first_row) * group), next);
        }
        if ((block + KEYS) % SPAN == 0 && several)
            for (int64_t i = 0; i < count; i++) merge(sums[i], spans[i], dim);
    }
    place = 0;
    for (int64_t head = task.first_head * group; head < task.last_head * group; head += group)
        for (int64_t row = task.first_row; row < task.last_row; row++)
            for (int64_t h = head; h < head + group; h++, place++) {
                Partial& span = spans[place];
                if (task.partials) {
                    Partial& kept = task.partials[h];
                    kept.largest = span.largest;
                    memcpy(kept.totals, span.totals, sizeof span.totals);
                    memcpy(kept.values, span.values, (size_t)dim * sizeof(float));
                    continue;
                }
                if (several) merge(sums[place], span, dim);
                write(several ? sums[place] : span, job.out + ((begins + row) * job.heads + h) * dim, dim);
            }
}

void attend(const Attention& job, const AttentionTask& task, const AttentionTask* upcoming) {
    switch (job.pool.format) {
        case F32: return attend_task<KV32>(job, task, upcoming);
        case F16: return attend_task<KV16>(job, task, upcoming);
        case BF16: return attend_task<KVB16>(job, task, upcoming);
        case INT8: return attend_task<KV8>(job, task, upcoming);
#if defined(__AVX512BF16__)
        case TILES: return attend_task<KVTiles>(job, task, upcoming);
#endif
#if defined(__AVX512VNNI__)
        case TILES8: return attend_task<KV8Tiles>(job, task, upcoming);
#endif
    }
}

void merge_spans(const Attention& job, int64_t sequence, Partial* partials, int64_t spans) {
    const int64_t dim = job.pool.head_dim;
    float* out = job.out + job.sequences->starts[sequence] * job.heads * dim;
    for (int64_t h = 0; h < job.heads; h++) {
        Partial sum;
        clear(sum, dim);
        for (int64_t span = 0; span < spans; span++) merge(sum, partials[span * job.heads + h], dim);
        write(sum, out + h * dim, dim);
    }
}

}  // namespace
