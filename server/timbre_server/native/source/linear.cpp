// y = x W^T + b, for rows x and a W that lies in panels: the weights of PANEL outputs side by side, input by
// input, or pair of inputs by pair; for a matrix unit those of half as many outputs and of TOGETHER pairs.
//
// A panel is read from memory for the first TILE rows and from the cache for the others. Meanwhile the next
// panel, or what comes soon where there are no other rows, is asked of memory, a few lines for every few inputs over
// all of the rows, so that reading and arithmetic go on at once; with very few rows the processor does so by itself.
// A row's sums are the same ones in the same order whatever other rows there are; of float32 rows they are the same
// in either format of the weights, too.
#include "linear.h"

#include <algorithm>

#include "tiled_rows.h"

#ifdef __AVX512F__
constexpr int TILE = 13;  // Rows, of which all sums stay in registers beside the weights.
#else
constexpr int TILE = 5;
#endif

constexpr int VECTORS = PANEL_VECTORS;
#ifdef HAS_MATRIX_UNIT
constexpr int TOGETHER = DEPTH / 2;  // Pairs of inputs, of which the weights of WIDTH outputs lie together.
constexpr int64_t TILED_BYTES = 576 << 10;  // Of rows that stay in the cache while all panels pass the matrix unit.
#else
constexpr int TOGETHER = 1;
#endif
constexpr int64_t BLOCK = 40 / TILE * TILE;  // Rows that stay in the cache while all panels pass.
constexpr int64_t MANY = 20;  // More rows of float32 than these read weights as floats.
constexpr int INPUTS = 4;  // Inputs between two looks at what to ask for.
constexpr int AHEAD = 6144;  // Bytes, of what is asked for where a panel is read once.
constexpr int FEW_PAIRED = 3, FEW = 1;  // Rows of bfloat16, and of floats, up to which nothing is asked for.

// Numbers of a panel.
static inline int64_t size_of(const float *, int64_t in) { return (in + 1) / 2 * 2 * PANEL; }
static inline int64_t size_of(const BFloat16 *, int64_t in) {
    constexpr int64_t WHOLE = 2 * TOGETHER;
    return (in + WHOLE - 1) / WHOLE * WHOLE * PANEL;
}

// Where the weights of a pair of inputs lie.
static inline const float *pair_of(const float *panel, int64_t pair) { return panel + pair * 2 * PANEL; }
static inline const BFloat16 *pair_of(const BFloat16 *panel, int64_t pair) {
    return panel + pair / TOGETHER * TOGETHER * 2 * PANEL + pair % TOGETHER * 2 * WIDTH;
}

// A panel's weights of the first or second one of two inputs: [2, PANEL].
static inline Wide weights_of(const float *pair, int second, int v) { return wide(pair + second * PANEL + v * WIDTH); }

// Both inputs', of each vector of outputs.
static inline Wide weights_of(const BFloat16 *pair, int v) { return wide(pair + v * TOGETHER * 2 * WIDTH); }

static inline Wide weights_of(const BFloat16 *pair, int second, int v) {
    const Wide both = weights_of(pair, v);
    return second ? second_of(both) : first_of(both);
}

// What one of two inputs of M rows adds to their sums. These fill the registers: that both inputs' weights are in
// one place is hidden from the compiler, which would hold on to them.
template <int M, typename Number>
static inline void add_one(Wide sums[M][VECTORS], const Number *pair, int second, const float *x, int64_t in) {
    asm("" : "+r"(pair));
    Wide weights[VECTORS];
    for (int v = 0; v < VECTORS; v++) weights[v] = weights_of(pair, second, v);
    for (int m = 0; m < M; m++)
        for (int v = 0; v < VECTORS; v++) sums[m][v] += x[m * in + second] * weights[v];
}

template <int M, typename Number>
static inline void add_pair(Wide sums[M][VECTORS], const Number *pair, const float *x, int64_t in) {
    add_one<M>(sums, pair, 0, x, in);
    add_one<M>(sums, pair, 1, x, in);
}

template <int M, typename Number>
static inline void add_last(Wide sums[M][VECTORS], const Number *pair, const float *x, int64_t in) {
    add_one<M>(sums, pair, 0, x, in);
}

// Both inputs of M rows at once.
template <int M>
static inline void add_bits(Wide sums[M][VECTORS], const BFloat16 *pair, const uint32_t inputs[M]) {
    for (int m = 0; m < M; m++)
        for (int v = 0; v < VECTORS; v++)
            sums[m][v] = plus_products(sums[m][v], all_pairs(inputs[m]), weights_of(pair, v));
}

template <int M>
static inline void add_pair(Wide sums[M][VECTORS], const BFloat16 *pair, const BFloat16 *x, int64_t in) {
    uint32_t inputs[M];
    for (int m = 0; m < M; m++) std::memcpy(&inputs[m], x + m * in, sizeof inputs[m]);
    add_bits<M>(sums, pair, inputs);
}

