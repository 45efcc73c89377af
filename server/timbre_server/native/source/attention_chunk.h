// Sequences with several rows. Queries of one KV head lie side by side in lanes, and every number of a key or
// a value is multiplied by all of them.
//
// Keys are taken in pieces, whose scores are all that is kept: sums over the pieces before are scaled to the
// highest score since. A query's sums are made in the order of positions, and keys that it does not see add
// zeros, so that its result does not depend on how its sequence was cut into steps and tiles (of finite values:
// zero times another is no number).
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "attention.h"
#include "wide.h"

constexpr int VECTORS = 3;
constexpr int QUERIES = VECTORS * WIDTH;
constexpr int AT_ONCE = 4;  // Numbers that are multiplied by all queries; the sums fit registers.
constexpr int64_t PIECE = 64;  // Keys.

// `count` queries of a sequence and a KV head: the i-th of all is of row i / group and of head i % group.
struct Tile {
    const Sequence *sequence;
    int64_t kv_head, first, count;
};

static std::vector<Tile> tiles_of(const Attention &call) {
    std::vector<Tile> tiles;
    for (int64_t i = 0; i < call.rows->num_chunks; i++) {
        const Sequence &chunk = call.rows->chunks[i];
        const int64_t queries = chunk.num_rows * call.group;
        for (int64_t g = 0; g < call.kv_heads; g++)
            for (int64_t first = 0; first < queries; first += QUERIES)
                tiles.push_back({&chunk, g, first, std::min<int64_t>(queries - first, QUERIES)});
    }
    return tiles;
}

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

