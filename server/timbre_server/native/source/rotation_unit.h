// Blocks that turn vectors, by the matrix unit: what they change, R - 1, is of bfloat16, and each number of a vector a
// pair.
#pragma once

#include "chunk_rows.h"

#ifdef HAS_MATRIX_UNIT
// Blocks of one size.
class TiledTurns {
  public:
    // Larger ones would take more memory than they are worth.
    static bool may_turn(int64_t size) { return size == SIDE || (size % (2 * SIDE) == 0 && size <= 512); }

    explicit TiledTurns(int64_t size) : size(size), block(size * size / WIDTH), pairs(MOST_TILED * size / WIDTH) {}

    ~TiledTurns() { _tile_release(); }

    // y += weight (R - 1) x, of `changes` R - 1 [size, size] and some numbers of rows of so many features; x may be y.
    void add(const BFloat16 *changes, const Rows &rows, const float *x, float *y, int64_t features) {
        put_block(changes);
        for (int64_t n = 0; n < rows.count; n += MOST_TILED) {
            const int count = std::min<int64_t>(rows.count - n, MOST_TILED);
            if (count != shaped) shape_tiles(shaped = count);
            put_pairs(rows, n, count, x, features);
            const int64_t *own = rows.rows + n;
            if (size == SIDE) add_changes<true>(own, count, y, features, 0);
            for (int64_t o = 0; size > SIDE && o < size; o += 2 * SIDE) add_changes<false>(own, count, y, features, o);
        }
    }

  private:
    int64_t size;
    std::vector<WideBits> block;  // Panels of 2 SIDE outputs at most: of SIDE inputs and SIDE outputs after each other.
    std::vector<WideBits> pairs;  // [rows, size]
    int shaped = 0;

    void put_block(const BFloat16 *changes) {
        WideBits *to = block.data();
        for (int64_t first = 0; first < size; first += 2 * SIDE)
            for (int64_t i = 0; i < size; i += SIDE)
                for (int64_t o = first; o < std::min(first + 2 * SIDE, size); o += SIDE, to += SIDE) {
                    Wide tile[SIDE];
                    for (int j = 0; j < SIDE; j++) {
                        WideHalves numbers;
                        std::memcpy(&numbers, changes + (o + j) * size + i, sizeof numbers);
                        tile[j] = (Wide)twice(numbers);
                    }
                    transpose(tile);
                    std::memcpy(to, tile, sizeof tile);
                }
        settle(block.data());
    }

    void put_pairs(const Rows &rows, int64_t n, int count, const float *x, int64_t features) {
        WideBits *to = pairs.data();
        for (const int64_t end = n + count; n < end; n++) {
            const float *from = x + rows.rows[n] * features;
            const float weight = rows.weights[n];
            for (int64_t i = 0; i < size; i += WIDTH) *to++ = paired(wide(from + i) * weight);
        }
        settle(pairs.data());
    }

    // To outputs of these rows from the o-th on, where they lie if one follows the other.
    template <bool ONE> void add_changes(const int64_t *rows, int count, float *y, int64_t features, int64_t o) {
        constexpr int OUTPUTS = ONE ? SIDE : 2 * SIDE;
        const bool are_together = rows[count - 1] - rows[0] == count - 1;
        if (are_together) return add_changes<ONE>(y + rows[0] * features + o, features, count, o);
        alignas(LINE) float sums[MOST_TILED][OUTPUTS];
        for (int r = 0; r < count; r++) std::copy_n(y + rows[r] * features + o, OUTPUTS, sums[r]);
        add_changes<ONE>(sums[0], OUTPUTS, count, o);
        settle(sums);
        for (int r = 0; r < count; r++) std::copy_n(sums[r], OUTPUTS, y + rows[r] * features + o);
    }

    template <bool ONE> void add_changes(float *sums, int64_t step, int count, int64_t o) {
        load_sums<ONE>(sums, step * sizeof *sums, count);
        const auto from = reinterpret_cast<const BFloat16 *>(pairs.data());
        add_products<ONE>(from, 2 * size, count, block.data() + o * size / WIDTH, NEAR);
        store_sums<ONE>(sums, step * sizeof *sums, count);
    }
};
#else
struct NoTurns {
    static bool may_turn(int64_t) { return false; }
    explicit NoTurns(int64_t) {}
    void add(const BFloat16 *, const Rows &, const float *, float *, int64_t) {}
};
using TiledTurns = NoTurns;
#endif
