// One block of keys against some heads of rows: scores, the running softmax, the sum of values.

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
struct KVTiles : KVB16 {
    static constexpr int FORMAT = TILES;
};
struct KV8Tiles : KV8 {
    static constexpr int FORMAT = TILES8;
};

enum { PARTS = KEYS / LANES };
// Heads of rows whose scores, and numbers of values of how many, fit in the registers.
enum { TALL_SCORES = LANES == 16 ? 12 : 6, TALL_VALUES = LANES == 16 ? 6 : 3, WIDE_VALUES = 4 };

template <class KV>
constexpr bool SCALED = KV::BYTES == 1;  // a scale for each key and value head
template <class KV>
constexpr bool TILED = KV::FORMAT == TILES || KV::FORMAT == TILES8;
// Bytes from one head to the next of a row, or of a tile.
template <class KV>
constexpr int64_t head_bytes(int64_t dim) {
    return TILED<KV> ? (dim * KV::BYTES + (SCALED<KV> ? 4 : 0)) * LANES : dim * KV::BYTES;
}

// Of a pair in a block: rows of int8 are widened as they are turned.
template <class KV>
constexpr int PAIR_BYTES = KV::FORMAT == TILES8 ? 2 : 4;

// Whether two products at a time are taken: of bfloat16, to which queries and weights are then rounded, or of
// whole numbers (WHOLE), int8 with queries and weights of 16 bits.
#if defined(__AVX512VNNI__)
template <class KV>
constexpr bool WHOLE = SCALED<KV>;
#if defined(__AVX512BF16__)
template <class KV>
constexpr bool PAIRED = KV::FORMAT == BF16 || KV::FORMAT == TILES || WHOLE<KV>;

inline __m512 add_bfloats(__m512 sum, __m512i pairs, __m512i pair) {
    return _mm512_dpbf16_ps(sum, (__m512bh)pairs, (__m512bh)pair);
}
#else
template <class KV>
constexpr bool PAIRED = WHOLE<KV>;

inline __m512 add_bfloats(__m512 sum, __m512i, __m512i) { return sum; }
#endif

inline Ints pair_everywhere(const void* pair) { return (Ints)_mm512_set1_epi32(load<int>(pair)); }
// LANES pairs of a block.
template <class KV>
inline Ints pairs_at(const uint8_t* p) {
    if constexpr (PAIR_BYTES<KV> == 2) return (Ints)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)p));
    return load<Ints>(p);
}
// Eight pairs of a row.
template <class KV>
inline Eights eight_pairs(const uint8_t* p) {
    if constexpr (WHOLE<KV>) return (Eights)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
    return load<Eights>(p);
}
inline Floats add_pairs(Floats sum, Ints pairs, Ints pair) {
    return (Floats)add_bfloats((__m512)sum, (__m512i)pairs, (__m512i)pair);
}
inline Ints add_pairs(Ints sum, Ints pairs, Ints pair) {
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)pairs, (__m512i)pair);
}
// The numbers of two rows side by side.
template <class KV>
inline Ints interleaved(const uint8_t* first, const uint8_t* second) {
    auto wide = [](const uint8_t* p) {
        if constexpr (WHOLE<KV>) return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
    };
    return (Ints)_mm512_mask_blend_epi16(0xaaaaaaaa, wide(first), _mm512_slli_epi32(wide(second), 16));
}
#else
template <class KV>
constexpr bool WHOLE = false;
template <class KV>
constexpr bool PAIRED = false;

inline Ints pair_everywhere(const void*) { return Ints{}; }
template <class KV>
inline Ints pairs_at(const uint8_t*) { return Ints{}; }
template <class KV>
inline Eights eight_pairs(const uint8_t*) { return Eights{}; }
template <class Sum>
inline Sum add_pairs(Sum sum, Ints, Ints) { return sum; }
template <class KV>
inline Ints interleaved(const uint8_t*, const uint8_t*) { return Ints{}; }
#endif

// What products are added up in. The compiler keeps vectors that change their type in memory.
template <bool IS_WHOLE>
struct SumOf { typedef Floats type; };
template <>
struct SumOf<true> { typedef Ints type; };
template <class KV>
using Sum = typename SumOf<WHOLE<KV>>::type;

inline Floats in_floats(Floats sum) { return sum; }
inline Floats in_floats(Ints sum) { return to_floats(sum); }

