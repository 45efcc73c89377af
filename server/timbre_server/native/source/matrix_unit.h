// Products of rows and panels of bfloat16 by a matrix unit, where the processor has one: of 16 rows, 32 inputs and 16
// outputs at once.
//
// Its registers are tiles of up to 16 lines of 64 bytes: 32 inputs of 16 rows are one as they lie, and 16 pairs of
// inputs of 16 outputs, where these lie together. Sums are float32, and a row's have the same terms in the same order
// whatever rows are beside it.
#pragma once

#include "wide.h"

#if defined __AMX_BF16__ && defined __linux__
#define HAS_MATRIX_UNIT

#include <sys/syscall.h>
#include <unistd.h>

constexpr int SIDE = 16;  // Rows of a tile, and outputs.
constexpr int DEPTH = 32;  // Inputs of a tile.
constexpr int MOST_TILED = 2 * SIDE;  // Rows, of which all sums with two times SIDE outputs stay in tiles.
constexpr int TILE_BYTES = SIDE * LINE, TILE_LINES = SIDE;
constexpr int SOON = 1024;  // Numbers ahead, of what is asked for where weights are read once.

// Whether the system lets this process use it, and keeps its registers: that must be asked for once.
static bool may_use_matrix_unit() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool may = !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA);
    return may;
}

// What was written lies in memory, from where GCC does not know that tiles are read.
static inline void settle(const void *written) { asm volatile("" : : "r"(written) : "memory"); }

// Tiles 0 and 1 are sums of up to SIDE rows, 2 and 3 of the rows after them; 4 and 5 are these rows, 6 and 7 weights.
struct alignas(LINE) TileShapes {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t bytes[16] = {};
    uint8_t lines[16] = {};

    explicit TileShapes(int rows) {
        for (int tile = 0; tile < 8; tile++) bytes[tile] = LINE, lines[tile] = SIDE;
        lines[0] = lines[1] = lines[4] = rows < SIDE ? rows : SIDE;
        lines[2] = lines[3] = lines[5] = rows > SIDE ? rows - SIDE : 1;
    }
};

// Before products of so many rows.
static inline void shape_tiles(int rows) {
    const TileShapes shapes(rows);
    settle(&shapes);
    _tile_loadconfig(&shapes);
}

// What is asked of memory meanwhile: two tiles of weights that come soon, a quarter at a time, or `few` lines that come
// later.
struct Asked {
    const char *lines;
    int few;  // For every DEPTH inputs; 0: weights are read once.

    template <int QUARTER> void ask() const {
        constexpr int COUNT = 2 * TILE_LINES / 4;
        if (few) return;
#pragma GCC unroll 16
        for (int i = QUARTER * COUNT; i < (QUARTER + 1) * COUNT; i++) __builtin_prefetch(lines + i * LINE);
    }

    void ask_few() const {
        for (int i = 0; i < few; i++) __builtin_prefetch(lines + i * LINE, 0, 2);
    }

    void go_on() { lines += (few ? few : 2 * TILE_LINES) * LINE; }
};

// What DEPTH inputs add to the sums of rows `x` and, where there are any, `more`, which are `apart` bytes from each
// other. Where weights are read for many rows, these leave the first cache to them.
template <bool HAS_MORE>
static inline void add_tiles(const BFloat16 *x, const BFloat16 *more, int64_t apart, const char *weights, Asked asked) {
    if (asked.few) _tile_stream_loadd(4, x, apart);
    else _tile_loadd(4, x, apart);
    asked.ask<0>();
    _tile_loadd(6, weights, LINE);
    asked.ask<1>();
    _tile_loadd(7, weights + TILE_BYTES, LINE);
    asked.ask<2>();
    _tile_dpbf16ps(0, 4, 6);
    asked.ask<3>();
    _tile_dpbf16ps(1, 4, 7);
    asked.ask_few();
    if (!HAS_MORE) return;
    if (asked.few) _tile_stream_loadd(5, more, apart);
    else _tile_loadd(5, more, apart);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

// sums [count, 2 * SIDE] = rows x [count, in] times a panel, which has for every DEPTH inputs weights of SIDE outputs,
// pair of inputs by pair, then those of the others, and zeros for inputs that there are not.
template <bool HAS_MORE>
static void multiply_tiles_of(const BFloat16 *x, int64_t in, int count, const void *panel, float *sums, Asked asked) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const char *weights = static_cast<const char *>(panel);
    int64_t i = 0;
    for (; i + DEPTH <= in; i += DEPTH, weights += 2 * TILE_BYTES, asked.go_on())
        add_tiles<HAS_MORE>(x + i, x + SIDE * in + i, in * sizeof *x, weights, asked);
    if (i < in) {
        alignas(LINE) BFloat16 rest[MOST_TILED][DEPTH] = {};
        for (int row = 0; row < count; row++) std::memcpy(rest[row], x + row * in + i, (in - i) * sizeof *x);
        settle(rest);
        add_tiles<HAS_MORE>(rest[0], rest[SIDE], LINE, weights, asked);
    }
    _tile_stored(0, sums, 2 * LINE);
    _tile_stored(1, sums + SIDE, 2 * LINE);
    if (!HAS_MORE) return;
    _tile_stored(2, sums + SIDE * 2 * SIDE, 2 * LINE);
    _tile_stored(3, sums + SIDE * 2 * SIDE + SIDE, 2 * LINE);
}

static void multiply_tiles(const BFloat16 *x, int64_t in, int count, const void *panel, float *sums, Asked asked) {
    (count > SIDE ? multiply_tiles_of<true> : multiply_tiles_of<false>)(x, in, count, panel, sums, asked);
}
#endif
