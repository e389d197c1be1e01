// Attention over the pages of the KV pool, in float32, in place: FlashAttention's running softmax (Dao et al.,
// 2022) over PagedAttention's pages (Kwon et al., 2023).
//
// Keys are taken in blocks that begin at multiples of KEYS, and every row of queries adds up in that one
// order: what a row gives depends on its own position and its sequence's KV alone, to the bit, be it a decode,
// part of a chunk, or one of many.

#pragma once

#include "elementwise.h"

namespace {

// Eight sums, one for each vector.
inline Floats sums_of(const Floats* v) {
#if defined(__AVX2__)
    const __m256 a = _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[0], (__m256)v[1]),
                                    _mm256_hadd_ps((__m256)v[2], (__m256)v[3]));
    const __m256 b = _mm256_hadd_ps(_mm256_hadd_ps((__m256)v[4], (__m256)v[5]),
                                    _mm256_hadd_ps((__m256)v[6], (__m256)v[7]));
    return (Floats)_mm256_permute2f128_ps(a, b, 0x20) + (Floats)_mm256_permute2f128_ps(a, b, 0x31);
#else
    return each([&](int i) { return sum_of(v[i]); });
#endif
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// One head of one row so far: the largest score, and the sums of its weights and of weighted values.
struct Partial {
    float largest;
    float total;
    float values[MAX_HEAD_DIM];
};

template <int WIDE>
inline void add_values(float* sums, const float* const* rows, int64_t at, const float* weights, int first,
                       int last) {
    Floats acc[WIDE];
    UNROLL for (int v = 0; v < WIDE; v++) acc[v] = load<Floats>(sums + 8 * v);
    for (int j = first; j < last; j++) {
        const Floats weight = all(weights[j]);
        const float* value = rows[j] + at;
        UNROLL for (int v = 0; v < WIDE; v++) acc[v] = fused(weight, load<Floats>(value + 8 * v), acc[v]);
    }
    memcpy(sums, acc, sizeof acc);
}

// Keys first to last of a block for one head of one row. All rows of the block can be read; this head's key
// begins key numbers into them, its value value numbers.
inline void attend_block(const float* query, const float* const* rows, int64_t key, int64_t value, int first,
                         int last, int64_t head_dim, float scale, Partial* partial) {
    Floats scores[KEYS / 8];
    Floats top = all(partial->largest);
    for (int g = 0; g < KEYS / 8; g++) {
        scores[g] = all(-__builtin_inff());
        if (8 * g >= last || 8 * g + 8 <= first) continue;
        Floats dots[8] = {};
        for (int64_t i = 0; i < head_dim; i += 8) {
            const Floats part = load<Floats>(query + i);
            UNROLL for (int k = 0; k < 8; k++)
                dots[k] = fused(part, load<Floats>(rows[8 * g + k] + key + i), dots[k]);
        }
        const Ints index = Ints{0, 1, 2, 3, 4, 5, 6, 7} + 8 * g;
        const Ints seen = (index >= first) & (index < last);
        scores[g] = seen ? sums_of(dots) * scale : scores[g];
        top = larger(scores[g], top);
    }
    float largest = top[0];
    for (int i = 1; i < 8; i++) largest = top[i] > largest ? top[i] : largest;
    float weights[KEYS];
    Floats sum = {};
    for (int g = 0; g < KEYS / 8; g++) {
        const Floats weight = exp_of(scores[g] - all(largest));
        sum += weight;
        store(weights + 8 * g, weight);
    }
    const float old = exp_of(all(partial->largest - largest))[0];
    partial->total = partial->total * old + sum_of(sum);
    partial->largest = largest;
    if (old != 1.0f)
        for (int64_t i = 0; i < head_dim; i += 8) {
            store(partial->values + i, load<Floats>(partial->values + i) * old);
        }
    int64_t i = 0;
    auto part = [&](auto add, int wide) {
        for (; i + 8 * wide <= head_dim; i += 8 * wide)
            add(partial->values + i, rows, value + i, weights, first, last);
    };
    part(add_values<8>, 8);
    part(add_values<4>, 4);
    part(add_values<2>, 2);
    part(add_values<1>, 1);
}