// 2^x for x of at most BOUND, to 3e-6 of it where weights of 16 bits are made of it.
template <class KV>
inline Floats weight_of(Floats x) {
#if defined(__AVX512VNNI__)
    if constexpr (PAIRED<KV>) {
        constexpr float rough[] = {1.35341678e-2f, 5.20114601e-2f, 2.41442755e-1f, 6.93003833e-1f, 1.00000262f};
        const Floats r = (Floats)_mm512_reduce_ps((__m512)x, _MM_FROUND_FLOOR);
        Floats p = all(rough[0]);
        UNROLL for (int i = 1; i < 5; i++) p = fused(p, r, all(rough[i]));
        return (Floats)_mm512_scalef_ps((__m512)p, (__m512)x);
    }
#endif
    return power_of_two(x);
}

// The lines of a block to come, fetched a few at a time: many at once would keep this block's waiting.
struct Lines {
    bool far = false;
    const uint8_t* const* runs = nullptr;
    int count = 0;  // of runs
    int64_t first = 0, second = 0, length = 0;  // of each run so many bytes from first and from second on
    const uint8_t *at = nullptr, *end = nullptr;
    int taken = 0;  // halves of runs
    int left = 0, each = 0;  // lines of a share, and of a time
    int mask = 0;            // a time is every so many products of keys, less one; at 0, each of values too

    // So many lines, about evenly over so many times.
    void share(int lines, int times, int every) { left = lines, each = (lines + times / 2) / times, mask = every - 1; }
    void fetch() {
        const int lines = each < left ? each : left;
        left -= lines;
        fetch(lines);
    }
    // A part of those that are left.
    void fetch_part(int of) {
        const int lines = left / of;
        left -= lines;
        fetch(lines);
    }

private:
    void fetch(int lines) {
        while (lines > 0) {
            if (at >= end) {
                if (taken >= 2 * count) return;
                at = runs[taken / 2] + (taken % 2 ? second : first);
                end = at + length;
                taken++;
            }
            for (; lines > 0 && at < end; lines--, at += 64) fetch_line(at, far);
        }
    }
};

// A block of keys of one head and its values. keys[p] are LANES keys: number d of all of them, then d + 1; where
// they are PAIRED, pairs of numbers. pairs[j], of PAIRED ones alone, are the values of rows 2 j and 2 j + 1, number
// beside number.
struct Block {
    int first, last;  // keys that somebody sees
    const uint8_t* keys[PARTS];
    const uint8_t* pairs[KEYS / 2];
    const uint8_t *key_scales[PARTS], *value_scales[PARTS];  // of SCALED alone
    const uint8_t* const* rows;  // of what does not lie in tiles
    float weights[TALL_SCORES][KEYS];
    float units[TALL_SCORES];  // what WHOLE weights are multiples of
    float scales[2][KEYS];
    alignas(64) float turned[PARTS][MAX_HEAD_DIM][LANES];
    Ints side_by_side[PARTS][LANES / 2 * MAX_HEAD_DIM / LANES];
};

// One head of one row in one block: positions from first to last of it are seen.
struct Item {
    const void* query;  // PAIRED ones have 16 bits
    float unit;         // what a WHOLE one is multiples of; of others 1
    Partial* partial;
    int first, last;
};