template <class Number> class AttendedTile {
  public:
    AttendedTile(const Attention &call, const Tile &tile) : call(call), tile(tile) {
        const int64_t D = call.key_dim, E = call.value_dim;
        thread_local Scratch memory;  // Kept: fresh pages cost more than what is written to them.
        queries = memory.of(QUERIES * (D + E + PIECE) + PIECE * std::max(D, E));
        sums = queries + QUERIES * D;
        scores = sums + QUERIES * E;
        scratch = scores + QUERIES * PIECE;
        for (int64_t i = 0; i < QUERIES * E; i++) sums[i] = 0;
        for (int i = 0; i < QUERIES; i++) positions[i / WIDTH][i % WIDTH] = tile.sequence->start + row_of(i);
        for (int v = 0; v < VECTORS; v++) {
            highest[v] = Wide{} - FLT_MAX;
            totals[v] = Wide{};
        }
        for (int first = 0; first < QUERIES; first += LANES)
            for (int64_t d = 0; d < D; d += LANES) put_queries(first, d);
    }

    // Keys begin .. end - 1, which are at most PIECE, and their values.
    void add(int64_t begin, int64_t end) {
        score(begin, end);
        Wide factors[VECTORS];
        for (int v = 0; v < VECTORS; v++) factors[v] = weigh(begin, end, v);
        add_values(begin, end, factors);
    }

    void put_out() const {
        const int64_t E = call.value_dim;
        for (int64_t first = 0; first < tile.count; first += LANES)
            for (int64_t e = 0; e < E; e += LANES) {
                const Lanes total = load(reinterpret_cast<const float *>(totals) + first);
                Lanes block[LANES];
                for (int i = 0; i < LANES; i++) block[i] = load(sums + (e + i) * QUERIES + first) / total;
                transpose(block);
                for (int i = 0; i < LANES && first + i < tile.count; i++) {
                    const int64_t row = tile.sequence->first_row + row_of(first + i);
                    const int64_t head = row * call.kv_heads * call.group + head_of(first + i);
                    store(static_cast<Number *>(call.out) + head * E + e, block[i]);
                }
            }
    }

  private:
    const Attention &call;
    const Tile &tile;
    float *queries, *sums, *scores;  // [key_dim, QUERIES], [value_dim, QUERIES], [PIECE, QUERIES].
    float *scratch;
    Wide highest[VECTORS], totals[VECTORS];
    WideIntegers positions[VECTORS];

    // Of the tile's query i; after the last one the last again.
    int64_t row_of(int64_t i) const { return (tile.first + std::min(i, tile.count - 1)) / call.group; }
    int64_t head_of(int64_t i) const { return tile.kv_head * call.group + (tile.first + i) % call.group; }

    void put_queries(int first, int64_t d) {
        Lanes block[LANES] = {};
        for (int i = 0; i < LANES && first + i < tile.count; i++) {
            const int64_t row = tile.sequence->first_row + row_of(first + i);
            block[i] = load(call.q.at<Number>(row, head_of(first + i)) + d) * call.scale;
        }
        transpose(block);
        for (int i = 0; i < LANES; i++) store(queries + (d + i) * QUERIES + first, block[i]);
    }

    const Number *at(const void *pool, int64_t dim, int64_t position) const {
        return static_cast<const Number *>(pool) +
               (tile.sequence->slots[position] * call.kv_heads + tile.kv_head) * dim;
    }

    void score(int64_t begin, int64_t end) {
        const int64_t D = call.key_dim;
        for (int64_t first = begin; first < end; first += AT_ONCE) {
            const float *keys[AT_ONCE];
            for (int64_t j = 0; j < AT_ONCE; j++)  // After the last key the last again.
                keys[j] = floats(at(call.keys, D, std::min(first + j, end - 1)), D, scratch + j * D);
            Sums products = {};
            add_products(products, queries, D, [&](int64_t d, int j) { return keys[j][d]; });
            store(scores + (first - begin) * QUERIES, products);
        }
    }

    // Scores of a vector of queries become weights. Returns what takes the sums of the pieces before to the
    // highest score since.
    Wide weigh(int64_t begin, int64_t end, int v) {
        float *own = scores + v * WIDTH;
        const Wide unseen = Wide{} - INFINITY;
        Wide most = highest[v];
        for (int64_t key = begin; key < end; key++, own += QUERIES) {
            const WideIntegers ago = positions[v] - int32_t(key);
            const Wide score = (ago < 0) | (ago >= int32_t(call.window)) ? unseen : wide(own);
            put(score, own);
            most = score > most ? score : most;
        }
        const Wide factor = exponential(highest[v] - most);
        highest[v] = most;
        totals[v] *= factor;
        own = scores + v * WIDTH;
        for (int64_t key = begin; key < end; key++, own += QUERIES) {
            const Wide weight = wide(own) == unseen ? Wide{} : exponential(wide(own) - most);
            put(weight, own);
            totals[v] += weight;
        }
        return factor;
    }

    void add_values(int64_t begin, int64_t end, const Wide (&factors)[VECTORS]) {
        const int64_t E = call.value_dim;
        const float *values[PIECE];
        for (int64_t n = 0; n < end - begin; n++)
            values[n] = floats(at(call.values, E, begin + n), E, scratch + n * E);
        for (int64_t e = 0; e < E; e += AT_ONCE) {
            Sums products;
            for (int j = 0; j < AT_ONCE; j++)
                for (int v = 0; v < VECTORS; v++)
                    products[j][v] = wide(sums + (e + j) * QUERIES + v * WIDTH) * factors[v];
            add_products(products, scores, end - begin, [&](int64_t n, int j) { return values[n][e + j]; });
            store(sums + e * QUERIES, products);
        }
    }
};

template <class Number> static void attend_tile(const Attention &call, const Tile &tile) {
    const int64_t first = tile.sequence->start + tile.first / call.group;
    const int64_t last = tile.sequence->start + (tile.first + tile.count - 1) / call.group;
    AttendedTile<Number> attended(call, tile);
    for (int64_t begin = call.lowest_seen(first), end; begin <= last; begin = end) {
        end = std::min((begin / PIECE + 1) * PIECE, last + 1);
        attended.add(begin, end);
    }
    attended.put_out();
}
