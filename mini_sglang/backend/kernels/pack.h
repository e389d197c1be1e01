// Between ggml's blocks and the interleaved groups of kernels.h.

#pragma once

#include "kernels.h"

#include <cstring>

namespace {

// The file's blocks of one group, interleaved. Rows from n on are zeros.
void pack_group(int format, const uint8_t* blocks, uint8_t* out, int64_t group, int64_t n, int64_t k) {
    const Layout layout = layout_of(format);
    const int64_t count = k / BLOCK / layout.source_blocks;
    memset(out, 0, group_bytes(layout, k / BLOCK));
    for (int64_t b = 0; b < count; b++) {
        uint8_t* header = out;
        uint8_t* tiles = out + layout.header_bytes;
        out = tiles + layout.source_blocks * layout.tile_bytes;
        for (int r = 0; r < GROUP && group * GROUP + r < n; r++) {
            const uint8_t* block = blocks + ((group * GROUP + r) * count + b) * layout.source_bytes;
            memcpy(header + 2 * r, block + (format == Q6_K ? 208 : 0), 2);
            if (layout.header_bytes == 32) memcpy(header + 16 + 2 * r, block + 2, 2);
            for (int t = 0; t < layout.source_blocks; t++) {
                uint8_t* tile = tiles + t * layout.tile_bytes;
                if (format == Q4_K) {
                    // Twelve bytes hold 8 scales and 8 minima: see _scales_and_mins in quant.py.
                    const uint8_t* s = block + 4;
                    tile[r] = t < 4 ? s[t] & 63 : (s[t + 4] & 15) | (s[t - 4] >> 2 & 48);
                    tile[8 + r] = t < 4 ? s[t + 4] & 63 : s[t + 4] >> 4 | (s[t] >> 2 & 48);
                } else if (format == Q6_K) {
                    tile[r] = block[192 + 2 * t];
                    tile[8 + r] = block[193 + 2 * t];
                }
                uint8_t* packed = tile + (layout.source_blocks > 1 ? 16 : 0);
                for (int i = 0; i < BLOCK; i++) {
                    const int at = i % 16 / 4 * 32 + 4 * r + i % 4, high = i / 16;
                    if (format == Q8_0) {
                        packed[i / 4 * 32 + 4 * r + i % 4] = block[2 + i];
                    } else if (format == Q4_K) {
                        packed[at] |= (block[16 + t / 2 * 32 + i] >> 4 * (t % 2) & 15) << 4 * high;
                    } else if (format == Q6_K) {
                        const uint8_t low = block[t / 4 * 64 + t % 2 * 32 + i] >> (t % 4 < 2 ? 0 : 4);
                        const uint8_t top = block[128 + t / 4 * 32 + i] >> 2 * (t % 4) & 3;
                        packed[at] |= (low & 15) << 4 * high;
                        packed[128 + 32 * high + 4 * r + i % 4] |= top << 2 * (i % 16 / 4);
                    } else {
                        packed[at] |= (block[layout.source_bytes - 16 + i % 16] >> 4 * high & 15) << 4 * high;
                    }
                }
            }
        }
    }
}

// The opposite, for the rows ids: blocks of the file, [count, bytes of a row].
void unpack_rows(int format, const uint8_t* packed, const int64_t* ids, uint8_t* out, int64_t count,
                 int64_t k) {
    const Layout layout = layout_of(format);
    const int64_t bytes = group_bytes(layout, k / BLOCK);
    memset(out, 0, count * (k / BLOCK / layout.source_blocks) * layout.source_bytes);
    for (int64_t row = 0; row < count; row++) {
        const int r = ids[row] % GROUP;
        const uint8_t* header = packed + ids[row] / GROUP * bytes;
        for (int64_t b = 0; b < k / BLOCK / layout.source_blocks; b++, out += layout.source_bytes) {
            const uint8_t* tiles = header + layout.header_bytes;
            memcpy(out + (format == Q6_K ? 208 : 0), header + 2 * r, 2);
            if (layout.header_bytes == 32) memcpy(out + 2, header + 16 + 2 * r, 2);
            header = tiles + layout.source_blocks * layout.tile_bytes;
            for (int t = 0; t < layout.source_blocks; t++) {
                const uint8_t* tile = tiles + t * layout.tile_bytes;
                const uint8_t* codes = tile + (layout.source_blocks > 1 ? 16 : 0);
                if (format == Q4_K) {
                    uint8_t* s = out + 4;
                    const uint8_t scale = tile[r], minimum = tile[8 + r];
                    if (t < 4) {
                        s[t] |= scale;
                        s[t + 4] |= minimum;
                    } else {
                        s[t + 4] |= (scale & 15) | minimum << 4;
                        s[t - 4] |= scale >> 4 << 6;
                        s[t] |= minimum >> 4 << 6;
                    }
                } else if (format == Q6_K) {
                    out[192 + 2 * t] = tile[r];
                    out[193 + 2 * t] = tile[8 + r];
                }
                for (int i = 0; i < BLOCK; i++) {
                    const uint8_t code = codes[i % 16 / 4 * 32 + 4 * r + i % 4] >> 4 * (i / 16) & 15;
                    if (format == Q8_0) {
                        out[2 + i] = codes[i / 4 * 32 + 4 * r + i % 4];
                    } else if (format == Q4_K) {
                        out[16 + t / 2 * 32 + i] |= code << 4 * (t % 2);
                    } else if (format == Q6_K) {
                        const uint8_t four = codes[128 + 32 * (i / 16) + 4 * r + i % 4];
                        const uint8_t top = four >> 2 * (i % 16 / 4) & 3;
                        out[t / 4 * 64 + t % 2 * 32 + i] |= code << (t % 4 < 2 ? 0 : 4);
                        out[128 + t / 4 * 32 + i] |= top << 2 * (t % 4);
                    } else {
                        out[layout.source_bytes - 16 + i % 16] |= code << 4 * (i / 16);
                    }
                }
            }
        }
    }
}

}  // namespace
