// Sequences with several rows, whose queries of one KV head lie side by side in lanes.
//
// Keys are taken in pieces, whose scores are all that is kept: sums over the pieces before are scaled to the
// highest score since. A query's sums are made in the order of positions, and keys that it does not see add
// zeros, so that its result does not depend on how its sequence was cut into steps and tiles (of finite values:
// zero times another is no number).
#pragma once

#include <cfloat>
#include <cmath>

#include "attention_floats.h"
#include "attention_unit.h"

constexpr int64_t MOST_TOGETHER = 8;  // Times QUERIES, for which a piece is found once.

// Of enough tiles for all threads, which end at different times.
static std::vector<Tile> tiles_of(const Attention &call, int threads) {
    const Sequence *chunks = call.rows->chunks, *after = chunks + call.rows->num_chunks;
    int64_t total = 0;
    for (const Sequence *own = chunks; own < after; own++) total += own->num_rows * call.group * call.kv_heads;
    const int64_t together = threads == 1 ? MOST_TOGETHER : total / (QUERIES * 4 * threads);
    const int64_t most = QUERIES * std::clamp<int64_t>(together, 1, MOST_TOGETHER);
    std::vector<Tile> tiles;
    for (const Sequence *own = chunks; own < after; own++)
        for (int64_t g = 0; g < call.kv_heads; g++)
            for (int64_t first = 0, all = own->num_rows * call.group; first < all; first += most)
                tiles.push_back({&call, own, g, first, std::min(all - first, most)});
    return tiles;
}

// QUERIES of a tile at most.
template <class Products> class Attended {
  public:
    static int64_t size(const Attention &call) {
        return Products::size(call) + QUERIES * (height(call) + Products::PIECE);
    }

    Attended(const Tile &tile, float *memory) : tile(tile), products(tile, memory) {
        const int64_t sums_size = QUERIES * height(*tile.call);
        sums = memory + Products::size(*tile.call), scores = sums + sums_size;
        std::fill(sums, sums + sums_size, 0.0f);
        for (int i = 0; i < QUERIES; i++) positions[i / WIDTH][i % WIDTH] = tile.position_of(i);
        for (int v = 0; v < VECTORS; v++) {
            highest[v] = Wide{} - FLT_MAX;
            totals[v] = Wide{};
        }
    }

    // Keys begin .. end - 1, which are the first of a piece.
    void add(const typename Products::Piece &piece, int64_t begin, int64_t end) {
        products.score(piece, end - begin, scores);
        Wide factors[VECTORS];
        for (int v = 0; v < VECTORS; v++) factors[v] = weigh(begin, end, v);
        products.add_values(piece, end - begin, scores, factors, sums);
    }

    template <class Number> void put_out() const {
        const int64_t E = tile.call->value_dim, heads = tile.call->kv_heads * tile.call->group;
        for (int64_t first = 0; first < tile.count; first += LANES)
            for (int64_t e = 0; e < E; e += LANES) {
                const Lanes total = load(reinterpret_cast<const float *>(totals) + first);
                Lanes block[LANES];
                for (int i = 0; i < LANES; i++) block[i] = load(sums + (e + i) * QUERIES + first) / total;
                transpose(block);
                for (int i = 0; i < LANES && first + i < tile.count; i++) {
                    const int64_t row = tile.sequence->first_row + tile.row_of(first + i);
                    const int64_t place = (row * heads + tile.head_of(first + i)) * E + e;
                    store(static_cast<Number *>(tile.call->out) + place, block[i]);
                }
            }
    }

    int64_t end() const { return tile.last() + 1; }  // Of the keys that these see.

  private:
    const Tile tile;
    const Products products;
    float *sums, *scores;  // [height, QUERIES], [PIECE, QUERIES].
    Wide highest[VECTORS], totals[VECTORS];
    WideIntegers positions[VECTORS];

    static int64_t height(const Attention &call) { return (call.value_dim + WIDTH - 1) / WIDTH * WIDTH; }

    // Scores of a vector of queries become weights. Returns what takes the sums of the pieces before to the
    // highest score since.
    Wide weigh(int64_t begin, int64_t end, int v) {
        float *own = scores + v * WIDTH;
        const Wide unseen = Wide{} - INFINITY;
        const float scale = products.scale();
        Wide most = highest[v], total = totals[v];
        for (int64_t key = begin; key < end; key++, own += QUERIES) {
            const WideIntegers ago = positions[v] - int32_t(key);
            const Wide score = (ago < 0) | (ago >= int32_t(tile.call->window)) ? unseen : wide(own) * scale;
            put(score, own);
            most = score > most ? score : most;
        }
        const Wide factor = exponential(highest[v] - most);
        highest[v] = most;
        total *= factor;
        own = scores + v * WIDTH;
        for (int64_t key = begin; key < end; key++, own += QUERIES) {
            const Wide weight = wide(own) == unseen ? Wide{} : exponential(wide(own) - most);
            put(weight, own);
            total += weight;
        }
        totals[v] = total;
        return factor;
    }
};

template <class Products, class Number> static void attend_by(const Tile &tile) {
    constexpr int64_t STEP = Products::STEP, PIECE = Products::PIECE;
    const int64_t num_own = (tile.count + QUERIES - 1) / QUERIES, piece_size = Products::Piece::size(*tile.call);
    thread_local Scratch scratch;  // Kept: fresh pages cost more than what is written to them.
    float *memory = scratch.of(piece_size + num_own * Attended<Products>::size(*tile.call));
    typename Products::Piece piece(tile, memory);
    memory += piece_size;
    std::vector<Attended<Products>> attended;
    for (int64_t n = 0; n < tile.count; n += QUERIES, memory += Attended<Products>::size(*tile.call)) {
        const int64_t count = std::min<int64_t>(tile.count - n, QUERIES);
        attended.emplace_back(Tile{tile.call, tile.sequence, tile.kv_head, tile.first + n, count}, memory);
    }
    const auto whole = [](int64_t end) { return (end + STEP - 1) / STEP * STEP; };
    const int64_t after = whole(tile.last() + 1);
    for (int64_t begin = tile.lowest_seen() / STEP * STEP, end; begin < after; begin = end) {
        end = std::min((begin / PIECE + 1) * PIECE, after);
        piece.take(begin, end);
        for (auto &own : attended)
            if (begin < own.end()) own.add(piece, begin, std::min(end, whole(own.end())));
    }
    for (const auto &own : attended) own.template put_out<Number>();
}

template <class Number> static void attend_tile(const Tile &tile) {
#ifdef HAS_MATRIX_UNIT
    if constexpr (sizeof(Number) < sizeof(float))
        if (may_use_matrix_unit()) {
            shape_tiles(2 * SIDE);
            attend_by<UnitProducts, Number>(tile);
            _tile_release();
            return;
        }
#endif
    attend_by<FloatProducts<Number>, Number>(tile);
}
