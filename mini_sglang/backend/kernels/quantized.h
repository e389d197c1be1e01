// x W^T for W in ggml's blocks, interleaved, and x in int8.

#pragma once

#include "vectors.h"

namespace {

// Prepared rows of x lie in panels: block b of row r at (r / panel * blocks + b) * panel + r % panel. A panel is as
// many rows as are multiplied together: with more between them they would share few sets of the first-level cache.
// Six rows by two groups are the fastest, but where weights come from memory: few rows are taken by four.
inline int64_t panel_of(int format, int64_t rows) {
    if (LANES != 16 || format == Q6_K) return 16;
    return rows < 128 ? 4 : 6;
}

// ---- LANES rows of a tile of each format: load() once, then the product with a block of each row of x

struct Nibbles {
    Codes w[8];
    void load_codes(const uint8_t* p) {
        UNROLL for (int v = 0; v < 4; v++) {
            Codes both = codes(p + 64 * v);
            w[v] = low_nibbles(both);
            w[4 + v] = high_nibbles(both);
        }
    }
    // One of the eight, by itself.
    static Codes vector(const uint8_t* p, int v) {
        return v < 4 ? low_nibbles(codes(p + 64 * v)) : high_nibbles(codes(p + 64 * (v - 4)));
    }
    int code(int column, int lane) const { return ((const uint8_t*)&w[column / 4])[4 * lane + column % 4]; }
    Ints dot_from(int32_t first, const Activations& x) const { return dot<8, 15>(w, x.q, first); }
};

struct TileQ4_0 : Nibbles {
    static constexpr int FORMAT = Q4_0;
    Floats d;
    void load(const uint8_t* header, const uint8_t* tile, int half) {
        d = halves(header + 2 * LANES * half);
        load_codes(tile + 4 * LANES * half);
    }
    static constexpr bool HAS_MINIMA = false;
    static int32_t from(const Activations& x) { return x.from_8; }
    static Floats scales(const uint8_t* header, const uint8_t*) { return halves(header); }
    static Floats minima(const uint8_t*, const uint8_t*) { return Floats{}; }
    float number(int column, int lane) const { return d[lane] * (float)(code(column, lane) - 8); }
    Floats scaled(Ints dot, const Activations&) const { return d * to_floats(dot); }
    Floats times(const Activations& x) const { return scaled(dot_from(from(x), x), x); }
};

struct TileQ4_1 : Nibbles {
    static constexpr int FORMAT = Q4_1;
    Floats d, m;
    float number(int column, int lane) const { return d[lane] * (float)code(column, lane) + m[lane]; }
    void load(const uint8_t* header, const uint8_t* tile, int half) {
        d = halves(header + 2 * LANES * half);
        m = halves(header + 32 + 2 * LANES * half);
        load_codes(tile + 4 * LANES * half);
    }
    static constexpr bool HAS_MINIMA = true;
    static int32_t from(const Activations&) { return 0; }
    static Floats scales(const uint8_t* header, const uint8_t*) { return halves(header); }
    static Floats minima(const uint8_t* header, const uint8_t*) { return halves(header + 32); }
    Floats scaled(Ints dot, const Activations& x) const { return fused(d, to_floats(dot), m * x.sum); }
    Floats times(const Activations& x) const { return scaled(dot_from(0, x), x); }
};

struct TileQ8_0 {
    static constexpr int FORMAT = Q8_0;
    static constexpr bool HAS_MINIMA = false;
    static int32_t from(const Activations& x) { return x.from_128; }
    static Floats scales(const uint8_t* header, const uint8_t*) { return halves(header); }
    static Floats minima(const uint8_t*, const uint8_t*) { return Floats{}; }
    static Codes vector(const uint8_t* tile, int v) { return signed_codes(tile + 64 * v); }
    Floats d;
    Codes w[8];
    void load(const uint8_t* header, const uint8_t* tile, int half) {
        d = halves(header + 2 * LANES * half);
        UNROLL for (int v = 0; v < 8; v++) w[v] = signed_codes(tile + 64 * v + 4 * LANES * half);
    }
    float number(int column, int lane) const {
        return d[lane] * (float)signed_code(((const uint8_t*)&w[column / 4])[4 * lane + column % 4]);
    }
    Floats times(const Activations& x) const { return d * to_floats(signed_dot(w, x.q, x.from_128)); }
};

struct TileQ4_K : Nibbles {
    static constexpr int FORMAT = Q4_K;
    Floats d, m;
    float number(int column, int lane) const { return d[lane] * (float)code(column, lane) - m[lane]; }
    void load(const uint8_t* header, const uint8_t* tile, int half) {
        d = halves(header + 2 * LANES * half) * bytes(tile + LANES * half);
        m = halves(header + 32 + 2 * LANES * half) * bytes(tile + 16 + LANES * half);
        load_codes(tile + 32 + 4 * LANES * half);
    }
    static constexpr bool HAS_MINIMA = true;
    static int32_t from(const Activations&) { return 0; }
    static Codes vector(const uint8_t* tile, int v) { return Nibbles::vector(tile + 32, v); }
    static Floats scales(const uint8_t* header, const uint8_t* tile) { return halves(header) * bytes(tile); }
    static Floats minima(const uint8_t* header, const uint8_t* tile) {
        return -(halves(header + 32) * bytes(tile + 16));
    }
    Floats scaled(Ints dot, const Activations& x) const { return fused(d, to_floats(dot), m * -x.sum); }
    Floats times(const Activations& x) const { return scaled(dot_from(0, x), x); }
};

struct TileQ6_K : Nibbles {
    static constexpr int FORMAT = Q6_K;
    Floats d[2];
    void load(const uint8_t* header, const uint8_t* tile, int half) {
        UNROLL for (int h = 0; h < 2; h++)
            d[h] = halves(header + 2 * LANES * half) * bytes((const int8_t*)tile + 16 * h + LANES * half);
        load_codes(tile + 32 + 4 * LANES * half);
        UNROLL for (int h = 0; h < 2; h++) {
            Codes high = codes(tile + 288 + 64 * h + 4 * LANES * half);
            Codes* four = w + 4 * h;
            four[0] = with_high_bits<0>(four[0], high);
            four[1] = with_high_bits<2>(four[1], high);
            four[2] = with_high_bits<4>(four[2], high);
            four[3] = with_high_bits<6>(four[3], high);
        }
    }
    float number(int column, int lane) const {
        return d[column / 16][lane] * (float)(code(column, lane) - 32);
    }
    Floats times(const Activations& x) const {
        const Ints first = dot<4, 63>(w, x.q, x.from_32[0]), last = dot<4, 63>(w + 4, x.q + 16, x.from_32[1]);
        return fused(d[0], to_floats(first), d[1] * to_floats(last));
    }
};

template <class Tile>
void block_rows(const Embed& job, int64_t first, int64_t last) {
    const Layout layout = layout_of(Tile::FORMAT);
    for (int64_t row = first; row < last; row++) {
        const int64_t id = job.ids[row];
        const int lane = id % GROUP % LANES, half = id % GROUP / LANES;
        const uint8_t* w = (const uint8_t*)job.weight + id / GROUP * group_bytes(Tile::FORMAT, job.k);
        const uint8_t* header = w;
        float* out = job.out + row * job.k;
        for (int64_t c = 0; c < job.k; c += BLOCK, w += layout.tile_bytes) {
            if (c % layout.source_columns == 0) {
                header = w;
                w += layout.header_bytes;
            }
            Tile tile;
            tile.load(header, w, half);
            for (int i = 0; i < BLOCK; i++) out[c + i] = tile.number(i, lane);
        }
    }
}

#if defined(__AVX2__) && !defined(__AVX512VNNI__)

// Four rows of x by both halves of a tile of nibbles: what is broadcast of x, and the loads it takes, serve
// both.
template <class Tile>
inline void four_times(const Tile* tiles, const Activations* x, Floats (*sums)[HALVES]) {
    Codes dots[4][2] = {};
    // Not unrolled, and all sums held in registers: gcc would put some of them on the stack.
    _Pragma("GCC unroll 1") for (int v = 0; v < 8; v++) {
        UNROLL for (int i = 0; i < 4; i++) {
            const Codes q = four(x[i].q + 4 * v);
            UNROLL for (int h = 0; h < 2; h++) dots[i][h] = add_dot(dots[i][h], tiles[h].w[v], q);
        }
        asm("" : "+x"(dots[0][0]), "+x"(dots[0][1]), "+x"(dots[1][0]), "+x"(dots[1][1]));
        asm("" : "+x"(dots[2][0]), "+x"(dots[2][1]), "+x"(dots[3][0]), "+x"(dots[3][1]));
    }
    UNROLL for (int i = 0; i < 4; i++)
        UNROLL for (int h = 0; h < 2; h++) {
            const Ints whole = whole_dot(dots[i][h]) + Tile::from(x[i]);
            sums[i][h] = fused(tiles[h].scaled(whole, x[i]), all(x[i].scale), sums[i][h]);
        }
}

template <class Tile>
constexpr bool BY_FOURS = __is_base_of(Nibbles, Tile) && Tile::FORMAT != Q6_K;

#endif

// One group by ROWS rows of one panel of x. By itself: inlined together, gcc keeps the tile of some formats in memory.
template <class Tile, int ROWS>
__attribute__((noinline)) void group_times(const uint8_t* w, int64_t blocks, const Activations* x, int64_t panel,
                                           const float* bias, float* y, int64_t stride, int64_t valid,
                                           Fetching fetching) {
    const Layout layout = layout_of(Tile::FORMAT);
    Floats sums[ROWS][HALVES] = {};
    const uint8_t* header = w;
    for (int64_t b = 0; b < blocks; b++, x += panel) {
        if (b % (layout.source_columns / BLOCK) == 0) {
            header = w;
            w += layout.header_bytes;
        }
#if defined(__AVX2__)
        for (int line = 0; line < layout.tile_bytes; line += 64) __builtin_prefetch(w + line + Fetching::NEAR);
#endif
        Tile tiles[HALVES];
        UNROLL for (int h = 0; h < HALVES; h++) tiles[h].load(header, w, h);
        w += layout.tile_bytes;
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
        if constexpr (ROWS % 4 == 0 && BY_FOURS<Tile>) {
            if (ROWS >= 8 && fetching.aside) fetching.aside->fetch(ROWS * GROUP * BLOCK);
            for (int r = 0; r < ROWS; r += 4) four_times(tiles, x + r, sums + r);
            continue;
        }
#endif
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int h = 0; h < HALVES; h++)
                sums[r][h] = fused(tiles[h].times(x[r]), all(x[r].scale), sums[r][h]);
    }
    UNROLL for (int r = 0; r < ROWS; r++) write_group(sums[r], bias, y + r * stride, valid);
}

