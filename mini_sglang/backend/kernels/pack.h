// Between a matrix as the file has it and the interleaved groups of kernels.h.

#pragma once

#include "kernels.h"

#include <cstring>

namespace {

// Where a dense number is: bytes into the group.
inline int64_t dense_place(int format, int64_t column, int row) {
    if (format == F32) return (column * GROUP + row) * 4;
    if (format == F16) return (column * GROUP + row) * 2;
    return ((column / 2 * GROUP + row) * 2 + column % 2) * 2;
}

void pack_dense(int format, const uint8_t* rows, uint8_t* out, int valid, int64_t k) {
    const int size = layout_of(format).source_bytes;
    // BF16 goes in pairs of columns, as if they were one number of 32 bits; its last may be alone.
    const int step = format == BF16 ? 2 : 1, bytes = size * step;
    const int64_t whole = k / step;
    for (int64_t c = 0; c < whole; c++)
        for (int r = 0; r < valid; r++) {
            const uint8_t* from = rows + r * k * size + c * bytes;
            uint8_t* to = out + (c * GROUP + r) * bytes;
            if (bytes == 4) memcpy(to, from, 4);
            else memcpy(to, from, 2);
        }
    for (int r = 0; whole * step < k && r < valid; r++)
        memcpy(out + dense_place(format, k - 1, r), rows + (r * k + k - 1) * size, size);
}

// The file's blocks of one group, interleaved. Rows from n on are zeros.
void pack_group(int format, const uint8_t* blocks, uint8_t* out, int64_t group, int64_t n, int64_t k) {
    const Layout layout = layout_of(format);
    const int64_t count = k / layout.source_columns;
    const int valid = n - group * GROUP < GROUP ? (int)(n - group * GROUP) : GROUP;
    const int tiles_each = layout.source_columns / BLOCK;
    memset(out, 0, group_bytes(format, k));
    if (is_dense(format))
        return pack_dense(format, blocks + group * GROUP * k * layout.source_bytes, out, valid, k);
    for (int64_t b = 0; b < count; b++) {
        uint8_t* header = out;
        uint8_t* tiles = out + layout.header_bytes;
        out = tiles + tiles_each * layout.tile_bytes;
        for (int r = 0; r < valid; r++) {
            const uint8_t* block = blocks + ((group * GROUP + r) * count + b) * layout.source_bytes;
            memcpy(header + 2 * r, block + (format == Q6_K ? 208 : 0), 2);
            if (layout.header_bytes == 64) memcpy(header + 32 + 2 * r, block + 2, 2);
            if (format == Q8_0) {
                for (int v = 0; v < 8; v++) memcpy(tiles + 64 * v + 4 * r, block + 2 + 4 * v, 4);
                continue;
            }
            if (format == Q4_0 || format == Q4_1) {
                for (int v = 0; v < 4; v++)
                    memcpy(tiles + 64 * v + 4 * r, block + layout.source_bytes - 16 + 4 * v, 4);
                continue;
            }
            for (int t = 0; t < tiles_each; t++) {
                uint8_t* tile = tiles + t * layout.tile_bytes;
                if (format == Q4_K) {
                    // Twelve bytes hold 8 scales and 8 minima: see _scales_and_mins in quant.py.
                    const uint8_t* s = block + 4;
                    tile[r] = t < 4 ? s[t] & 63 : (s[t + 4] & 15) | (s[t - 4] >> 2 & 48);
                    tile[16 + r] = t < 4 ? s[t + 4] & 63 : s[t + 4] >> 4 | (s[t] >> 2 & 48);
                } else if (format == Q6_K) {
                    tile[r] = block[192 + 2 * t];
                    tile[16 + r] = block[193 + 2 * t];
                }
                uint8_t* packed = tile + 32;
                for (int i = 0; i < BLOCK; i++) {
                    const int at = i % 16 / 4 * 64 + 4 * r + i % 4, high = i / 16;
                    if (format == Q4_K) {
                        packed[at] |= (block[16 + t / 2 * 32 + i] >> 4 * (t % 2) & 15) << 4 * high;
                    } else {
                        const uint8_t low = block[t / 4 * 64 + t % 2 * 32 + i] >> (t % 4 < 2 ? 0 : 4);
                        const uint8_t top = block[128 + t / 4 * 32 + i] >> 2 * (t % 4) & 3;
                        packed[at] |= (low & 15) << 4 * high;
                        packed[256 + 64 * high + 4 * r + i % 4] |= top << 2 * (i % 16 / 4);
                    }
                }
            }
        }
    }
}

// The opposite, for the rows ids: as the file has them, [count, bytes of a row].
void unpack_rows(int format, const uint8_t* packed, const int64_t* ids, uint8_t* out, int64_t count,
                 int64_t k) {
    const Layout layout = layout_of(format);
    const int64_t bytes = group_bytes(format, k), blocks = k / layout.source_columns;
    const int tiles_each = layout.source_columns / BLOCK;
    memset(out, 0, count * blocks * layout.source_bytes);
    for (int64_t row = 0; row < count; row++) {
        const int r = ids[row] % GROUP;
        const uint8_t* header = packed + ids[row] / GROUP * bytes;
        if (is_dense(format)) {
            const int size = layout.source_bytes;
            for (int64_t c = 0; c < k; c++, out += size) memcpy(out, header + dense_place(format, c, r), size);
            continue;
        }
        for (int64_t b = 0; b < blocks; b++, out += layout.source_bytes) {
            const uint8_t* tiles = header + layout.header_bytes;
            memcpy(out + (format == Q6_K ? 208 : 0), header + 2 * r, 2);
            if (layout.header_bytes == 64) memcpy(out + 2, header + 32 + 2 * r, 2);
            header = tiles + tiles_each * layout.tile_bytes;
            if (format == Q8_0) {
                for (int v = 0; v < 8; v++) memcpy(out + 2 + 4 * v, tiles + 64 * v + 4 * r, 4);
                continue;
            }
            if (format == Q4_0 || format == Q4_1) {
                for (int v = 0; v < 4; v++)
                    memcpy(out + layout.source_bytes - 16 + 4 * v, tiles + 64 * v + 4 * r, 4);
                continue;
            }
            for (int t = 0; t < tiles_each; t++) {
                const uint8_t* tile = tiles + t * layout.tile_bytes;
                const uint8_t* codes = tile + 32;
                if (format == Q4_K) {
                    uint8_t* s = out + 4;
                    const uint8_t scale = tile[r], minimum = tile[16 + r];
                    if (t < 4) {
                        s[t] |= scale;
                        s[t + 4] |= minimum;
                    } else {
                        s[t + 4] |= (scale & 15) | minimum << 4;
                        s[t - 4] |= scale >> 4 << 6;
                        s[t] |= minimum >> 4 << 6;
                    }
                } else {
                    out[192 + 2 * t] = tile[r];
                    out[193 + 2 * t] = tile[16 + r];
                }
                for (int i = 0; i < BLOCK; i++) {
                    const uint8_t code = codes[i % 16 / 4 * 64 + 4 * r + i % 4] >> 4 * (i / 16) & 15;
                    if (format == Q4_K) {
                        out[16 + t / 2 * 32 + i] |= code << 4 * (t % 2);
                    } else {
                        const uint8_t four = codes[256 + 64 * (i / 16) + 4 * r + i % 4];
                        const uint8_t top = four >> 2 * (i % 16 / 4) & 3;
                        out[t / 4 * 64 + t % 2 * 32 + i] |= code << (t % 4 < 2 ? 0 : 4);
                        out[128 + t / 4 * 32 + i] |= top << 2 * (t % 4);
                    }
                }
            }
        }
    }
}

}  // namespace
