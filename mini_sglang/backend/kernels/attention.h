// Attention over the pages of the KV pool, in float32, in place: FlashAttention's running softmax (Dao et al.,
// 2022) over PagedAttention's pages (Kwon et al., 2023), long contexts in spans (Flash-Decoding, Dao et al., 2023).
//
// Every row of queries adds up its keys in one order, in blocks of KEYS within spans of SPAN positions: what it
// gives depends on its own position and its sequence's KV alone, to the bit, be it a decode whose spans are
// shared out, part of a chunk, or one of many.

#pragma once

#include "elementwise.h"

namespace {

struct KV32 {
    static constexpr int FORMAT = F32, BYTES = 4;
    static Floats numbers(const uint8_t* p) { return load<Floats>(p); }
    static Eights eight(const uint8_t* p) { return load<Eights>(p); }
};
struct KV16 {
    static constexpr int FORMAT = F16, BYTES = 2;
    static Floats numbers(const uint8_t* p) { return halves(p); }
    static Eights eight(const uint8_t* p) { return eight_halves(p); }
};
struct KVB16 {
    static constexpr int FORMAT = BF16, BYTES = 2;
    static Floats numbers(const uint8_t* p) { return bfloats(p); }
    static Eights eight(const uint8_t* p) { return eight_bfloats(p); }
};
struct KV8 {
    static constexpr int FORMAT = INT8, BYTES = 1;
    static Floats numbers(const uint8_t* p) { return bytes((const int8_t*)p); }
    static Eights eight(const uint8_t* p) { return eight_bytes((const int8_t*)p); }
};

enum { PARTS = KEYS / LANES };
// Heads of rows whose scores, and numbers of values of how many, fit in the registers.
enum { TALL_SCORES = LANES == 16 ? 12 : 6, TALL_VALUES = LANES == 16 ? 6 : 3, WIDE_VALUES = 4 };

// Whether products of two bfloat16 at a time are to be had: queries and weights are then rounded to bfloat16.
#if defined(__AVX512BF16__)
template <class KV>
constexpr bool PAIRED = KV::FORMAT == BF16;

inline Ints pair_everywhere(const void* pair) { return (Ints)_mm512_set1_epi32(load<int>(pair)); }
inline Floats add_pairs(Floats sum, Ints pairs, Ints pair) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)pair);
}
// The numbers of two rows side by side.
inline Ints interleaved(const uint8_t* first, const uint8_t* second) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)first));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)second));
    return (Ints)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#else
template <class KV>
constexpr bool PAIRED = false;

inline Ints pair_everywhere(const void*) { return Ints{}; }
inline Floats add_pairs(Floats sum, Ints, Ints) { return sum; }
inline Ints interleaved(const uint8_t*, const uint8_t*) { return Ints{}; }
#endif