// Where the positions from block on lie, in whole rows of the pool.
inline void locate(const Attention& shape, const int64_t* pages, int64_t block, int64_t low, int64_t end,
                   const float** rows) {
    const int64_t width = 2 * shape.kv_heads * shape.head_dim;
    int64_t position = block < low ? low : block;
    int64_t page = position / shape.page_size, offset = position % shape.page_size;
    for (int64_t j = 0; j < KEYS; j++) {
        rows[j] = shape.kv + (pages[page] * shape.page_size + offset) * width;
        // Positions that nobody here may see are not read: a neighbour stands in their place.
        if (block + j < low || position + 1 == end) continue;
        position++;
        if (++offset == shape.page_size) offset = 0, page++;
    }
}

void attend(const Attention& shape, const AttentionTask& task) {
    const Sequences& sequences = *shape.sequences;
    const int64_t begins = sequences.starts[task.sequence], ends = sequences.starts[task.sequence + 1];
    const int64_t start = sequences.lengths[task.sequence] - (ends - begins);  // position of the first row
    const int64_t* pages = sequences.pages + task.sequence * sequences.stride;
    const float* query = shape.query + begins * shape.query_stride;
    float* out = shape.out + begins * shape.heads * shape.head_dim;
    const int64_t group = shape.heads / shape.kv_heads, dim = shape.head_dim;
    const int64_t heads = (task.last_head - task.first_head) * group;
    Partial partials[MAX_PARTIALS];
    for (int64_t p = 0; p < (task.last_row - task.first_row) * heads; p++) {
        partials[p].largest = -__builtin_inff();
        partials[p].total = 0.0f;
        memset(partials[p].values, 0, (size_t)dim * sizeof(float));
    }
    auto lowest = [&](int64_t row) {
        const int64_t position = start + row;
        return shape.window && position >= shape.window ? position - shape.window + 1 : 0;
    };
    const int64_t low = lowest(task.first_row), end = start + task.last_row, begin = low / KEYS * KEYS;
    // The block to come is fetched while one is worked on, a part after each head.
    const int64_t parts = (task.last_row - task.first_row) * heads, values = shape.kv_heads * dim;
    const float* rows[2][KEYS];
    int current = 0;
    locate(shape, pages, begin, low, end, rows[current]);
    for (int64_t block = begin; block < end; block += KEYS, current ^= 1) {
        const bool more = block + KEYS < end;
        if (more) locate(shape, pages, block + KEYS, low, end, rows[current ^ 1]);
        Partial* partial = partials;
        for (int64_t row = task.first_row; row < task.last_row; row++) {
            int64_t from = lowest(row) - block, to = start + row + 1 - block;
            from = from < 0 ? 0 : from;
            to = to > KEYS ? KEYS : to;
            for (int64_t h = task.first_head * group; h < task.last_head * group; h++, partial++) {
                const int64_t part = partial - partials;
                for (int64_t j = KEYS * part / parts; more && j < KEYS * (part + 1) / parts; j++)
                    for (int64_t at = 0; at <= values; at += values)
                        for (int64_t i = task.first_head * dim; i < task.last_head * dim; i += 16)
                            __builtin_prefetch(rows[current ^ 1][j] + at + i, 0, 2);
                if (from < to)
                    attend_block(query + row * shape.query_stride + h * dim, rows[current], h / group * dim,
                                 (shape.kv_heads + h / group) * dim, (int)from, (int)to, dim, shape.scale,
                                 partial);
            }
        }
    }
    const Partial* done = partials;
    for (int64_t row = task.first_row; row < task.last_row; row++)
        for (int64_t h = task.first_head * group; h < task.last_head * group; h++, done++)
            for (int64_t i = 0; i < dim; i += 8) {
                store(out + (row * shape.heads + h) * dim + i, load<Floats>(done->values + i) / done->total);
            }
}

}  // namespace
