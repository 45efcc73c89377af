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
    int few;  // For every DEPTH inputs; 0: weights are read once; -1: all is near.

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
// other. Where weights are read for many rows, these leave the first cache to them. There may be ONE tile of weights.
template <bool HAS_MORE, bool ONE>
static inline void add_tiles(const BFloat16 *x, const BFloat16 *more, int64_t apart, const char *weights, Asked asked) {
    if (asked.few) _tile_stream_loadd(4, x, apart);
    else _tile_loadd(4, x, apart);
    asked.ask<0>();
    _tile_loadd(6, weights, LINE);
    asked.ask<1>();
    if (!ONE) _tile_loadd(7, weights + TILE_BYTES, LINE);
    asked.ask<2>();
    _tile_dpbf16ps(0, 4, 6);
    asked.ask<3>();
    if (!ONE) _tile_dpbf16ps(1, 4, 7);
    asked.ask_few();
    if (!HAS_MORE) return;
    if (asked.few) _tile_stream_loadd(5, more, apart);
    else _tile_loadd(5, more, apart);
    _tile_dpbf16ps(2, 5, 6);
    if (!ONE) _tile_dpbf16ps(3, 5, 7);
}

// To the sums of rows x [count, in] is added their product with a panel, which has for every DEPTH inputs weights of
// SIDE outputs, pair of inputs by pair, then those of the others unless there is ONE tile, and zeros for inputs that
// there are not.
template <bool HAS_MORE, bool ONE>
static void add_products_of(const BFloat16 *x, int64_t in, int count, const void *panel, Asked asked) {
    const char *weights = static_cast<const char *>(panel);
    int64_t i = 0;
    for (; i + DEPTH <= in; i += DEPTH, weights += (2 - ONE) * TILE_BYTES, asked.go_on())
        add_tiles<HAS_MORE, ONE>(x + i, x + SIDE * in + i, in * sizeof *x, weights, asked);
    if (i == in) return;
    alignas(LINE) BFloat16 rest[MOST_TILED][DEPTH] = {};
    for (int row = 0; row < count; row++) std::memcpy(rest[row], x + row * in + i, (in - i) * sizeof *x);
    settle(rest);
    add_tiles<HAS_MORE, ONE>(rest[0], rest[SIDE], LINE, weights, asked);
}

template <bool ONE = false>
static void add_products(const BFloat16 *x, int64_t in, int count, const void *panel, Asked asked) {
    (count > SIDE ? add_products_of<true, ONE> : add_products_of<false, ONE>)(x, in, count, panel, asked);
}

static inline void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Sums of `count` rows with 2 * SIDE outputs, or SIDE, which lie `apart` bytes from each other; 0: all begin with the
// same.
template <bool ONE = false> static inline void load_sums(const float *sums, int64_t apart, int count) {
    settle(sums);
    _tile_loadd(0, sums, apart);
    if (!ONE) _tile_loadd(1, sums + SIDE, apart);
    if (count <= SIDE) return;
    const char *more = reinterpret_cast<const char *>(sums) + SIDE * apart;
    _tile_loadd(2, more, apart);
    if (!ONE) _tile_loadd(3, more + LINE, apart);
}

template <bool ONE = false> static inline void store_sums(float *sums, int64_t apart, int count) {
    _tile_stored(0, sums, apart);
    if (!ONE) _tile_stored(1, sums + SIDE, apart);
    if (count <= SIDE) return;
    char *more = reinterpret_cast<char *>(sums) + SIDE * apart;
    _tile_stored(2, more, apart);
    if (!ONE) _tile_stored(3, more + LINE, apart);
}
#endif
