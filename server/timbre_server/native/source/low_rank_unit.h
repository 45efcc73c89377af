// Adapters of low rank by the matrix unit, for rows of chunks.
//
// z = A x is a product of tiles. Each number of weight z becomes a pair of bfloat16, of which the second is what the
// first one leaves: with the numbers of B twice, B z is a product of tiles, too, of 16 ranks at once. Up to 32 rows
// that begin at a multiple of 32 are a group, in which z is zero for rows that are not the adapter's; so a row's sums
// are the same ones in the same order whatever other rows and adapters there are.
#pragma once

#include "chunk_rows.h"
#include "linear.h"
#include "low_rank.h"

static Parted<LowRank> parted(std::vector<LowRankUse> uses, const Input &input, const uint8_t *in_chunks) {
    const auto may = [](const LowRank &part) { return part.a.format == BFLOAT16 && part.b.format == BFLOAT16; };
    return {std::move(uses), input.is_narrow() ? in_chunks : nullptr, may};
}

#ifdef HAS_MATRIX_UNIT
constexpr int64_t PAIRS = SIDE * SIDE;  // Of one tile.

// DEPTH numbers, or `count`, and zeros.
static inline Wide pairs_at(const BFloat16 *from, int64_t count) {
    if (count >= DEPTH) return wide(from);
    BFloat16 rest[DEPTH] = {};
    std::copy(from, from + count, rest);
    return wide(rest);
}

// Ranks from `first` on of A [rank, in] as tiles [SIDE pairs of inputs, SIDE ranks]; as much of `next` is asked for.
static void put_in_tiles(const LowRank &part, int64_t first, int64_t in, const LowRank &next, float *tiles) {
    const BFloat16 *a = static_cast<const BFloat16 *>(part.a.first), *soon = static_cast<const BFloat16 *>(next.a.first);
    for (int64_t i = 0; i < in; i += DEPTH, tiles += PAIRS) {
        Wide pairs[SIDE] = {};
        for (int64_t r = first; r < std::min(part.rank, first + SIDE); r++) {
            pairs[r - first] = pairs_at(a + r * in + i, in - i);
            if (r < next.rank) ask(soon, (r * in + i) / DEPTH * DEPTH);
        }
        transpose(pairs);
        std::memcpy(tiles, pairs, sizeof pairs);
    }
}

// PANEL numbers of each rank of B [rank, out] from `first` on, each twice: tiles [SIDE outputs, SIDE ranks], one after
// the other for each rank's outputs. The next ones are asked for.
static void put_twice(const LowRank &part, int64_t out, int64_t first, WideBits *to) {
    const BFloat16 *b = static_cast<const BFloat16 *>(part.b.first) + first;
    for (int64_t rank = 0; rank < part.rank; rank += SIDE, to += 2 * SIDE)
        for (int64_t r = rank; r < std::min(part.rank, rank + SIDE); r++, b += out) {
            __builtin_prefetch(b + PANEL, 0, 2);
            const Wide both = pairs_at(b, out - first);
            WideHalves halves[2];
            std::memcpy(halves, &both, sizeof both);
            for (int half : {0, 1}) to[half * SIDE + r - rank] = twice(halves[half]);
        }
}

class TiledLowRank {
  public:
    TiledLowRank(const std::vector<LowRankUse> &uses, const Input &input, int64_t rows, int64_t out)
        : uses(uses), input(input), rows(rows), out(out), begins((rows + MOST_TILED - 1) / MOST_TILED + 1, 0) {
        int64_t size = 0;
        for (size_t u = 0; u < uses.size(); u++)
            for (int64_t n = 0, end; n < uses[u].rows->count; n = end) {
                const int64_t *own = uses[u].rows->rows, group = own[n] / MOST_TILED;
                for (end = n; end < uses[u].rows->count && own[end] / MOST_TILED == group;) end++;
                groups.push_back({int64_t(u), group, n, end, size});
                size += tiles(u) * 2 * PAIRS;
                begins[group + 1]++;
            }
        pairs.resize(size / WIDTH);
        for (size_t g = 1; g < begins.size(); g++) begins[g] += begins[g - 1];
        for (const auto &own : groups) in_order.push_back(&own);
        std::stable_sort(in_order.begin(), in_order.end(), [](auto a, auto b) { return a->group < b->group; });
    }

    // z of all rows; threads share these.
    void shrink() {
        const int64_t size = (input.in + DEPTH - 1) / DEPTH * PAIRS;  // Of tiles with as many ranks as there may be.
        Scratch scratch;
        int64_t last = -1;
        int shaped = 0;
#pragma omp for schedule(static)
        for (size_t g = 0; g < groups.size(); g++) {
            const Group &own = groups[g];
            const int64_t ranks = tiles(own.use);
            float *a = scratch.of(ranks * size);
            if (own.use != last) put_all_in_tiles(last = own.use, a);
            const int count = count_of(own.group);
            if (count != shaped) shape_tiles(shaped = count);
            for (int64_t tile = 0; tile < ranks; tile++) put_pairs(own, tile, count, a + tile * size);
        }
        if (shaped) _tile_release();
    }

