// The matrix unit, where the processor has one: products of bfloat16, of 16 rows, 32 inputs and 16 outputs at once.
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

// Whether the system lets this process use it, and keeps its registers: that must be asked for once.
static inline bool may_use_matrix_unit() {
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
#else
static inline bool may_use_matrix_unit() { return false; }
#endif