template <int M>
static inline void add_last(Wide sums[M][VECTORS], const BFloat16 *pair, const BFloat16 *x, int64_t in) {
    uint32_t inputs[M];
    for (int m = 0; m < M; m++) inputs[m] = x[m * in].bits;
    add_bits<M>(sums, pair, inputs);
}

// One row's sums; `count` outputs are left.
template <typename Y> static inline void put(Wide sum, int64_t count, Y *y) {
    if (count >= WIDTH) put(sum, y);
    else for (int64_t i = 0; i < count; i++) put(sum[i], y + i);
}

// Of rows with the panel at `first`.
static inline void add_bias(const Linear &linear, Wide (*sums)[VECTORS], int64_t rows, int64_t first) {
    for (int v = 0; v < VECTORS && linear.bias; v++) {
        const int64_t o = first + v * WIDTH;
        Wide own = {};
        if (linear.out - o >= WIDTH) own = wide(linear.bias + o);
        else for (int64_t i = 0; o + i < linear.out; i++) own[i] = linear.bias[o + i];
        for (int64_t m = 0; m < rows; m++) sums[m][v] += own;
    }
}

template <typename Y>
static inline void put_rows(const Wide (*sums)[VECTORS], int64_t rows, int64_t left, int64_t out, Y *y) {
    for (int64_t m = 0; m < rows; m++, y += out)
        for (int v = 0; v < VECTORS; v++) {
            if (left >= PANEL) put(sums[m][v], y + v * WIDTH);
            else put(sums[m][v], left - v * WIDTH, y + v * WIDTH);
        }
}

static inline void put_rows(
    const Linear &linear, const Wide (*sums)[VECTORS], int64_t row, int64_t rows, int64_t first
) {
    const int64_t out = linear.out, place = row * out + first;
    if (linear.y_format == BFLOAT16) put_rows(sums, rows, out - first, out, static_cast<BFloat16 *>(linear.y) + place);
    else put_rows(sums, rows, out - first, out, static_cast<float *>(linear.y) + place);
}

// What the sums of rows from `row` on with the panel at `first` become.
static inline void finish(const Linear &linear, Wide (*sums)[VECTORS], int64_t row, int64_t rows, int64_t first) {
    if (linear.addend) linear.addend->add(row, rows, first, reinterpret_cast<float *>(sums));
    put_rows(linear, sums, row, rows, first);
}

// M rows from `row` on with the panel at `first`; for every INPUTS, so many lines are asked for, from `soon` on.
template <int M, typename X, typename Number>
static void tile(
    const Linear &linear, const X *x, int64_t row, const Number *panel, int64_t first, const char *soon, int lines
) {
    const int64_t in = linear.in;
    x += row * in;
    Wide sums[M][VECTORS] = {};
    int64_t i = 0;
    const auto add = [&] {
        add_pair<M>(sums, pair_of(panel, i / 2), x, in);
        i += 2, x += 2;
    };
    while (i + INPUTS <= in) {
        for (int line = 0; line < lines; line++) __builtin_prefetch(soon + line * LINE, 0, 2);
        soon += lines * LINE;
        for (int j = 0; j < INPUTS; j += 2) add();
    }
    while (i + 2 <= in) add();
    if (i < in) add_last<M>(sums, pair_of(panel, i / 2), x, in);
    if (linear.addend) {  // A copy: else sums would lie in memory from the first on.
        Wide kept[M][VECTORS];
        for (int m = 0; m < M; m++)
            for (int v = 0; v < VECTORS; v++) kept[m][v] = sums[m][v];
        add_bias(linear, kept, M, first);
        return finish(linear, kept, row, M, first);
    }
    add_bias(linear, sums, M, first);
    put_rows(linear, sums, row, M, first);
}

// `rows` of them, which are M at most.
template <int M, typename X, typename Number>
static void tile_of(
    int rows, const Linear &linear, const X *x, int64_t row, const Number *panel, int64_t first, const char *soon,
    int lines
) {
    if constexpr (M > 1)
        if (rows < M) return tile_of<M - 1>(rows, linear, x, row, panel, first, soon, lines);
    tile<M>(linear, x, row, panel, first, soon, lines);
}

// The panel at `first` with the rows of one block, in tiles of nearly one size. They ask for what lies at `soon`, so
// many lines for every INPUTS over all of them.
template <typename X, typename Number>
static void pass(
    const Linear &linear, const X *x, int64_t row, int64_t end, const Number *panel, int64_t first, const char *soon,
    int lines
) {
    int64_t tiles = (end - row + TILE - 1) / TILE;
    lines = (lines + tiles - 1) / tiles;
    for (; tiles; tiles--) {
        const int rows = (end - row + tiles - 1) / tiles;
        tile_of<TILE>(rows, linear, x, row, panel, first, soon, lines);
        row += rows;
        soon += linear.in / INPUTS * lines * LINE;
    }
}

