// Products of queries with keys, and of weights with values, in float32: queries of one KV head lie side by side in
// lanes, and every number of a key or a value is multiplied by all of them.
#pragma once

#include "attention_tiles.h"

constexpr int AT_ONCE = 4;  // Numbers that are multiplied by all queries; the sums fit registers.
typedef Wide Sums[AT_ONCE][VECTORS];

// In a register: GCC would load it again for each product.
static inline Wide kept(Wide lanes) {
#ifdef __AVX__
    asm("" : "+v"(lanes));
#endif
    return lanes;
}

// sums[j] += the sum over i < count of number(i, j) * lanes[i], where lanes is [count, QUERIES].
template <class Find>
static inline void add_products(Sums &sums, const float *lanes, int64_t count, Find number) {
    for (int64_t i = 0; i < count; i++) {
        Wide own[VECTORS];
        for (int v = 0; v < VECTORS; v++) own[v] = kept(wide(lanes + i * QUERIES + v * WIDTH));
        for (int j = 0; j < AT_ONCE; j++) {
            const Wide one = Wide{} + number(i, j);
            for (int v = 0; v < VECTORS; v++) sums[j][v] += own[v] * one;
        }
    }
}

static inline void store(float *to, const Sums &sums) {
    for (int j = 0; j < AT_ONCE; j++)
        for (int v = 0; v < VECTORS; v++) put(sums[j][v], to + j * QUERIES + v * WIDTH);
}

template <class Number> class FloatProducts {
  public:
    static constexpr int64_t PIECE = 64;  // Keys that are taken at once.
    static constexpr int64_t STEP = 1;  // Pieces begin and end at multiples of so many keys.

    // Up to PIECE keys, and their values.
    class Piece {
      public:
        static int64_t size(const Attention &call) { return PIECE * (call.key_dim + call.value_dim); }

        Piece(const Tile &tile, float *memory) : tile(tile), memory(memory) {}

        void take(int64_t begin, int64_t end) {
            const int64_t D = tile.call->key_dim, E = tile.call->value_dim;
            for (int64_t n = 0; n < PIECE; n++) {  // After the last key the last again.
                const int64_t position = std::min(begin + n, end - 1);
                keys[n] = n < end - begin ? floats(tile.key<Number>(position), D, memory + n * D) : keys[n - 1];
                if (n < end - begin) values[n] = floats(tile.value<Number>(position), E, memory + PIECE * D + n * E);
            }
        }

      private:
        friend FloatProducts;
        const Tile &tile;
        float *memory;
        const float *keys[PIECE], *values[PIECE];
    };

    static int64_t size(const Attention &call) { return QUERIES * call.key_dim; }

    FloatProducts(const Tile &tile, float *memory) : call(*tile.call), queries(memory) {
        for (int first = 0; first < QUERIES; first += LANES)
            for (int64_t d = 0; d < call.key_dim; d += LANES) {
                Lanes block[LANES] = {};
                for (int i = 0; i < LANES && first + i < tile.count; i++)
                    block[i] = load(tile.query<Number>(first + i) + d);
                transpose(block);
                for (int i = 0; i < LANES; i++) store(queries + (d + i) * QUERIES + first, block[i] * call.scale);
            }
    }

    float scale() const { return 1; }  // Of scores: that of queries is in them.

    // scores [count, QUERIES], of a piece's first keys.
    void score(const Piece &piece, int64_t count, float *scores) const {
        for (int64_t first = 0; first < count; first += AT_ONCE) {
            Sums products = {};
            add_products(products, queries, call.key_dim, [&](int64_t d, int j) { return piece.keys[first + j][d]; });
            store(scores + first * QUERIES, products);
        }
    }

    // sums [value_dim, QUERIES] = sums times factors + weights [count, QUERIES] times values.
    void add_values(
        const Piece &piece, int64_t count, const float *weights, const Wide (&factors)[VECTORS], float *sums
    ) const {
        for (int64_t e = 0; e < call.value_dim; e += AT_ONCE) {
            Sums products;
            for (int j = 0; j < AT_ONCE; j++)
                for (int v = 0; v < VECTORS; v++)
                    products[j][v] = wide(sums + (e + j) * QUERIES + v * WIDTH) * factors[v];
            add_products(products, weights, count, [&](int64_t n, int j) { return piece.values[n][e + j]; });
            store(sums + e * QUERIES, products);
        }
    }

  private:
    const Attention &call;
    float *queries;  // [key_dim, QUERIES], scaled.
};