    // To y [rows, out], some of its outputs.
    void add_to(float *y, Share own) const {
        Adding adding(*this);
        int shaped = 0;
        constexpr int64_t TOGETHER = 4;  // Groups, of which the sums stay in the cache.
        for (size_t group = 0; group + 1 < begins.size(); group += TOGETHER)
            for (int64_t first = own.begin; first < own.end; first += PANEL)
                for (size_t g = group; g < std::min(group + TOGETHER, begins.size() - 1); g++) {
                    if (begins[g] == begins[g + 1]) continue;
                    const int count = count_of(g);
                    if (count != shaped) shape_tiles(shaped = count);
                    add_to(adding, g * MOST_TILED, count, first, y + g * MOST_TILED * out + first);
                }
        if (shaped) _tile_release();
    }

    std::unique_ptr<TiledAddend> adding() const { return std::make_unique<Adding>(*this); }

  private:
    // Rows of one use, from `begin` to `end` of its own, and where their pairs begin: [tiles of ranks, rows, SIDE].
    struct Group {
        int64_t use, group, begin, end, pairs;
    };

    class Adding : public TiledAddend {
      public:
        explicit Adding(const TiledLowRank &whole) : whole(whole), starts(1, 0), firsts(whole.uses.size(), -1) {
            for (size_t u = 0; u < whole.uses.size(); u++) starts.push_back(starts.back() + whole.tiles(u) * 2 * SIDE);
            numbers.resize(starts.back());
        }

        void add(int64_t row, int count, int64_t first) override {
            const int64_t group = row / MOST_TILED;
            for (int64_t g = whole.begins[group]; g < whole.begins[group + 1]; g++) {
                const Group &own = *whole.in_order[g];
                WideBits *b = numbers.data() + starts[own.use];
                if (firsts[own.use] != first) {
                    put_twice(*whole.uses[own.use].part, whole.out, firsts[own.use] = first, b);
                    settle(b);
                }
                const WideBits *z = whole.pairs.data() + own.pairs / WIDTH;
                for (int64_t tile = 0; tile < whole.tiles(own.use); tile++, z += 2 * SIDE, b += 2 * SIDE)
                    add_products(reinterpret_cast<const BFloat16 *>(z), DEPTH, count, b, NEAR);
            }
        }

      private:
        const TiledLowRank &whole;
        std::vector<int64_t> starts, firsts;  // Of each use: where its numbers lie, and of which outputs they are.
        std::vector<WideBits> numbers;
    };

    const std::vector<LowRankUse> &uses;
    const Input &input;
    int64_t rows, out;
    std::vector<Group> groups;
    std::vector<const Group *> in_order;  // Of all rows.
    std::vector<int64_t> begins;  // Of each 32 rows in that order.
    std::vector<WideBits> pairs;

    int64_t tiles(int64_t use) const { return (uses[use].part->rank + SIDE - 1) / SIDE; }
    int count_of(int64_t group) const { return std::min<int64_t>(rows - group * MOST_TILED, MOST_TILED); }

    void put_all_in_tiles(int64_t use, float *to) const {
        const LowRank &own = *uses[use].part, &next = *uses[std::min<size_t>(use + 1, uses.size() - 1)].part;
        for (int64_t rank = 0; rank < own.rank; rank += SIDE, to += (input.in + DEPTH - 1) / DEPTH * PAIRS)
            put_in_tiles(own, rank, input.in, next, to);
        settle(to);
    }

    // Of SIDE ranks.
    void put_pairs(const Group &own, int64_t tile, int count, const float *a) {
        const auto &[part, use_rows] = uses[own.use];
        const BFloat16 *x = static_cast<const BFloat16 *>(input.x.first) + own.group * MOST_TILED * input.in;
        Wide sums[MOST_TILED];
        clear_sums();
        add_products<true>(x, input.in, count, a, NEAR);
        store_sums<true>(reinterpret_cast<float *>(sums), sizeof *sums, count);
        settle(sums);
        WideBits *to = pairs.data() + own.pairs / WIDTH + tile * MOST_TILED;
        for (int64_t n = own.begin; n < own.end; n++) {
            const int64_t row = use_rows->rows[n] - own.group * MOST_TILED;
            to[row] = paired(sums[row] * use_rows->weights[n]);
        }
        settle(to);
    }

    void add_to(Adding &adding, int64_t row, int count, int64_t first, float *y) const {
        if (first + PANEL <= out) {
            load_sums(y, out * sizeof *y, count);
            adding.add(row, count, first);
            return store_sums(y, out * sizeof *y, count);
        }
        float sums[MOST_TILED][PANEL] = {};
        for (int n = 0; n < count; n++) std::copy(y + n * out, y + n * out + out - first, sums[n]);
        load_sums(sums[0], sizeof *sums, count);
        adding.add(row, count, first);
        store_sums(sums[0], sizeof *sums, count);
        settle(sums);
        for (int n = 0; n < count; n++) std::copy(sums[n], sums[n] + out - first, y + n * out);
    }
};
#else
// Of no rows.
struct NoLowRank {
    NoLowRank(const std::vector<LowRankUse> &, const Input &, int64_t, int64_t) {}
    void shrink() {}
    void add_to(float *, Share) const {}
    std::unique_ptr<TiledAddend> adding() const { return nullptr; }
};
using TiledLowRank = NoLowRank;
#endif