// A panel as floats.
static const float *widened(const BFloat16 *panel, int64_t in, Scratch &scratch) {
    float *to = scratch.of((in + 1) / 2 * 2 * PANEL);
    for (int64_t i = 0; i < in; i += 2)
        for (int second : {0, 1})
            for (int v = 0; v < VECTORS; v++) {
                const Wide own = weights_of(pair_of(panel, i / 2), second, v);
                std::memcpy(to + (i + second) * PANEL + v * WIDTH, &own, sizeof own);
            }
    return to;
}

template <typename X, typename Number>
static void multiply(const Linear &linear, const X *x, int64_t rows, const Number *panels, Share own) {
    const int64_t size = size_of(panels, linear.in);
    constexpr int LINES = INPUTS * PANEL * sizeof(Number) / LINE;
    constexpr bool MAY_WIDEN = sizeof(Number) < sizeof(X);
    const int lines = rows <= (sizeof(X) < sizeof(float) ? FEW_PAIRED : FEW) ? 0 : LINES;
    Scratch scratch;
    for (int64_t row = 0; row < rows; row += BLOCK) {
        const int64_t end = row + BLOCK < rows ? row + BLOCK : rows;
        for (int64_t first = own.begin; first < own.end; first += PANEL) {
            const Number *panel = panels + first / PANEL * size;
            const char *now = reinterpret_cast<const char *>(panel), *after = reinterpret_cast<const char *>(panel + size);
            const char *soon = end - row > TILE ? after : now + AHEAD;
            if constexpr (MAY_WIDEN)
                if (end - row > MANY) {
                    pass(linear, x, row, end, widened(panel, linear.in, scratch), first, soon, lines);
                    continue;
                }
            pass(linear, x, row, end, panel, first, soon, lines);
        }
    }
}

#ifdef HAS_MATRIX_UNIT
// By the matrix unit, if this process may use it.
static void multiply(const Linear &linear, const BFloat16 *x, int64_t rows, const BFloat16 *panels, Share own) {
    if (!may_use_matrix_unit()) return multiply<BFloat16, BFloat16>(linear, x, rows, panels, own);
    const int64_t in = linear.in, size = size_of(panels, in);
    const auto added = linear.addend ? linear.addend->tiled() : nullptr;
    Wide sums[MOST_TILED][VECTORS];
    int shaped = 0;
    const int64_t tiles = TILED_BYTES / (MOST_TILED * in * sizeof *x), block = std::max<int64_t>(tiles, 1) * MOST_TILED;
    for (int64_t row = 0; row < rows; row += block) {
        const int64_t end = std::min(row + block, rows), passes = (end - row + MOST_TILED - 1) / MOST_TILED;
        const int few = passes > 1 ? (2 * TILE_LINES + passes - 1) / passes : 0;
        for (int64_t first = own.begin; first < own.end; first += PANEL) {
            const BFloat16 *panel = panels + first / PANEL * size, *soon = panel + (few ? size : SOON);
            Asked asked = {reinterpret_cast<const char *>(soon), few};
            Wide start[1][VECTORS] = {};
            add_bias(linear, start, 1, first);
            for (int64_t at = row; at < end; at += MOST_TILED, asked.lines += in / DEPTH * few * LINE) {
                const int count = std::min<int64_t>(MOST_TILED, end - at);
                if (count != shaped) shape_tiles(shaped = count);
                if (linear.bias) load_sums(reinterpret_cast<float *>(start), 0, count);
                else clear_sums();
                add_products(x + at * in, in, count, panel, asked);
                if (added) added->add(at, count, first);
                store_sums(reinterpret_cast<float *>(sums), sizeof *sums, count);
                finish(linear, sums, at, count, first);
            }
        }
    }
    _tile_release();
}
#endif

template <typename X, typename Number> static void multiply(const Linear &linear, Share own) {
    const auto x = static_cast<const X *>(linear.x.first);
    multiply(linear, x, linear.rows, static_cast<const Number *>(linear.panels.first), own);
}

void multiply_linear(const Linear &linear, int thread, int threads) {
    const Share own = share(linear.out, thread, threads, PANEL);
    if (linear.x.format == BFLOAT16) multiply<BFloat16, BFloat16>(linear, own);
    else if (linear.panels.format == BFLOAT16) multiply<float, BFloat16>(linear, own);
    else multiply<float, float>(linear, own);
}

extern "C" int64_t timbre_linear_panel() { return PANEL; }
extern "C" int64_t timbre_linear_vector() { return WIDTH; }
extern "C" int64_t timbre_linear_together() { return TOGETHER; }

extern "C" void timbre_linear(
    const void *x, int64_t x_format, int64_t rows, int64_t in, const void *panels, int64_t format,
    const float *bias, void *y, int64_t y_format, int64_t out, int threads
) {
    const Linear linear = {{x, x_format}, rows, in, {panels, format}, bias, y, y_format, out, nullptr};
    threads = threads_for(rows * in * out, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    multiply_linear(linear, thread_number(), thread_count());
}
PLAYED(timbre_linear)
