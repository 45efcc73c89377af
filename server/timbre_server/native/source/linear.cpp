// y = x W^T + b, for rows x and a W that lies in panels: the weights of PANEL outputs side by side, input by
// input.
//
// A panel is read from memory for the first TILE rows and from the cache for the others. Meanwhile the next
// panel is asked of memory, a few lines for every few inputs over all of the rows, so that reading and
// arithmetic go on at once. A row's sums are the same ones in the same order whatever other rows there are.
#include "lanes.h"

constexpr int VECTORS = 2;
constexpr int PANEL = VECTORS * LANES;
constexpr int TILE = 6;  // Rows, of which all sums stay in registers.
constexpr int64_t BLOCK = 8 * TILE;  // Rows that stay in the cache while all panels pass.
constexpr int INPUTS = 4;  // Inputs between two looks at what to ask for.

struct Linear {
    const float *x;  // [rows, in]
    int64_t in;
    const float *panels;  // [out / PANEL rounded up, in, PANEL]; zeros beyond the last output
    const float *bias;  // [out], or null
    float *y;  // [rows, out]
    int64_t out;
};

// One row's sums; `count` outputs are left from the panel's first on.
static inline void put(Lanes sum, const float *bias, int64_t count, float *y) {
    if (count >= LANES) store(y, bias ? sum + load(bias) : sum);
    else for (int64_t o = 0; o < count; o++) y[o] = sum[o] + (bias ? bias[o] : 0);
}

// What one input of M rows adds to their sums.
template <int M>
static inline void add(Lanes sums[M][VECTORS], const float *weights, const float *x, int64_t in) {
    Lanes of_outputs[VECTORS];
    for (int v = 0; v < VECTORS; v++) of_outputs[v] = load(weights + v * LANES);
    for (int m = 0; m < M; m++)
        for (int v = 0; v < VECTORS; v++) sums[m][v] += all(x[m * in]) * of_outputs[v];
}

// M rows from `row` on with the panel at `first`; for every INPUTS, so many LINES are asked for, from `soon` on.
template <int M, int LINES>
static void tile(const Linear &linear, int64_t row, int64_t first, const float *soon) {
    const int64_t in = linear.in, out = linear.out;
    const float *panel = linear.panels + first * in, *x = linear.x + row * in;
    Lanes sums[M][VECTORS] = {};
    int64_t i = 0;
    for (; i + INPUTS <= in; i += INPUTS, soon += LINES * PANEL) {
        for (int line = 0; line < LINES; line++) __builtin_prefetch(soon + line * PANEL, 0, 2);
        for (int j = 0; j < INPUTS; j++) add<M>(sums, panel + (i + j) * PANEL, x + i + j, in);
    }
    for (; i < in; i++) add<M>(sums, panel + i * PANEL, x + i, in);
    for (int v = 0; v < VECTORS; v++) {
        const int64_t o = first + v * LANES;
        for (int m = 0; m < M; m++)
            put(sums[m][v], linear.bias ? linear.bias + o : nullptr, out - o, linear.y + (row + m) * out + o);
    }
}

template <int LINES> static void tile_of(int rows, const Linear &linear, int64_t row, int64_t first, const float *soon) {
    switch (rows) {
    case 6: return tile<6, LINES>(linear, row, first, soon);
    case 5: return tile<5, LINES>(linear, row, first, soon);
    case 4: return tile<4, LINES>(linear, row, first, soon);
    case 3: return tile<3, LINES>(linear, row, first, soon);
    case 2: return tile<2, LINES>(linear, row, first, soon);
    default: return tile<1, LINES>(linear, row, first, soon);
    }
}

// The panel at `first` with the rows of one block, in tiles of nearly one size that together ask for a panel.
static void pass(const Linear &linear, int64_t row, int64_t end, int64_t first) {
    const float *soon = linear.panels + (first + PANEL) * linear.in;
    int64_t tiles = (end - row + TILE - 1) / TILE;
    const int lines = tiles == 1 ? 4 : tiles < 4 ? 2 : 1;
    for (; tiles; tiles--) {
        const int rows = (end - row + tiles - 1) / tiles;
        if (lines == 4) tile_of<4>(rows, linear, row, first, soon);
        else if (lines == 2) tile_of<2>(rows, linear, row, first, soon);
        else tile_of<1>(rows, linear, row, first, soon);
        row += rows;
        soon += linear.in / INPUTS * lines * PANEL;
    }
}

extern "C" void timbre_linear(
    const float *x, int64_t rows, int64_t in, const float *panels, const float *bias, float *y, int64_t out,
    int threads
) {
    const Linear linear = {x, in, panels, bias, y, out};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Share own = share(out, thread_number(), thread_count(), PANEL);
        for (int64_t row = 0; row < rows; row += BLOCK) {
            const int64_t end = row + BLOCK < rows ? row + BLOCK : rows;
            for (int64_t first = own.begin; first < own.end; first += PANEL) pass(linear, row, end, first);
        }
    }
}