// 2^x for x <= 0, to some units in the last place; 0 below -126. NaN stays NaN.
inline Floats power_of_two(Floats x) {
    constexpr float factors[] = {1.54035304e-4f, 1.33335581e-3f, 9.61812911e-3f, 5.55041087e-2f,
                                 2.40226507e-1f, 6.93147182e-1f, 1.0f};
    x = larger(all(-200.0f), x);  // of -infinity the rest would be none
#if defined(__AVX512VNNI__)
    const Floats n = (Floats)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#else
    const Floats shift = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    const Floats shifted = x + shift, n = shifted - shift;
#endif
    const Floats r = x - n;
    Floats p = all(factors[0]);
    UNROLL for (int i = 1; i < 7; i++) p = fused(p, r, all(factors[i]));
#if defined(__AVX512VNNI__)
    return x < all(-126.0f) ? Floats{} : (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return x < all(-126.0f) ? Floats{} : p * (Floats)(((Ints)shifted - (Ints)shift + 127) << 23);
#endif
}

// A block of keys of one head, turned round, and where its values are. PAIRED keys lie two numbers in the place
// of one, and so do values, two rows of them, where many items use them.
struct Block {
    const uint8_t* const* rows;
    int first, last;  // keys that somebody sees
    float keys[MAX_HEAD_DIM][KEYS];
    Ints values[KEYS / 2 * MAX_HEAD_DIM / LANES];
    bool has_values;
    float key_scales[KEYS], value_scales[KEYS];  // of INT8 alone
};

// One head of one row in one block: positions from first to last of it are seen.
struct Item {
    const void* query;  // PAIRED ones are bfloat16
    Partial* partial;
    int first, last;
    float weights[KEYS];
};

// The lines of a block to come, fetched a few at a time: many at once would keep this block's waiting.
struct Lines {
    const uint8_t* const* rows = nullptr;
    int64_t first = 0, length = 0, second = 0;  // bytes into a row: length of them from first and from second on
    int row = KEYS;
    int64_t at = 0;

    void fetch(int count) {
        for (; count > 0 && row < KEYS; count--) {
            __builtin_prefetch(rows[row] + (at < length ? first + at : second + at - length));
            if ((at += 64) >= 2 * length) at = 0, row++;
        }
    }
};

// The keys that somebody sees; those of positions outside may be anything.
template <class KV>
inline void take_keys(Block& block, const Pool& pool, int64_t head, Lines& next) {
    const int64_t dim = pool.head_dim, at = head * dim * KV::BYTES;
    constexpr int SIZE = PAIRED<KV> ? 4 : KV::BYTES;
    for (int key = block.first / LANES * LANES; key < (block.last + LANES - 1) / LANES * LANES; key += 8)
        for (int64_t d = 0; d < (PAIRED<KV> ? dim / 2 : dim); d += 8) {
            // Of a row as much as is read of it here, and as much again for the values.
            next.fetch(2 * 8 * 8 * SIZE / 64);
            Eights square[8];
            UNROLL for (int j = 0; j < 8; j++) {
                const uint8_t* numbers = block.rows[key + j] + at + d * SIZE;
                square[j] = PAIRED<KV> ? load<Eights>(numbers) : KV::eight(numbers);
            }
            transpose(square);
            UNROLL for (int j = 0; j < 8; j++) memcpy(&block.keys[d + j][key], &square[j], sizeof square[j]);
        }
    if (KV::FORMAT != INT8) return;
    for (int j = 0; j < KEYS; j++) {
        const uint8_t* scales = block.rows[j] + 2 * pool.kv_heads * dim + 4 * head;
        block.key_scales[j] = load<float>(scales);
        block.value_scales[j] = load<float>(scales + 4 * pool.kv_heads);
    }
}

// scale is to the base 2.
template <class KV, int COUNT>
inline void score(Item* items, const Block& block, int64_t dim, float scale) {
    // Vectors of keys that somebody sees, two at a time; add_values may take the weights of any of them.
    const int begin = block.first / (2 * LANES) * 2, end = (block.last + LANES - 1) / LANES;
    Floats scores[COUNT][PARTS];
    for (int part = begin; part < end; part += 2) {
        Floats dots[COUNT][2] = {};
        const float* keys = &block.keys[0][part * LANES];
        for (int64_t d = 0; d < (PAIRED<KV> ? dim / 2 : dim); d++, keys += KEYS) {
            Floats vectors[2];
            UNROLL for (int p = 0; p < 2; p++) vectors[p] = load<Floats>(keys + p * LANES);
            UNROLL for (int i = 0; i < COUNT; i++) {
                if constexpr (PAIRED<KV>) {
                    const Ints pair = pair_everywhere((const uint16_t*)items[i].query + 2 * d);
                    UNROLL for (int p = 0; p < 2; p++) dots[i][p] = add_pairs(dots[i][p], (Ints)vectors[p], pair);
                } else {
                    const Floats number = all(((const float*)items[i].query)[d]);
                    UNROLL for (int p = 0; p < 2; p++) dots[i][p] = fused(number, vectors[p], dots[i][p]);
                }
            }
        }
        UNROLL for (int i = 0; i < COUNT; i++)
            UNROLL for (int p = 0; p < 2; p++) scores[i][part + p] = dots[i][p] * scale;
    }
    // What the sums so far are worth beside the new largest score.
    float shifts[LANES] = {}, olds[LANES];
    for (int i = 0; i < COUNT; i++) {
        Partial& partial = *items[i].partial;
        Floats top = all(partial.largest);
        for (int p = begin; p < end; p++) {
            Floats& some = scores[i][p];
            if (KV::FORMAT == INT8) some *= load<Floats>(block.key_scales + p * LANES);
            if (items[i].first > p * LANES || items[i].last < (p + 1) * LANES) {
                const Ints index = lane_numbers() + p * LANES;
                const Ints seen = (index >= items[i].first) & (index < items[i].last);
                some = seen ? some : all(-__builtin_inff());
            }
            top = larger(some, top);
        }
        const float largest = largest_of(top);
        shifts[i] = partial.largest - largest;
        partial.largest = largest;
    }
    store(olds, power_of_two(load<Floats>(shifts)));
    for (int i = 0; i < COUNT; i++) {
        Partial& partial = *items[i].partial;
        Floats sum = load<Floats>(partial.totals) * olds[i];
        for (int p = begin; p < end; p++) {
            Floats weight = power_of_two(scores[i][p] - all(partial.largest));
            sum += weight;
            if (KV::FORMAT == INT8) weight *= load<Floats>(block.value_scales + p * LANES);
            if (PAIRED<KV>) store_factors((uint16_t*)items[i].weights + p * LANES, weight);
            else store(items[i].weights + p * LANES, weight);
        }
        store(partial.totals, sum);
        for (int64_t d = 0; olds[i] != 1.0f && d < dim; d += LANES)
            store(partial.values + d, load<Floats>(partial.values + d) * olds[i]);
    }
}

template <class KV, int COUNT, int WIDTH>
inline void add_values(Item* items, const Block& block, int64_t at, int64_t dim, int64_t d) {
    Floats sums[COUNT][WIDTH];
    int first = KEYS, last = 0;
    UNROLL for (int i = 0; i < COUNT; i++) {
        UNROLL for (int v = 0; v < WIDTH; v++) sums[i][v] = load<Floats>(items[i].partial->values + d + v * LANES);
        first = items[i].first < first ? items[i].first : first;
        last = items[i].last > last ? items[i].last : last;
    }
    if constexpr (PAIRED<KV>) {
        for (int j = first / 2 * 2; j < last; j += 2) {
            Ints values[WIDTH];
            UNROLL for (int v = 0; v < WIDTH; v++) {
                const int64_t number = at + (d + v * LANES) * KV::BYTES;
                values[v] = block.has_values ? block.values[(j / 2 * dim + d) / LANES + v]
                                             : interleaved(block.rows[j] + number, block.rows[j + 1] + number);
            }
            UNROLL for (int i = 0; i < COUNT; i++) {
                const Ints pair = pair_everywhere((const uint16_t*)items[i].weights + j);
                UNROLL for (int v = 0; v < WIDTH; v++) sums[i][v] = add_pairs(sums[i][v], values[v], pair);
            }
        }
    }
    for (int j = first; !PAIRED<KV> && j < last; j++) {
        Floats values[WIDTH];
        UNROLL for (int v = 0; v < WIDTH; v++)
            values[v] = KV::numbers(block.rows[j] + at + (d + v * LANES) * KV::BYTES);
        UNROLL for (int i = 0; i < COUNT; i++) {
            const Floats weight = all(items[i].weights[j]);
            UNROLL for (int v = 0; v < WIDTH; v++) sums[i][v] = fused(weight, values[v], sums[i][v]);
        }
    }
    UNROLL for (int i = 0; i < COUNT; i++)
        UNROLL for (int v = 0; v < WIDTH; v++) store(items[i].partial->values + d + v * LANES, sums[i][v]);
}

template <class KV, int COUNT>
inline void add_all_values(Item* items, const Block& block, int64_t at, int64_t dim) {
    int64_t d = 0;
    for (; d + WIDE_VALUES * LANES <= dim; d += WIDE_VALUES * LANES)
        add_values<KV, COUNT, WIDE_VALUES>(items, block, at, dim, d);
    for (; d < dim; d += LANES) add_values<KV, COUNT, 1>(items, block, at, dim, d);
}

// The heads of rows in items, all of one KV head.
template <class KV>
void attend_block(const Attention& job, Block& block, int64_t head, Item* items, int count) {
    const int64_t dim = job.pool.head_dim, at = (job.pool.kv_heads + head) * dim * KV::BYTES;
    const float scale = job.scale * 1.44269504f;
    block.has_values = PAIRED<KV> && count > 2 * TALL_VALUES;
    for (int j = 0; block.has_values && j < KEYS; j += 2)
        for (int64_t d = 0; d < dim; d += LANES) {
            const int64_t number = at + d * KV::BYTES;
            block.values[(j / 2 * dim + d) / LANES] =
                interleaved(block.rows[j] + number, block.rows[j + 1] + number);
        }
    int i = 0;
    for (; i + TALL_SCORES <= count; i += TALL_SCORES) score<KV, TALL_SCORES>(items + i, block, dim, scale);
    for (; i + 3 <= count; i += 3) score<KV, 3>(items + i, block, dim, scale);
    for (; i < count; i++) score<KV, 1>(items + i, block, dim, scale);
    i = 0;
    for (; i + TALL_VALUES <= count; i += TALL_VALUES) add_all_values<KV, TALL_VALUES>(items + i, block, at, dim);
    for (; i + 3 <= count; i += 3) add_all_values<KV, 3>(items + i, block, at, dim);
    for (; i < count; i++) add_all_values<KV, 1>(items + i, block, at, dim);
}

// Where the positions from block on lie, in whole rows of the pool.
inline void locate(const Attention& job, const int64_t* pages, int64_t block, int64_t low, int64_t end,
                   const uint8_t** rows) {
    const int64_t bytes = pool_row_bytes(job.pool);
    int64_t position = block < low ? low : block;
    int64_t page = position / job.page_size, offset = position % job.page_size;
    for (int64_t j = 0; j < KEYS; j++) {
        rows[j] = job.pool.data + (pages[page] * job.page_size + offset) * bytes;
        // Positions that nobody here may see are not read: a neighbour stands in their place.
        if (block + j < low || position + 1 == end) continue;
        position++;
        if (++offset == job.page_size) offset = 0, page++;
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

// Where a block of a task lies, and its lines to be fetched.
template <class KV>
inline void look_ahead(const Attention& job, const AttentionTask& task, const Reach& reach, int64_t block,
                       const uint8_t** rows, Lines& lines) {
    const int64_t head_bytes = job.pool.head_dim * KV::BYTES;
    locate(job, reach.pages, block, reach.low, reach.end, rows);
    lines.rows = rows;
    lines.first = task.first_head * head_bytes;
    lines.length = (task.last_head - task.first_head) * head_bytes;
    lines.second = lines.first + job.pool.kv_heads * head_bytes;
    lines.row = 0;
    lines.at = 0;
}

// upcoming is what the same thread will probably do next, or null.
template <class KV>
void attend_task(const Attention& job, const AttentionTask& task, const AttentionTask* upcoming) {
    const Reach reach = reach_of(job, task);
    const int64_t begins = reach.begins, start = reach.start, stop = reach.stop;
    const int64_t group = job.heads / job.pool.kv_heads, dim = job.pool.head_dim;
    const int64_t heads = (task.last_head - task.first_head) * group;
    const int64_t count = (task.last_row - task.first_row) * heads;
    // Head by head, so that the rows of one KV head follow each other.
    Partial sums[MAX_PARTIALS], spans[MAX_PARTIALS];
    for (int64_t i = 0; i < count; i++) clear(sums[i], dim), clear(spans[i], dim);
    // Head by head too; queries that are rounded are so once for all blocks.
    Item items[MAX_PARTIALS];
    uint16_t queries[PAIRED<KV> ? MAX_PARTIALS : 1][MAX_HEAD_DIM];
    int64_t place = 0;
    for (int64_t head = task.first_head * group; head < task.last_head * group; head += group)
        for (int64_t row = task.first_row; row < task.last_row; row++)
            for (int64_t h = 0; h < group; h++, place++) {
                const float* query = job.query + (begins + row) * job.query_stride + (head + h) * dim;
                for (int64_t d = 0; PAIRED<KV> && d < dim; d += LANES)
                    store_factors(queries[place] + d, load<Floats>(query + d));
                items[place].query = PAIRED<KV> ? (const void*)queries[place] : query;
                items[place].partial = spans + place;
            }
    Block turned;
    const uint8_t* rows[2][KEYS];
    int current = 0;
    Lines next;
    if (reach.begin < stop) look_ahead<KV>(job, task, reach, reach.begin, rows[current], next);
    for (int64_t block = reach.begin; block < stop; block += KEYS, current ^= 1) {
        next.row = KEYS;
        if (block + KEYS < stop) {
            look_ahead<KV>(job, task, reach, block + KEYS, rows[current ^ 1], next);
        } else if (upcoming) {
            const Reach then = reach_of(job, *upcoming);
            if (then.begin < then.stop)
                look_ahead<KV>(job, *upcoming, then, then.begin, rows[current ^ 1], next);
        }
        turned.rows = rows[current];
        turned.first = KEYS;
        turned.last = 0;
        // Of later rows a block begins and ends later: those that see some of it follow each other.
        int64_t first_row = task.last_row, last_row = task.first_row;
        for (int64_t row = task.first_row; row < task.last_row; row++) {
            int64_t from = lowest_seen(job, start + row) - block, to = start + row + 1 - block;
            from = from < 0 ? 0 : from;
            to = to > KEYS ? KEYS : to;
            if (from >= to) continue;
            first_row = row < first_row ? row : first_row;
            last_row = row + 1;
            turned.first = from < turned.first ? (int)from : turned.first;
            turned.last = to > turned.last ? (int)to : turned.last;
            for (int64_t i = (row - task.first_row) * group; i < count; i += (task.last_row - task.first_row) * group)
                for (int64_t h = 0; h < group; h++) items[i + h].first = (int)from, items[i + h].last = (int)to;
        }
        for (int64_t head = task.first_head; first_row < last_row && head < task.last_head; head++) {
            const int64_t rows_before = (head - task.first_head) * (task.last_row - task.first_row);
            take_keys<KV>(turned, job.pool, head, next);
            attend_block<KV>(job, turned, head, items + (rows_before + first_row - task.first_row) * group,
                             (int)((last_row - first_row) * group));
        }
        if ((block + KEYS) % SPAN == 0 && !task.partials)
            for (int64_t i = 0; i < count; i++) merge(sums[i], spans[i], dim);
    }
    for (int64_t i = 0; i < count; i++) {
        const int64_t head = task.first_head + i / (group * (task.last_row - task.first_row));
        const int64_t row = task.first_row + i / group % (task.last_row - task.first_row);
        const int64_t place = head * group + i % group;
        if (task.partials) {
            task.partials[place].largest = spans[i].largest;
            memcpy(task.partials[place].totals, spans[i].totals, sizeof spans[i].totals);
            memcpy(task.partials[place].values, spans[i].values, (size_t)dim * sizeof(float));
            continue;
        }
        merge(sums[i], spans[i], dim);
        write(sums[i], job.out + ((begins + row) * job.heads + place) * dim, dim);
    }
}

void attend(const Attention& job, const AttentionTask& task, const AttentionTask* upcoming) {
    switch (job.pool.format) {
        case F32: return attend_task<KV32>(job, task, upcoming);
        case F16: return attend_task<KV16>(job, task, upcoming);
        case BF16: return attend_task<KVB16>(job, task, upcoming);
        case INT8: return attend_task<KV8>(job, task, upcoming);
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