#if defined(__AVX512VNNI__)

template <class Tile>
constexpr bool IN_PAIRS = Tile::FORMAT != Q6_K;

// GROUPS groups, bytes apart, by ROWS rows of one panel of x: what is broadcast of x serves all groups. What the
// minima add is summed by itself, which leaves registers for the codes of two groups.
template <class Tile, int ROWS, int GROUPS, bool FETCHES = true>
void groups_by_rows(const uint8_t* w, int64_t bytes, int64_t blocks, const Activations* x, int64_t panel,
                    const float* bias, float* y, int64_t stride, int64_t valid, Ahead ahead) {
    const Layout layout = layout_of(Tile::FORMAT);
    Floats sums[ROWS][GROUPS] = {}, minima[ROWS][GROUPS] = {};
    auto each_block = [&](auto work) {
        const int64_t blocks_of_header = layout.source_columns / BLOCK;
        const uint8_t *header = w, *tile = w;
        for (int64_t b = 0; b < blocks; b++, tile += layout.tile_bytes) {
            if (b % blocks_of_header == 0) header = tile, tile += layout.header_bytes;
            work(header, tile, x + b * panel);
        }
    };
    each_block([&](const uint8_t* header, const uint8_t* tile, const Activations* at) {
        if (FETCHES) ahead.fetch<GROUPS>(tile, bytes, layout.tile_bytes + layout.header_bytes);
        if (ROWS >= 4 && ahead.fetching.aside) ahead.fetching.aside->fetch(ROWS * GROUPS * GROUP * BLOCK);
        Floats d[GROUPS];
        Codes dots[ROWS][GROUPS];
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int g = 0; g < GROUPS; g++) dots[r][g] = _mm512_set1_epi32(Tile::from(at[r]));
        auto add = [&](int v, auto code) {
            UNROLL for (int r = 0; r < ROWS; r++) {
                const Codes q = four(at[r].q + 4 * v);
                UNROLL for (int g = 0; g < GROUPS; g++) dots[r][g] = _mm512_dpbusd_epi32(dots[r][g], code(g), q);
            }
        };
        if constexpr (ROWS <= 4) {
            Tile tiles[GROUPS];
            UNROLL for (int g = 0; g < GROUPS; g++) {
                tiles[g].load(header + g * bytes, tile + g * bytes, 0);
                d[g] = tiles[g].d;
            }
            UNROLL for (int v = 0; v < 8; v++) add(v, [&](int g) { return tiles[g].w[v]; });
        } else {
            // So many sums leave room for few codes: those of one byte follow each other.
            UNROLL for (int g = 0; g < GROUPS; g++) d[g] = Tile::scales(header + g * bytes, tile + g * bytes);
            UNROLL for (int i = 0; i < 8; i++) {
                const int v = i / 2 + i % 2 * 4;
                Codes w[GROUPS];
                UNROLL for (int g = 0; g < GROUPS; g++) w[g] = Tile::vector(tile + g * bytes, v);
                add(v, [&](int g) { return w[g]; });
            }
        }
        UNROLL for (int r = 0; r < ROWS; r++)
            UNROLL for (int g = 0; g < GROUPS; g++)
                sums[r][g] = fused(d[g] * to_floats((Ints)dots[r][g]), all(at[r].scale), sums[r][g]);
        UNROLL for (int r = 0; Tile::HAS_MINIMA && ROWS < 4 && r < ROWS; r++)
            UNROLL for (int g = 0; g < GROUPS; g++)
                minima[r][g] = fused(Tile::minima(header + g * bytes, tile + g * bytes), all(at[r].scaled_sum), minima[r][g]);
    });
    if (Tile::HAS_MINIMA && ROWS >= 4)
        each_block([&](const uint8_t* header, const uint8_t* tile, const Activations* at) {
            UNROLL for (int g = 0; g < GROUPS; g++) {
                const Floats m = Tile::minima(header + g * bytes, tile + g * bytes);
                UNROLL for (int r = 0; r < ROWS; r++) minima[r][g] = fused(m, all(at[r].scaled_sum), minima[r][g]);
            }
        });
    UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int g = 0; g < GROUPS; g++) {
            const Floats sum = Tile::HAS_MINIMA ? sums[r][g] + minima[r][g] : sums[r][g];
            write_group(&sum, bias ? bias + g * GROUP : nullptr, y + r * stride + g * GROUP, valid - g * GROUP);
        }
}

