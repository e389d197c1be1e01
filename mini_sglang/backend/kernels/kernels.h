// What the instruction-set variants of variant.cpp offer, and the layouts they share with api.cpp.

#pragma once

#include <stdint.h>

// ggml's numbers. INT8 and tiles are of the KV pool alone.
enum Format {
    F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q8_0 = 8, Q4_K = 12, Q6_K = 14, INT8 = 24, BF16 = 30, TILES = 100, TILES8 = 101
};

// Rows of a matrix are interleaved in groups, so that one vector holds the same columns of all of a group's
// rows. Dense: number 16 c + r is column c of row r; of BF16 number 32 p + 2 r + j is column 2 p + j, the last
// column of an odd number followed by zeros. In blocks: a tile is 32 columns of a group, after its scales: byte
// 64 v + 4 r + j is column 4 v + j of row r, for nibbles column 16 + 4 v + j in the high half. All numbers are
// those of the file, bit for bit.
enum { GROUP = 16, BLOCK = 32, SUPER = 8 };  // SUPER: blocks that share a header in the K formats

struct Layout {
    int source_bytes;    // of one block of one row in the file
    int source_columns;  // of it
    int header_bytes;    // float16 scales for each row of the group, before the tiles of every block
    int tile_bytes;      // of 32 columns, or of a dense column
};

// Q4_0, Q8_0: a tile's header is d. Q4_1: d, m.
// Q4_K: header d, dmin; a tile begins with 16 scales and 16 minima of 6 bits, a byte each.
// Q6_K: header d; a tile begins with 16 scales of its first 16 columns and 16 of its last (int8), then the low
// nibbles, then two vectors of high bits: bits 2 v of the first belong to columns 4 v + j, of the second
// to columns 16 + 4 v + j.
static inline Layout layout_of(int format) {
    switch (format) {
        case F32: return {4, 1, 0, 64};
        case F16: return {2, 1, 0, 32};
        case BF16: return {2, 1, 0, 32};
        case Q4_0: return {18, BLOCK, 32, 256};
        case Q4_1: return {20, BLOCK, 64, 256};
        case Q8_0: return {34, BLOCK, 32, 512};
        case Q4_K: return {144, BLOCK * SUPER, 64, 32 + 256};
        case Q6_K: return {210, BLOCK * SUPER, 32, 32 + 384};
        default: return {0, 0, 0, 0};
    }
}

static inline bool is_dense(int format) { return format == F32 || format == F16 || format == BF16; }

static inline int64_t group_bytes(int format, int64_t k) {
    const Layout layout = layout_of(format);
    if (is_dense(format)) return (format == BF16 ? (k + 1) / 2 * 2 : k) * layout.tile_bytes;
    return k / layout.source_columns * layout.header_bytes + k / BLOCK * layout.tile_bytes;
}

// 32 activations as int8: x is q * scale, with scale the largest magnitude / 127. A block with an infinity
// or NaN has the scale NaN, one below 2^-100 the scale 0.
struct Activations {
    int8_t q[BLOCK];
    float scale;
    float sum, scaled_sum;  // of all q, and of x
    // What a sum of products with codes begins at: minus the codes' zero times the sum of q.
    int32_t from_8, from_128;
    int32_t from_32[2];  // of q[0..15] and q[16..31]
    int32_t unused;      // a line of the cache is a block
};

// What one call does, each with its struct, to the first rows of x: jobs.py has the same. A recorded step is
// a list of these whose addresses stay the same from step to step.
enum Kind { PRODUCT, ATTENTION, NORM, ROTATE, SILU_AND_MUL, EMBED, ADAPT };

struct Entry {
    int64_t kind;
    const void* job;
};

// y = x W^T + bias for W [n, k], packed, of format; bias may be null. x is [rows, k], a row of y lies stride
// numbers after the one before.
struct Product {
    const void* weight;
    const float* x;
    const float* bias;
    float* y;
    int64_t n, k, stride, format;
};

