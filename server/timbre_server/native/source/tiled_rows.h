// Products of rows and a panel of weights by the matrix unit.
#pragma once

#include "matrix_unit.h"

#ifdef HAS_MATRIX_UNIT
constexpr int TILE_BYTES = SIDE * LINE, TILE_LINES = SIDE;
constexpr int SOON = 1024;  // Numbers ahead, of what is asked for where weights are read once.

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
