// y[row][to] += weight S x[row][from], for adapters with S and rows of their own, from some places of the input or all
// to some of the output or all.
//
// Every S is read where it lies, once for some rows. A row's sums are the same ones in the same order whatever other
// rows and threads there are.
#include <algorithm>
#include <cmath>

#include "lanes.h"

struct Block {
    const float *values;  // [rows, columns]
    int64_t rows, columns;
    const int64_t *to;  // [rows]; null: row r is of output r.
    const int64_t *from;  // [columns]; null: all inputs, in order.
};

constexpr int64_t TILE = 1 << 15;  // Numbers of x that stay in the cache meanwhile.

// The last ones, and zeros.
static inline Lanes load_some(const float *from, int64_t count) {
    Lanes lanes = {};
    std::memcpy(&lanes, from, count * sizeof(float));
    return lanes;
}

// A row of the batch as S meets it.
struct Row {
    const float *x;
    float *y;
    float weight;
};

// For N rows and as many of S, from `first` on, as fill a vector with sums; where S has no more, nothing is added.
// What comes `ahead` numbers later is brought near meanwhile, unless that is 0.
template <int N>
static inline void add_sums(const Block &block, int64_t first, const Row rows[N], int64_t ahead) {
    constexpr int R = LANES / N;
    const int64_t columns = block.columns, count = std::min<int64_t>(R, block.rows - first);
    const float *s[R];
    for (int r = 0; r < R; r++) s[r] = block.values + (first + std::min<int64_t>(r, count - 1)) * columns;
    Lanes sums[LANES] = {};
    const auto add = [&](auto lanes_from) {
        Lanes own[R];
        for (int r = 0; r < R; r++) own[r] = lanes_from(s[r]);
        for (int n = 0; n < N; n++) {
            Lanes v = lanes_from(rows[n].x);
            keep(v);
            for (int r = 0; r < R; r++) add_product(sums[n * R + r], own[r], v);
        }
    };
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES) {
        if (ahead && c % (LINE / int64_t(sizeof(float))) == 0)
            for (int r = 0; r < R; r++) __builtin_prefetch(s[r] + c + ahead, 0, 2);
        add([c](const float *from) { return load(from + c); });
    }
    if (c < columns) add([&](const float *from) { return load_some(from + c, columns - c); });
    const Lanes totals = sums_of(sums);
    for (int n = 0; n < N; n++)
        for (int64_t r = 0; r < count; r++) {
            float &to = rows[n].y[block.to == nullptr ? first + r : block.to[first + r]];
            to = std::fma(rows[n].weight, totals[n * R + r], to);
        }
}

// Of LANES rows of S, which the first rows of the batch read before the others.
static void add_rows(const Block &block, int64_t first, const std::vector<Row> &rows) {
    const int64_t count = rows.size(), end = std::min(first + LANES, block.rows);
    const auto ahead = [&](int64_t row) { return row ? 0 : LANES * block.columns; };
    int64_t row = 0;
    for (; row + 2 <= count; row += 2)
        for (int64_t own = first; own < end; own += LANES / 2) add_sums<2>(block, own, &rows[row], ahead(row));
    if (row < count) add_sums<1>(block, first, &rows[row], ahead(row));
}

// x [rows, in] and y [rows, out] are contiguous.
extern "C" void timbre_block(
    const Uses<Block> *all, const float *x, int64_t rows, int64_t in, float *y, int64_t out, int threads
) {
    const auto uses = all->with_rows();
    threads = all->threads(rows, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch picked_inputs;
        std::vector<Row> tile;
        for (const auto &use : uses) {
            const Block &block = *use.part;
            const int64_t most = std::max<int64_t>(TILE / block.columns, 2);
            for (int64_t first = 0; first < use.rows->count; first += most) {
                const int64_t count = std::min(most, use.rows->count - first);
                float *picked = block.from == nullptr ? nullptr : picked_inputs.of(count * block.columns);
                tile.clear();
                for (int64_t n = first; n < first + count; n++) {
                    const int64_t row = use.rows->rows[n];
                    const float *own = x + row * in;
                    tile.push_back({picked == nullptr ? own : picked, y + row * out, use.rows->weights[n]});
                    if (picked == nullptr) continue;
                    for (int64_t c = 0; c < block.columns; c++) *picked++ = own[block.from[c]];
                }
                // Another use may add to the same outputs: it begins when this one has ended.
#pragma omp for schedule(static)
                for (int64_t r = 0; r < block.rows; r += LANES) add_rows(block, r, tile);
            }
        }
    }
}
PLAYED(timbre_block)