// Keys are taken KEYS at a time and added up SPAN at a time; both begin at multiples of themselves.
// MAX_PARTIALS heads of rows are worked on together.
enum { KEYS = 64, SPAN = 512, MAX_HEAD_DIM = 256, MAX_PARTIALS = 48 };

// What the attention of every layer of a step is told: sequence s has the rows starts[s] to starts[s + 1] and
// lengths[s] positions after them; its pages are row s of pages, [sequences, stride].
struct Sequences {
    const int64_t* pages;
    const int64_t* starts;
    const int64_t* lengths;
    int64_t count, stride;
};

// A row of the KV pool is [2, kv_heads, head_dim] of format, keys before values; of INT8 a float32 scale for
// each key and value head follows. TILES are bfloat16: GROUP rows, as attention wants them, number 2 p + j of row
// r of a key head at 32 p + 2 r + j, number i of row 2 r + j of a value head at 2 (head_dim r + i) + j; the key
// heads follow each other, then the value heads.
struct Pool {
    uint8_t* data;
    int64_t format, kv_heads, head_dim;  // head_dim is a multiple of 16
};

static inline int64_t pool_row_bytes(const Pool& pool) {
    const int64_t numbers = 2 * pool.kv_heads * pool.head_dim;
    if (pool.format == INT8 || pool.format == TILES8) return numbers + 8 * pool.kv_heads;
    return numbers * (pool.format == F32 ? 4 : 2);
}
static inline bool in_tiles(const Pool& pool) { return pool.format == TILES || pool.format == TILES8; }

// out is [rows, heads, head_dim].
struct Attention {
    const Sequences* sequences;
    Pool pool;
    const float* query;
    float* out;
    int64_t heads;
    int64_t page_size;
    int64_t window;        // positions a row sees, itself included; 0 is all
    int64_t query_stride;  // numbers from one row of queries to the next
    float scale;
};

// One head of one row so far: the sums of weighted values and of weights, powers of two of scores less largest:
// about the largest score, to the base 2.
struct alignas(64) Partial {
    float values[MAX_HEAD_DIM];
    float totals[GROUP];  // each of every LANES-th key
    float largest;
};

// A line of the caches that will be read, into the second-level one or the first.
static inline void fetch_line(const void* at, bool far) {
    if (far) __builtin_prefetch(at, 0, 2);
    else __builtin_prefetch(at);
}

// Bytes of the KV pool that follow each other, from its beginning on.
struct Run {
    int64_t from, bytes;
    int64_t lines() const { return (bytes + 63) / 64; }
};

// What one thread fetches meanwhile, evenly over the multiplications that it does.
struct alignas(64) Aside {
    const uint8_t* base;
    const Run *run, *end;
    const uint8_t *at, *stop;
    int64_t due, rate;  // in parts of a line, LINE of them each; rate for each multiplication
    enum { LINE = 1 << 24 };

    void fetch(int64_t multiplications) {
        for (due += multiplications * rate; due >= LINE; due -= LINE, at += 64) {
            if (at >= stop) {
                if (run == end) return;
                at = base + run->from;
                stop = at + run++->bytes;
            }
            fetch_line(at, true);
        }
    }
};

// How a thread fetches the weights to come, and what else meanwhile, or null.
struct Fetching {
    bool far;
    Aside* aside;
    // Bytes that it fetches ahead of where it reads, besides. Not those of few rows where far: a CPU's own prefetchers do
    // not start on what has been fetched for them, and do better.
    enum { NEAR = 2048 };
};

// Some new rows of a sequence, counted from its first, and some KV heads; at most MAX_PARTIALS heads of rows.
// Where partials is not null, for one span of positions of one row: left there for merge_spans.
struct AttentionTask {
    int64_t sequence, first_row, last_row, first_head, last_head;
    int64_t span;
    Partial* partials;
    bool far;  // where what comes next is fetched to
};

// RMSNorm of rows of x [rows, width], width a multiple of 16, after delta, which may be null, was added to them.
struct Norm {
    float* x;
    const float* delta;
    const float* weight;
    float* out;
    int64_t width;
    float eps;
};