#else

template <class Tile>
constexpr bool IN_PAIRS = false;

#endif

// Of prepared rows, to stay in the second-level cache while a chunk's groups pass by.
constexpr int64_t CACHED_BYTES = 384 << 10;

// Flattened: gcc hands Ahead to a tile that stays a function through memory, in other pieces than it is read in there:
// a load that waits for all stores before it.
template <class Tile>
__attribute__((flatten)) void groups_times(const uint8_t* packed, int64_t first, int64_t last, int64_t k,
                                           const Activations* x, int64_t rows, const float* bias, float* y, int64_t n,
                                           int64_t y_stride, Fetching fetching) {
    const int64_t bytes = group_bytes(Tile::FORMAT, k), blocks = k / BLOCK, panel = panel_of(Tile::FORMAT, rows);
    int64_t slab = CACHED_BYTES / (blocks * (int64_t)sizeof(Activations)) / panel * panel;
    slab = slab < panel ? panel : slab;
    for (int64_t start = 0; start < rows; start += slab) {
        const int64_t stop = start + slab < rows ? start + slab : rows;
        for (int64_t g = first; g < last; g++) {
            const int64_t column = g * GROUP;
            int64_t row = start;
#if defined(__AVX512VNNI__)
            if constexpr (IN_PAIRS<Tile>) {
                const bool pair = g + 1 < last && stop - start >= 4;
                const int64_t passes = (stop - start) / panel, every = passes < 1 ? 1 : passes < 4 ? passes : 4;
                auto part = [&](auto times, int count, int64_t distance, int64_t every, int64_t until) {
                    for (; row + count <= until; row += count)
                        times(packed + g * bytes, bytes, blocks, x + row / panel * panel * blocks + row % panel, panel,
                              bias ? bias + column : nullptr, y + row * y_stride + column, y_stride, n - column,
                              Ahead{fetching, distance, every, (row - start) / panel % every});
                };
                // One row goes through the weights as they come, more of them through two groups some times, of which
                // the first four share the fetching.
                const int64_t fetched = start + 4 * panel < stop ? start + 4 * panel : stop;
                const int64_t seldom = fetching.far ? INT64_MAX : every;  // see Fetching::NEAR
                if (pair) {
                    if (panel == 6) {
                        part(groups_by_rows<Tile, 6, 2>, 6, 2 * bytes, every, fetched);
                        part(groups_by_rows<Tile, 6, 2, false>, 6, 0, 1, stop);
                    } else {
                        part(groups_by_rows<Tile, 4, 2>, 4, 2 * bytes, every, fetched);
                    }
                    part(groups_by_rows<Tile, 4, 2, false>, 4, 0, 1, stop);
                    part(groups_by_rows<Tile, 2, 2, false>, 2, 0, 1, stop);
                    part(groups_by_rows<Tile, 1, 2, false>, 1, 0, 1, stop);
                } else {
                    if (panel == 6) part(groups_by_rows<Tile, 6, 1>, 6, Fetching::NEAR, seldom, stop);
                    part(groups_by_rows<Tile, 4, 1>, 4, Fetching::NEAR, seldom, stop);
                    part(groups_by_rows<Tile, 2, 1>, 2, Fetching::NEAR, seldom, stop);
                    part(groups_by_rows<Tile, 1, 1>, 1, Fetching::NEAR, seldom, stop);
                }
                g += pair;
                continue;
            }
#endif
            auto part = [&](auto times, int count) {
                for (; row + count <= stop; row += count)
                    times(packed + g * bytes, blocks, x + row / panel * panel * blocks + row % panel, panel,
                          bias ? bias + column : nullptr, y + row * y_stride + column, y_stride, n - column, fetching);
            };
            part(group_times<Tile, 16>, 16);
            part(group_times<Tile, 8>, 8);
            part(group_times<Tile, 4>, 4);
            part(group_times<Tile, 2>, 2);
            part(group_times<Tile, 1>, 1);
        }
    }
}

}  // namespace
