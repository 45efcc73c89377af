// Products of queries with keys, and of weights with values, of bfloat16 by the matrix unit: K Q^T and V^T P^T, so that
// queries lie side by side as in float32. Sums and scores are float32; weights are rounded to bfloat16 for theirs.
#pragma once

#include "attention_tiles.h"
#include "matrix_unit.h"

#ifdef HAS_MATRIX_UNIT
class UnitProducts {
  public:
    static constexpr int64_t PIECE = 128, STEP = DEPTH;

    // Up to PIECE keys, and their values; zeros where a tile sees none.
    class Piece {
      public:
        static int64_t size(const Attention &call) { return PIECE * (depth(call) / 2 + height(call)); }

        Piece(const Tile &tile, float *memory) : tile(tile), keys(reinterpret_cast<BFloat16 *>(memory)) {
            values = keys + PIECE * depth(*tile.call);
            rows = values + PIECE * height(*tile.call);
        }

        void take(int64_t begin, int64_t end) {
            const int64_t D = depth(*tile.call), E = height(*tile.call), count = end - begin;
            const int64_t first = std::max(tile.lowest_seen() - begin, int64_t(0));
            const int64_t after = std::min(tile.last() + 1 - begin, count);
            std::memset(keys, 0, count * D * sizeof *keys);
            std::memset(rows, 0, count * E * sizeof *rows);
            for (int64_t n = first; n < after; n++) {
                std::memcpy(keys + n * D, tile.key<BFloat16>(begin + n), tile.call->key_dim * sizeof *keys);
                std::memcpy(rows + n * E, tile.value<BFloat16>(begin + n), tile.call->value_dim * sizeof *rows);
            }
            for (int64_t n = 0; n < count; n += DEPTH)
                for (int64_t e = 0; e < E; e += SIDE) {
                    Wide pairs[SIDE];
                    for (int p = 0; p < SIDE; p++) pairs[p] = pair(rows + (n + 2 * p) * E + e, E);
                    transpose(pairs);
                    for (int i = 0; i < SIDE; i++) std::memcpy(values + (e + i) * PIECE + n, &pairs[i], LINE);
                }
            settle(keys);
        }

      private:
        friend UnitProducts;
        const Tile &tile;
        BFloat16 *keys, *values, *rows;  // [PIECE, depth], [height, PIECE], and values as they lie.

        // Of SIDE numbers of two values.
        static Wide pair(const BFloat16 *value, int64_t apart) {
            Wide first, second;
            get(first, value), get(second, value + apart);
            return (Wide)((WideBits)first >> 16 | (WideBits)second);
        }
    };

    static int64_t size(const Attention &call) { return QUERIES * (depth(call) + PIECE) / 2; }

    UnitProducts(const Tile &tile, float *memory) : call(*tile.call), queries(reinterpret_cast<BFloat16 *>(memory)) {
        weights = queries + QUERIES * depth(call);
        BFloat16 *to = queries;
        for (int64_t d = 0; d < call.key_dim; d += DEPTH) {
            const int64_t bytes = std::min<int64_t>(DEPTH, call.key_dim - d) * sizeof(BFloat16);
            for (int first = 0; first < QUERIES; first += SIDE, to += SIDE * DEPTH) {
                Wide pairs[SIDE] = {};
                for (int i = 0; i < SIDE && first + i < tile.count; i++)
                    std::memcpy(&pairs[i], tile.query<BFloat16>(first + i) + d, bytes);
                transpose(pairs);
                std::memcpy(to, pairs, sizeof pairs);
            }
        }
        settle(queries);
    }

    void score(const Piece &piece, int64_t count, float *scores) const {
        const int64_t all = depth(call);
        for (int64_t n = 0; n < count; n += SIDE) {
            const BFloat16 *keys = piece.keys + n * all, *own = queries;
            zero();
            for (int64_t d = 0; d < all; d += DEPTH, own += QUERIES * DEPTH) add(keys + d, all, own);
            store_sums(scores + n * QUERIES);
        }
    }

    void add_values(
        const Piece &piece, int64_t count, const float *own, const Wide (&factors)[VECTORS], float *sums
    ) const {
        round_weights(own, count);
        for (int64_t e = 0; e < call.value_dim; e += SIDE) {
            float *to = sums + e * QUERIES;
            for (int64_t i = 0; i < SIDE; i++)
                for (int v = 0; v < VECTORS; v++, to += WIDTH) put(wide(to) * factors[v], to);
            to = sums + e * QUERIES;
            settle(to);
            load_sums(to);
            for (int64_t n = 0; n < count; n += DEPTH) add(piece.values + e * PIECE + n, PIECE, weights + n * QUERIES);
            store_sums(to);
        }
    }

    float scale() const { return call.scale; }  // Of scores.

  private:
    const Attention &call;
    BFloat16 *queries;  // [depth / DEPTH, VECTORS, DEPTH / 2, WIDTH, 2]
    BFloat16 *weights;  // [PIECE / DEPTH, VECTORS, DEPTH / 2, WIDTH, 2]

    static int64_t depth(const Attention &call) { return (call.key_dim + DEPTH - 1) / DEPTH * DEPTH; }
    static int64_t height(const Attention &call) { return (call.value_dim + SIDE - 1) / SIDE * SIDE; }

    // As bfloat16, of pairs of keys.
    void round_weights(const float *own, int64_t count) const {
        BFloat16 *to = weights;
        for (int64_t n = 0; n < count; n += DEPTH)
            for (int v = 0; v < VECTORS; v++)
                for (int64_t p = 0; p < DEPTH; p += 2, to += 2 * WIDTH) {
                    const float *first = own + (n + p) * QUERIES + v * WIDTH;
                    const WideBits low = rounded_to_bfloat16((WideBits)wide(first));
                    const WideBits both = low | rounded_to_bfloat16((WideBits)wide(first + QUERIES)) << 16;
                    std::memcpy(to, &both, sizeof both);
                }
        settle(weights);
    }

    // SIDE sums of all queries lie in tiles 0, 1 and 2.
    static void zero() {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
    }

    static void load_sums(const float *sums) {
        _tile_loadd(0, sums, QUERIES * sizeof(float));
        _tile_loadd(1, sums + WIDTH, QUERIES * sizeof(float));
        _tile_loadd(2, sums + 2 * WIDTH, QUERIES * sizeof(float));
    }

    static void store_sums(float *sums) {
        _tile_stored(0, sums, QUERIES * sizeof(float));
        _tile_stored(1, sums + WIDTH, QUERIES * sizeof(float));
        _tile_stored(2, sums + 2 * WIDTH, QUERIES * sizeof(float));
    }

    // What DEPTH numbers of each of SIDE rows that are so far `apart` add, with those of all queries.
    static void add(const BFloat16 *rows, int64_t apart, const BFloat16 *own) {
        _tile_loadd(3, rows, apart * sizeof *rows);
        _tile_loadd(4, own, LINE);
        _tile_loadd(5, own + SIDE * DEPTH, LINE);
        _tile_loadd(6, own + 2 * SIDE * DEPTH, LINE);
        _tile_dpbf16ps(0, 3, 4);
        _tile_dpbf16ps(1, 3, 5);
        _tile_dpbf16ps(2, 3, 6);
    }
};
#endif