// Norms the heads of q and k in qkv [rows, heads + 2 kv_heads, head_dim] with head_norm [heads + kv_heads,
// head_dim], rotates them, and writes k and v to their slots. head_norm or turns may be null.
struct Turns {
    const float* cos;  // [positions, head_dim]
    const float* sin;  // the same, of which the first half is negated
    const int64_t* positions;  // of each row; null where the tables have a row for each
};

struct Rotate {
    float* qkv;
    const float* head_norm;
    const Turns* turns;
    const int64_t* slots;
    Pool pool;
    int64_t heads;
    float eps;
};

// The rows ids of a packed matrix [n, k] as float32 [rows, k]. An id that is no row is not to be asked for.
struct Embed {
    const void* weight;
    const int64_t* ids;
    float* out;
    int64_t k, format;
};

// SiLU(gate) * up for gate_up [rows, 2, width], width a multiple of 16.
struct SiluAndMul {
    const float* gate_up;
    float* out;
    int64_t width;
};

// Rows first to last - 1 of a step have the adapter in this slot.
struct AdapterRun {
    int64_t first, last, slot;
};

// The rows of a step that have an adapter, in order; the others have none.
struct AdapterRuns {
    const AdapterRun* runs;
    int64_t count;
};

// What an adapter adds to n columns of y, from column first on: up [n, rank], packed, in float32.
struct AdapterPart {
    const void* up;
    int64_t rank, first, n;
};

// An adapter at one place of the model: down [rank, k], packed, in float32, for all of its parts, one below
// the other. Without any rank it leaves the place as it is.
enum { ADAPTER_PARTS = 3 };
struct AdapterSlot {
    const void* down;
    int64_t rank, parts;
    AdapterPart part[ADAPTER_PARTS];
};

// Adds up (down x) to the rows of y that have an adapter. x is [rows, k], a row of y lies stride numbers after
// the one before.
struct Adapt {
    const AdapterRuns* runs;
    const AdapterSlot* slots;
    const float* x;
    float* y;
    int64_t k, stride;
};

// One instruction set's functions. Every product is summed over the columns in one fixed order, whatever
// the number of rows of x.
struct Variant {
    const char* name;
    // Groups that product() works on together for a matrix of format.
    int (*groups_together)(int format);
    // Bytes of rows of x as product() wants them for a matrix of format; 0 where it takes them as they are.
    int64_t (*prepared_bytes)(int format, int64_t rows, int64_t k);
    // Rows first to last of x, of so many that product() takes together.
    void (*prepare)(int format, const float* x, int64_t first, int64_t last, int64_t rows, int64_t k, void* out);
    // Groups first to last of a packed matrix [n, k]. With a dense one a bias that is y itself adds to what
    // is there.
    void (*product)(int format, const uint8_t* packed, int64_t first, int64_t last, int64_t k, const void* x,
                    int64_t rows, const float* bias, float* y, int64_t n, int64_t stride, Fetching fetching);
    // Rows first to last.
    void (*embed)(const Embed&, int64_t first, int64_t last);
    // upcoming is what the same thread will probably do next, or null.
    void (*attend)(const Attention& job, const AttentionTask& task, const AttentionTask* upcoming);
    // All heads of row 0 of a sequence from the partials of so many spans, [spans, heads].
    void (*merge_spans)(const Attention& job, int64_t sequence, Partial* partials, int64_t spans);
    // Rows first to last.
    void (*norm)(const Norm&, int64_t first, int64_t last);
    void (*rotate)(const Rotate&, int64_t first, int64_t last);
    // Of rows of width numbers, a multiple of 16; those of gate and up are stride numbers apart.
    void (*silu_and_mul)(const float* gate, const float* up, int64_t stride, float* out, int64_t out_stride,
                         int64_t rows, int64_t width);
};

extern const Variant generic_variant;
#if defined(__x86_64__)
// Null where build.py left it out: this machine's CPU cannot run it, or has a better one.
extern const Variant avx2_variant __attribute__((weak));
extern const Variant avx512vnni_variant __attribute__((weak));
extern const Variant avx512bf16_variant __attribute__((weak));
#endif
