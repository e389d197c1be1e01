// What the instruction-set variants of variant.cpp offer, and the layouts they share with api.cpp.

#pragma once

#include <stdint.h>

enum Format { Q4_0 = 2, Q4_1 = 3, Q8_0 = 8, Q4_K = 12, Q6_K = 14 };  // ggml's numbers
enum Number { F32 = 0, F16 = 1, BF16 = 2 };

// Rows of a quantised matrix are interleaved in groups, so that one vector holds the same columns of all of
// a group's rows. A tile is 32 columns of a group, after its scales: byte 32 v + 4 r + j is column 4 v + j of
// row r, for nibbles column 16 + 4 v + j in the high half. All numbers are those of the file, bit for bit.
enum { GROUP = 8, BLOCK = 32, SUPER = 8 };  // SUPER: blocks that share a header in the K formats

struct Layout {
    int source_bytes;  // of one block of one row in the file, 32 columns (256 in the K formats)
    int source_blocks;
    int header_bytes;  // float16 scales for each row of the group, before every source_blocks tiles
    int tile_bytes;
};

// Q4_0, Q8_0: a tile's header is d. Q4_1: d, m.
// Q4_K: header d, dmin; a tile begins with 8 scales and 8 minima of 6 bits, a byte each.
// Q6_K: header d; a tile begins with 8 scales of its first 16 columns and 8 of its last (int8), then the low
// nibbles, then two vectors of high bits: bits 2 v of the first belong to columns 4 v + j, of the second
// to columns 16 + 4 v + j.
static inline Layout layout_of(int format) {
    switch (format) {
        case Q4_0: return {18, 1, 16, 128};
        case Q4_1: return {20, 1, 32, 128};
        case Q8_0: return {34, 1, 16, 256};
        case Q4_K: return {144, SUPER, 32, 16 + 128};
        case Q6_K: return {210, SUPER, 16, 16 + 192};
        default: return {0, 0, 0, 0};
    }
}

static inline int64_t group_bytes(const Layout& layout, int64_t blocks) {
    return blocks / layout.source_blocks * layout.header_bytes + blocks * layout.tile_bytes;
}

// 32 activations as int8: x is q * scale, with scale the largest magnitude / 127. A block with an infinity
// or NaN has the scale NaN, one below 2^-100 the scale 0.
struct Activations {
    int8_t q[BLOCK];
    float scale;
    int32_t first_sum;  // of q[0..15]
    int32_t sum;        // of all q
    float float_sum;    // the same
};

// What one call does, each with its struct, to the first rows of x: jobs.py has the same. A recorded step is
// a list of these whose addresses stay the same from step to step.
enum Kind { PRODUCT, ATTENTION, NORM, ROTATE, SILU_AND_MUL };

struct Entry {
    int64_t kind;
    const void* job;
};

// y = x W^T + bias for W [n, k], of the numbers or, packed, of the blocks that format names; bias may be null.
// x is [rows, k], a row of y lies stride numbers after the one before.
struct Product {
    const void* weight;
    const float* x;
    const float* bias;
    float* y;
    int64_t n, k, stride;
    int64_t packed, format;
};

// Keys are taken KEYS at a time; MAX_PARTIALS heads of rows are worked on together.
enum { KEYS = 32, MAX_HEAD_DIM = 256, MAX_PARTIALS = 32 };

// What the attention of every layer of a step is told: sequence s has the rows starts[s] to starts[s + 1] and
// lengths[s] positions after them; its pages are row s of pages, [sequences, stride].
struct Sequences {
    const int64_t* pages;
    const int64_t* starts;
    const int64_t* lengths;
    int64_t count, stride;
};

// kv is the layer's pool, [slots, 2, kv_heads, head_dim], out [rows, heads, head_dim].
struct Attention {
    const Sequences* sequences;
    const float* kv;
    const float* query;
    float* out;
    int64_t heads, kv_heads, head_dim;  // head_dim is a multiple of 8
    int64_t page_size;
    int64_t window;        // positions a row sees, itself included; 0 is all
    int64_t query_stride;  // numbers from one row of queries to the next
    float scale;
};

// Some new rows of a sequence, counted from its first, and some KV heads; at most MAX_PARTIALS heads of rows.
struct AttentionTask {
    int64_t sequence, first_row, last_row, first_head, last_head;
};

// RMSNorm of rows of x [rows, width], width a multiple of 8, after delta, which may be null, was added to them.
struct Norm {
    float* x;
    const float* delta;
    const float* weight;
    float* out;
    int64_t width;
    float eps;
};

// Norms the heads of q and k in qkv [rows, heads + 2 kv_heads, head_dim] with head_norm [heads + kv_heads,
// head_dim], rotates them, and writes k and v to their slots. head_norm or cos may be null; head_dim is a
// multiple of 16; cos and sin are [rows, head_dim].
struct Rotate {
    float* qkv;
    const float* head_norm;
    const float* cos;
    const float* sin;
    const int64_t* slots;
    float* kv;
    int64_t heads, kv_heads, head_dim;
    float eps;
};

// SiLU(gate) * up for gate_up [rows, 2, width], width a multiple of 8.
struct SiluAndMul {
    const float* gate_up;
    float* out;
    int64_t width;
};

// One instruction set's functions. Every product is summed over the columns in one fixed order, whatever
// the number of rows of x.
struct Variant {
    const char* name;
    void (*quantize)(const float* x, int64_t blocks, Activations* out);
    // Groups first to last of a packed matrix with n rows.
    void (*quantized)(int format, const uint8_t* packed, int64_t first, int64_t last, int64_t blocks,
                      const Activations* x, int64_t rows, const float* bias, float* y, int64_t n, int64_t stride);
    // Rows first to last of a row-major matrix [n, k] of Number.
    void (*dense)(int number, const void* weight, int64_t first, int64_t last, int64_t k, const float* x,
                  int64_t rows, const float* bias, float* y, int64_t stride);
    void (*attend)(const Attention& job, const AttentionTask& task);
    // Rows first to last.
    void (*norm)(const Norm&, int64_t first, int64_t last);
    void (*rotate)(const Rotate&, int64_t first, int64_t last);
    void (*silu_and_mul)(const SiluAndMul&, int64_t first, int64_t last);
};

extern const Variant generic_variant;
#if defined(__x86_64__)
// Null where build.py left it out, since this machine's CPU could not run it.
extern const Variant avx2_variant __attribute__((weak));
extern const Variant avx512vnni_variant __attribute__((weak));
#endif