// The keys that somebody sees; those of positions outside may be anything.
template <class KV>
inline void take_keys(Block& block, const Pool& pool, int64_t head) {
    const int64_t dim = pool.head_dim;
    if constexpr (TILED<KV>) {
        constexpr int SCALES = SCALED<KV> ? 4 * LANES : 0;
        for (int p = 0; p < PARTS; p++) {
            block.key_scales[p] = block.rows[p] + head * head_bytes<KV>(dim);
            block.value_scales[p] = block.rows[p] + (pool.kv_heads + head) * head_bytes<KV>(dim);
            block.keys[p] = block.key_scales[p] + SCALES;
            const uint8_t* values = block.value_scales[p] + SCALES;
            for (int j = 0; j < LANES / 2; j++) block.pairs[p * LANES / 2 + j] = values + j * dim * PAIR_BYTES<KV>;
        }
        return;
    }
    for (int p = 0; p < PARTS; p++) {
        block.keys[p] = (const uint8_t*)block.turned[p];
        for (int j = 0; j < LANES / 2; j++)
            block.pairs[p * LANES / 2 + j] = (const uint8_t*)(block.side_by_side[p] + j * dim / LANES);
        block.key_scales[p] = (const uint8_t*)(block.scales[0] + p * LANES);
        block.value_scales[p] = (const uint8_t*)(block.scales[1] + p * LANES);
    }
    const int64_t at = head * dim * KV::BYTES;
    constexpr int SIZE = PAIRED<KV> ? 2 * KV::BYTES : KV::BYTES;
    for (int key = block.first / LANES * LANES; key < (block.last + LANES - 1) / LANES * LANES; key += 8) {
        float(*to)[LANES] = block.turned[key / LANES];
        for (int64_t d = 0; d < (PAIRED<KV> ? dim / 2 : dim); d += 8) {
            Eights square[8];
            UNROLL for (int j = 0; j < 8; j++) {
                const uint8_t* numbers = block.rows[key + j] + at + d * SIZE;
                square[j] = PAIRED<KV> ? eight_pairs<KV>(numbers) : KV::eight(numbers);
            }
            transpose(square);
            UNROLL for (int j = 0; j < 8; j++) memcpy(&to[d + j][key % LANES], &square[j], sizeof square[j]);
        }
    }
    for (int j = block.first / 2 * 2; PAIRED<KV> && j < block.last; j += 2) {
        for (int64_t d = 0; d < dim; d += LANES) {
            const int64_t number = (pool.kv_heads + head) * dim * KV::BYTES + d * KV::BYTES;
            block.side_by_side[j / LANES][(j % LANES / 2 * dim + d) / LANES] =
                interleaved<KV>(block.rows[j] + number, block.rows[j + 1] + number);
        }
    }
    for (int j = 0; SCALED<KV> && j < KEYS; j++) {
        const uint8_t* scales = block.rows[j] + 2 * pool.kv_heads * dim + 4 * head;
        block.scales[0][j] = load<float>(scales);
        block.scales[1][j] = load<float>(scales + 4 * pool.kv_heads);
    }
}

// A score may be so far above the one that weights are relative to, to the base 2, before that is raised: it
// spares most blocks the sum across a vector and the scaling (as FlashAttention-4 does, 2025).
constexpr float BOUND = 8.0f;

inline bool any_above(Floats scores, float bound) {
#if defined(__AVX512VNNI__)
    return _mm512_cmp_ps_mask((__m512)scores, _mm512_set1_ps(bound), _CMP_GT_OQ);
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)scores, _mm256_set1_ps(bound), _CMP_GT_OQ));
#else
    return largest_of(scores) > bound;
#endif
}

// Products of COUNT items with VECTORS vectors of keys from part on, of which those before end count.
template <class KV, int COUNT, int VECTORS>
inline void multiply_keys(const Item* items, const Block& block, int64_t dim, int part, int end,
                          Floats (*products)[PARTS], Lines& next) {
    constexpr int PAIR = PAIRED<KV> ? 2 : 1;
    constexpr int EACH = PAIR_BYTES<KV> * LANES;
    Sum<KV> sums[COUNT][VECTORS] = {};
    const uint8_t* keys[VECTORS];
    UNROLL for (int p = 0; p < VECTORS; p++) keys[p] = block.keys[part + p < end ? part + p : part];
    for (int64_t d = 0; d < dim / PAIR; d++) {
        if constexpr (PAIRED<KV>) {
            Ints pairs[VECTORS];
            UNROLL for (int p = 0; p < VECTORS; p++) pairs[p] = pairs_at<KV>(keys[p] + d * EACH);
            UNROLL for (int i = 0; i < COUNT; i++) {
                const Ints pair = pair_everywhere((const uint16_t*)items[i].query + 2 * d);
                UNROLL for (int p = 0; p < VECTORS; p++) sums[i][p] = add_pairs(sums[i][p], pairs[p], pair);
            }
        } else {
            Floats vectors[VECTORS];
            UNROLL for (int p = 0; p < VECTORS; p++) vectors[p] = load<Floats>(keys[p] + d * EACH);
            UNROLL for (int i = 0; i < COUNT; i++) {
                const Floats number = all(((const float*)items[i].query)[d]);
                UNROLL for (int p = 0; p < VECTORS; p++) sums[i][p] = fused(number, vectors[p], sums[i][p]);
            }
        }
        if ((d & next.mask) == next.mask) next.fetch();
    }
    UNROLL for (int i = 0; i < COUNT; i++)
        UNROLL for (int p = 0; p < VECTORS; p++)
            products[i][part + p] = in_floats(sums[i][p]);
}

// Vectors of keys at a time, for sums enough to be added up side by side where there are registers for them.
template <int COUNT>
constexpr int WIDE_KEYS = LANES == 16 && COUNT <= 3 ? 4 : 2;

