// y = x W^T + b, for rows x and a W that lies in panels: the weights of PANEL outputs side by side, input by
// input.
//
// A panel is read from memory for the first TILE rows and from the cache for the others. Meanwhile the next
// panel is asked of memory, a few lines for every few inputs over all of the rows, so that reading and
// arithmetic go on at once. A row's sums are the same ones in the same order whatever other rows there are, and
// in either format of the weights.
#include "lanes.h"

constexpr int VECTORS = 2;
constexpr int PANEL = VECTORS * LANES;
constexpr int TILE = 5;  // Rows, of which all sums stay in registers.
constexpr int64_t BLOCK = 8 * TILE;  // Rows that stay in the cache while all panels pass.
constexpr int64_t MANY = 4 * TILE;  // More rows than these read weights as floats.
constexpr int INPUTS = 4;  // Inputs between two looks at what to ask for.

struct Linear {
    const float *x;  // [rows, in]
    int64_t in;
    const float *bias;  // [out], or null
    float *y;  // [rows, out]
    int64_t out;
};

// A panel's weights of the first or second one of two inputs: [2, PANEL].
static inline Lanes weights_of(const float *pair, int second, int v) { return load(pair + second * PANEL + v * LANES); }

// [PANEL, 2]
static inline Lanes weights_of(const BFloat16 *pair, int second, int v) {
    return second ? odds(pair + 2 * v * LANES) : evens(pair + 2 * v * LANES);
}

// One row's sums; `count` outputs are left from the panel's first on.
static inline void put(Lanes sum, const float *bias, int64_t count, float *y) {
    if (count >= LANES) store(y, bias ? sum + load(bias) : sum);
    else for (int64_t o = 0; o < count; o++) y[o] = sum[o] + (bias ? bias[o] : 0);
}

// What one of two inputs of M rows adds to their sums. These fill the registers: that both inputs' weights are in
// one place is hidden from the compiler, which would hold on to them.
template <int M, typename Number>
static inline void add(Lanes sums[M][VECTORS], const Number *pair, int second, const float *x, int64_t in) {
    asm("" : "+r"(pair));
    Lanes weights[VECTORS];
    for (int v = 0; v < VECTORS; v++) weights[v] = weights_of(pair, second, v);
    for (int m = 0; m < M; m++)
        for (int v = 0; v < VECTORS; v++) sums[m][v] += all(x[m * in + second]) * weights[v];
}

// M rows from `row` on with the panel at `first`; for every INPUTS, so many LINES are asked for, from `soon` on.
template <int M, int LINES, typename Number>
static void tile(const Linear &linear, int64_t row, const Number *panel, int64_t first, const char *soon) {
    const int64_t in = linear.in, out = linear.out;
    const float *x = linear.x + row * in;
    Lanes sums[M][VECTORS] = {};
    const auto add_both = [&] {
        add<M>(sums, panel, 0, x, in);
        add<M>(sums, panel, 1, x, in);
        panel += 2 * PANEL, x += 2;
    };
    int64_t i = 0;
    for (; i + INPUTS <= in; i += INPUTS, soon += LINES * LINE) {
        for (int line = 0; line < LINES; line++) __builtin_prefetch(soon + line * LINE, 0, 2);
        for (int j = 0; j < INPUTS; j += 2) add_both();
    }
    for (; i + 2 <= in; i += 2) add_both();
    if (i < in) add<M>(sums, panel, 0, x, in);
    for (int v = 0; v < VECTORS; v++) {
        const int64_t o = first + v * LANES;
        for (int m = 0; m < M; m++)
            put(sums[m][v], linear.bias ? linear.bias + o : nullptr, out - o, linear.y + (row + m) * out + o);
    }
}

template <int LINES, typename Number>
static void tile_of(
    int rows, const Linear &linear, int64_t row, const Number *panel, int64_t first, const char *soon
) {
    switch (rows) {
    case 5: return tile<5, LINES>(linear, row, panel, first, soon);
    case 4: return tile<4, LINES>(linear, row, panel, first, soon);
    case 3: return tile<3, LINES>(linear, row, panel, first, soon);
    case 2: return tile<2, LINES>(linear, row, panel, first, soon);
    default: return tile<1, LINES>(linear, row, panel, first, soon);
    }
}

// What a panel asks of memory: the next one, from `soon` on, and so many lines for every INPUTS over all rows.
struct Ahead {
    const char *soon;
    int lines;
};

// The panel at `first` with the rows of one block, in tiles of nearly one size.
template <typename Number>
static void pass(const Linear &linear, int64_t row, int64_t end, const Number *panel, int64_t first, Ahead next) {
    int64_t tiles = (end - row + TILE - 1) / TILE;
    const int lines = (next.lines + tiles - 1) / tiles;
    for (; tiles; tiles--) {
        const int rows = (end - row + tiles - 1) / tiles;
        if (lines == 4) tile_of<4>(rows, linear, row, panel, first, next.soon);
        else if (lines == 2) tile_of<2>(rows, linear, row, panel, first, next.soon);
        else tile_of<1>(rows, linear, row, panel, first, next.soon);
        row += rows;
        next.soon += linear.in / INPUTS * lines * LINE;
    }
}

// A panel as floats, where it may be read so.
static const float *widened(const float *panel, int64_t, Scratch &) { return panel; }

static const float *widened(const BFloat16 *panel, int64_t size, Scratch &scratch) {
    float *to = scratch.of(size);
    for (int64_t i = 0; i < size; i += 2 * PANEL)
        for (int second : {0, 1})
            for (int v = 0; v < VECTORS; v++)
                store(to + i + second * PANEL + v * LANES, weights_of(panel + i, second, v));
    return to;
}

template <typename Number>
static void multiply(const Linear &linear, int64_t rows, const Number *panels, Share own) {
    const int64_t size = (linear.in + 1) / 2 * 2 * PANEL;
    constexpr int LINES = INPUTS * PANEL * sizeof(Number) / LINE;
    Scratch scratch;
    for (int64_t row = 0; row < rows; row += BLOCK) {
        const int64_t end = row + BLOCK < rows ? row + BLOCK : rows;
        for (int64_t first = own.begin; first < own.end; first += PANEL) {
            const Number *panel = panels + first / PANEL * size;
            const Ahead next = {reinterpret_cast<const char *>(panel + size), LINES};
            if (end - row > MANY) pass(linear, row, end, widened(panel, size, scratch), first, next);
            else pass(linear, row, end, panel, first, next);
        }
    }
}

// The weights are float32 or bfloat16: [out / PANEL rounded up] panels as above of `in` rounded up to whole pairs,
// with zeros beyond the last output and input.
extern "C" void timbre_linear(
    const float *x, int64_t rows, int64_t in, const void *panels, int64_t format, const float *bias, float *y,
    int64_t out, int threads
) {
    const Linear linear = {x, in, bias, y, out};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Share own = share(out, thread_number(), thread_count(), PANEL);
        if (format == BFLOAT16) multiply(linear, rows, static_cast<const BFloat16 *>(panels), own);
        else multiply(linear, rows, static_cast<const float *>(panels), own);
    }
}