// Weights of COUNT items. Scores, to the base 2, are scale times products.
template <class KV, int COUNT>
inline void score(Item* items, Block& block, int64_t dim, float scale, Lines& next) {
    // Vectors of keys that somebody sees, an even number of them; add_values may take the weights of any.
    const int begin = block.first / (2 * LANES) * 2, end = (block.last + LANES - 1) / LANES;
    Floats scores[COUNT][PARTS];
    int part = begin;
    for (; end - part > 2 && WIDE_KEYS<COUNT> == 4; part += 4)
        multiply_keys<KV, COUNT, 4>(items, block, dim, part, end, scores, next);
    for (; part < end; part += 2) multiply_keys<KV, COUNT, 2>(items, block, dim, part, end, scores, next);
    // Of most blocks all keys are seen: then the loops over vectors are unrolled.
    auto each = [&](auto work) {
        if (LANES == 16 && begin == 0 && end == PARTS) {
            UNROLL for (int p = 0; p < PARTS; p++) work(p);
        } else {
            for (int p = begin; p < end; p++) work(p);
        }
    };
    for (int i = 0; i < COUNT; i++) {
        Partial& partial = *items[i].partial;
        Floats* const some = scores[i];
        // Keys of int8 have scales of their own: their products become scores here, others' with the weights.
        const float factor = SCALED<KV> ? 1.0f : scale;
        if (SCALED<KV>)
            each([&](int p) { some[p] = some[p] * (scale * items[i].unit) * load<Floats>(block.key_scales[p]); });
        if (items[i].first > begin * LANES || items[i].last < end * LANES)
            for (int p = begin; p < end; p++) {
                const Ints index = lane_numbers() + p * LANES;
                const Ints seen = (index >= items[i].first) & (index < items[i].last);
                some[p] = seen ? some[p] : all(-__builtin_inff());
            }
        Floats top = all(-__builtin_inff());
        each([&](int p) { top = larger(some[p], top); });
        top *= factor;
        Floats sum = load<Floats>(partial.totals);
        if (any_above(top, partial.largest + BOUND)) {
            const float largest = largest_of(top);
            if (partial.largest > -__builtin_inff()) {
                const Floats old = power_of_two(all(partial.largest - largest));
                sum *= old;
                for (int64_t d = 0; d < dim; d += LANES)
                    store(partial.values + d, load<Floats>(partial.values + d) * old);
            }
            partial.largest = largest;
        }
        top = Floats{};
        const Floats least = all(-partial.largest);
        each([&](int p) {
            Floats weight = weight_of<KV>(fused(some[p], all(factor), least));
            sum += weight;
            if (SCALED<KV>) weight *= load<Floats>(block.value_scales[p]);
            if (WHOLE<KV>) top = larger(weight, top), some[p] = weight;
            else if (PAIRED<KV>) store_factors((uint16_t*)block.weights[i] + p * LANES, weight);
            else store(block.weights[i] + p * LANES, weight);
        });
        store(partial.totals, sum);
        if (WHOLE<KV>) {
            const Steps steps(largest_of(top), 32767.0f);
            block.units[i] = steps.size;
            each([&](int p) { store_shorts((uint16_t*)block.weights[i] + p * LANES, steps.whole(some[p])); });
        }
    }
}

// What items that follow each other, those of the block's weights from skipped on, get of WIDTH vectors of values.
template <class KV, int COUNT, int WIDTH>
inline void add_values(Item* items, const Block& block, int skipped, int64_t at, int64_t dim, int64_t d, Lines& next) {
    const float(*weights)[KEYS] = block.weights + skipped;
    Sum<KV> sums[COUNT][WIDTH] = {};
    int first = KEYS, last = 0;
    UNROLL for (int i = 0; i < COUNT; i++) {
        if constexpr (!WHOLE<KV>)
            UNROLL for (int v = 0; v < WIDTH; v++) sums[i][v] = load<Floats>(items[i].partial->values + d + v * LANES);
        first = items[i].first < first ? items[i].first : first;
        last = items[i].last > last ? items[i].last : last;
    }
    if constexpr (PAIRED<KV>) {
        int pair = first / 2;
        const int end = (last + 1) / 2;
        // A loop that is entered once at least: else gcc keeps the sums on the stack around it.
        if (pair < end) do {
            const uint8_t* pairs = block.pairs[pair] + d * PAIR_BYTES<KV>;
            Ints values[WIDTH];
            UNROLL for (int v = 0; v < WIDTH; v++) values[v] = pairs_at<KV>(pairs + v * LANES * PAIR_BYTES<KV>);
            UNROLL for (int i = 0; i < COUNT; i++) {
                const Ints weight = pair_everywhere((const uint16_t*)weights[i] + 2 * pair);
                UNROLL for (int v = 0; v < WIDTH; v++) sums[i][v] = add_pairs(sums[i][v], values[v], weight);
            }
            if (LANES == 16 && COUNT <= 3 && !next.mask) next.fetch();
        } while (++pair < end);
    }
    if constexpr (!PAIRED<KV>) {
        for (int j = first; j < last; j++) {
            Floats values[WIDTH];
            UNROLL for (int v = 0; v < WIDTH; v++)
                values[v] = KV::numbers(block.rows[j] + at + (d + v * LANES) * KV::BYTES);
            UNROLL for (int i = 0; i < COUNT; i++) {
                const Floats weight = all(weights[i][j]);
                UNROLL for (int v = 0; v < WIDTH; v++) sums[i][v] = fused(weight, values[v], sums[i][v]);
            }
            if (LANES == 16 && COUNT <= 3 && !next.mask) next.fetch();
        }
    }
    UNROLL for (int i = 0; i < COUNT; i++)
        UNROLL for (int v = 0; v < WIDTH; v++) {
            float* kept = items[i].partial->values + d + v * LANES;
            if constexpr (WHOLE<KV>)
                store(kept, fused(to_floats(sums[i][v]), all(block.units[skipped + i]), load<Floats>(kept)));
            else store(kept, sums[i][v]);
        }
}

template <class KV, int COUNT>
inline void add_all_values(Item* items, const Block& block, int skipped, int64_t at, int64_t dim, Lines& next) {
    int64_t d = 0;
    for (; d + WIDE_VALUES * LANES <= dim; d += WIDE_VALUES * LANES)
        add_values<KV, COUNT, WIDE_VALUES>(items, block, skipped, at, dim, d, next);
    for (; d < dim; d += LANES) add_values<KV, COUNT, 1>(items, block, skipped, at, dim, d, next);
}

// COUNT heads of rows of so many, all of one KV head, of which the block has the keys.
template <class KV, int COUNT>
inline void attend_together(Item* items, int count, Block& block, int64_t at, int64_t dim, float scale, Lines& next) {
    constexpr int VALUES = COUNT < TALL_VALUES ? COUNT : TALL_VALUES, PAIR = PAIRED<KV> ? 2 : 1;
    // Of the lines of a head's block. Into a second cache they come best a few with each product of keys or values;
    // into the first, or with AVX2, a half in runs with the keys, a quarter before the values and one after. Many items
    // fetch all with the keys: memory keeps up with them.
    const int lines = (int)(KEYS * dim * KV::BYTES / 32) + (SCALED<KV> ? 2 * PARTS : 0);
    const int keys = (int)dim / PAIR * PARTS / WIDE_KEYS<COUNT>, every = LANES == 16 && COUNT <= 3 ? 8 : 16;
    const int values = KEYS / PAIR * (int)dim / (WIDE_VALUES * LANES);
    const bool often = next.far && LANES == 16 && COUNT <= 3;
    if (often) next.share(lines * COUNT / count, keys + values, 1);
    else next.share(lines * COUNT / count, (COUNT <= 3 ? 2 : 1) * keys / every, every);
    score<KV, COUNT>(items, block, dim, scale, next);
    if (!often && COUNT <= 3) next.fetch_part(2);
    UNROLL for (int j = 0; j < COUNT; j += VALUES) add_all_values<KV, VALUES>(items + j, block, j, at, dim, next);
    if (COUNT <= 3) next.fetch_part(1);
}

// The heads of rows in items, all of one KV head.
template <class KV>
void attend_block(const Attention& job, Block& block, int64_t head, Item* items, int count, Lines& next) {
    const int64_t dim = job.pool.head_dim, at = (job.pool.kv_heads + head) * dim * KV::BYTES;
    const float scale = job.scale * 1.44269504f;
    int i = 0;
    for (; i + TALL_SCORES <= count; i += TALL_SCORES)
        attend_together<KV, TALL_SCORES>(items + i, count, block, at, dim, scale, next);
    for (; i + 3 <= count; i += 3) attend_together<KV, 3>(items + i, count, block, at, dim, scale, next);
    for (; i < count; i++) attend_together<KV, 1>(items + i, count, block, at, dim, scale, next);
}

}  // namespace
