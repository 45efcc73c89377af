// Products with matrices that many things have in common.
//
// Each matrix is read where it lies, once for many products with it: the sums of some of its rows with some of what
// they are multiplied by stay in registers. A sum has the same terms in the same order whatever other products there
// are. Of a matrix of bfloat16 in the panels of linear.cpp the products are those of rows of bfloat16 there.
#pragma once

#include <algorithm>
#include <tuple>

#include "linear.h"
#include "wide.h"

struct Matrix {
    const void *values;
    int64_t rows, columns, stride;  // 0: it lies in panels.

    auto fields() const { return std::tie(values, rows, columns, stride); }
    bool operator==(const Matrix &other) const { return fields() == other.fields(); }
    bool operator<(const Matrix &other) const { return fields() < other.fields(); }
};

// to += after ∘ M (weight before ∘ from); null: ones.
struct Product {
    const Matrix *matrix;
    float weight;
    const float *before, *from, *after;
    float *to;
};

constexpr int SIDE = LANES;  // Rows of a matrix that are summed together: their sums are one vector.
constexpr int AT_ONCE = WIDTH > LANES ? 3 : 1;  // Products, as many as there are registers for.
constexpr int64_t MANY = 48;  // Products that a part of a matrix stays in the cache for.
constexpr int64_t MANY_PAIRED = 64;  // Of pairs: whole tiles of the matrix unit.
constexpr int64_t COLUMNS = 640;  // Of which SIDE rows do so, beside what they are multiplied by.
constexpr int64_t AHEAD = 64;  // Numbers of an outer vector, after which they are asked for.
constexpr int64_t FLOATS = LINE / sizeof(float);

// SIDE rows of some columns of a matrix; the last row again where there are fewer.
struct Strip {
    const float *rows[SIDE];
    int64_t first;  // Of the rows.
    int64_t count;
    int64_t whole;  // Columns that fill registers.
    bool has_rest;
    float rest[SIDE][WIDTH];  // The other columns, and zeros.

    Strip(const Matrix &matrix, int64_t row, Share columns)
        : first(row), count(std::min<int64_t>(matrix.rows - row, SIDE)) {
        const int64_t size = columns.end - columns.begin;
        whole = size / WIDTH * WIDTH;
        has_rest = whole < size;
        const float *values = static_cast<const float *>(matrix.values) + columns.begin;
        for (int r = 0; r < SIDE; r++) rows[r] = values + std::min(row + r, matrix.rows - 1) * matrix.stride;
        if (!has_rest) return;
        std::memset(rest, 0, sizeof rest);
        for (int r = 0; r < SIDE; r++) std::copy(rows[r] + whole, rows[r] + size, rest[r]);
    }

    // Asks for what the next strip has in the place of some rows.
    void ask_for_next(int64_t begin, int64_t end, int64_t stride) const {
        for (int64_t r = begin; r < end; r++)
            for (int64_t i = 0; i < whole; i += FLOATS) __builtin_prefetch(rows[r] + SIDE * stride + i, 0, 2);
    }
};

// A row of the matrix is read into a register: the compiler would read it from memory for each product.
template <int N>
static inline void add_products(
    Wide sums[N][SIDE], const float *const rows[SIDE], int64_t i, const float *panel, int64_t stride
) {
    Wide from[N];
    for (int n = 0; n < N; n++) from[n] = wide(panel + n * stride);
    for (int r = 0; r < SIDE; r++) {
        Wide row = wide(rows[r] + i);
#ifdef __AVX__
        asm("" : "+v"(row));
#endif
        for (int n = 0; n < N; n++) add_product(sums[n][r], row, from[n]);
    }
}

// A strip with N products, which `panel` has: [N, stride].
template <int N> static void tile(const Strip &strip, const float *panel, int64_t stride, const Product *products) {
    for (int n = 0; n < N; n++)
        if (products[n].after) __builtin_prefetch(products[n].after + strip.first + AHEAD);
    Wide sums[N][SIDE] = {};
    int64_t i = 0;
    for (; i < strip.whole; i += WIDTH) add_products<N>(sums, strip.rows, i, panel + i, stride);
    if (strip.has_rest) {
        const float *rest[SIDE];
        for (int r = 0; r < SIDE; r++) rest[r] = strip.rest[r];
        add_products<N>(sums, rest, 0, panel + i, stride);
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
        Lanes each[SIDE];
        for (int r = 0; r < SIDE; r++) each[r] = folded(sums[n][r]);
        const Lanes totals = sums_of(each);
        const float *after = products[n].after ? products[n].after + strip.first : nullptr;
        float *to = products[n].to + strip.first;
        if (strip.count == SIDE) {
            store(to, load(to) + (after ? load(after) * totals : totals));
            continue;
        }
        float each_total[SIDE];
        store(each_total, totals);
        for (int r = 0; r < strip.count; r++) to[r] += after ? after[r] * each_total[r] : each_total[r];
    }
}

// `count` of them, which are N at most.
template <int N>
static void tile_of(int64_t count, const Strip &strip, const float *panel, int64_t stride, const Product *products) {
    if constexpr (N > 1)
        if (count < N) return tile_of<N - 1>(count, strip, panel, stride, products);
    tile<N>(strip, panel, stride, products);
}

// [stride]: what some columns of a matrix are multiplied by, and zeros.
static void take(const Product &own, Share columns, float *to, int64_t stride) {
    const int64_t size = columns.end - columns.begin;
    const float *from = own.from + columns.begin, *before = own.before ? own.before + columns.begin : nullptr;
    for (int64_t i = 0; i < size; i++) to[i] = before ? own.weight * before[i] * from[i] : own.weight * from[i];
    std::fill(to + size, to + stride, 0.0f);
}

// Some columns of rows of a matrix with MANY products at most.
static void multiply(const Product *products, int64_t count, Share rows, Share columns, Scratch &scratch) {
    const Matrix &matrix = *products->matrix;
    const int64_t stride = (columns.end - columns.begin + WIDTH - 1) / WIDTH * WIDTH;
    float *panel = scratch.of(count * stride);
    for (int64_t n = 0; n < count; n++) take(products[n], columns, panel + n * stride, stride);
    for (int64_t row = rows.begin; row < rows.end; row += SIDE) {
        const Strip strip(matrix, row, columns);
        int64_t n = 0;
        for (int64_t tiles = (count + AT_ONCE - 1) / AT_ONCE; tiles; tiles--) {  // Of nearly one size.
            const int64_t size = (count - n + tiles - 1) / tiles;
            strip.ask_for_next(SIDE * n / count, SIDE * (n + size) / count, matrix.stride);
            tile_of<AT_ONCE>(size, strip, panel + n * stride, stride, products + n);
            n += size;
        }
    }
}

// All of one matrix. Columns come first: what is added to one number is added in the same order, however many
// products there are.
static void multiply_floats(const Product *products, int64_t count, int threads) {
    const Matrix &matrix = *products->matrix;
    const int pieces = (matrix.columns + COLUMNS - 1) / COLUMNS;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Share rows = share(matrix.rows, thread_number(), thread_count(), SIDE);
        Scratch scratch;
        for (int piece = 0; piece < pieces; piece++)
            for (int64_t first = 0; first < count; first += MANY) {
                const Share columns = share(matrix.columns, piece, pieces, WIDTH);
                multiply(products + first, std::min(MANY, count - first), rows, columns, scratch);
            }
    }
}

// All of one matrix in panels. What is multiplied, and what is made of it, is at hand for some products at a time.
static void multiply_pairs(const Product *products, int64_t count, int threads) {
    const Matrix &matrix = *products->matrix;
    const int64_t in = matrix.columns, out = matrix.rows;
    thread_local Scratch numbers, sums;  // Kept: fresh memory costs more than what is written to it.
    for (int64_t end; count > 0; products += end, count -= end) {
        end = std::min(count, MANY_PAIRED);
        float *from = numbers.of(in + (end * in + 1) / 2), *y = sums.of(end * out);
        BFloat16 *x = reinterpret_cast<BFloat16 *>(from + in);
        for (int64_t n = 0; n < end; n++) {
            Product own = products[n];
            own.weight = 1;  // Not rounded: a row of bfloat16 stays as it is.
            take(own, {0, in}, from, in);
            for (int64_t i = 0; i < in; i++) put(from[i], x + n * in + i);
        }
        timbre_linear(x, BFLOAT16, end, in, matrix.values, BFLOAT16, nullptr, y, FLOAT32, out, threads);
        for (int64_t n = 0; n < end; n++, y += out) {
            const float weight = products[n].weight, *after = products[n].after;
            float *to = products[n].to;
            for (int64_t o = 0; o < out; o++) to[o] += weight * (after ? after[o] * y[o] : y[o]);
        }
    }
}

static void multiply(const Product *products, int64_t count, int threads) {
    (products->matrix->stride ? multiply_floats : multiply_pairs)(products, count, threads);
}

// Those with one matrix follow each other.
static void multiply_in_order(const std::vector<Product> &products, int threads) {
    for (size_t first = 0, end = 0; first < products.size(); first = end) {
        while (end < products.size() && *products[end].matrix == *products[first].matrix) end++;
        multiply(&products[first], end - first, threads);
    }
}

// Matrix after matrix, in an order that does not follow from which others are used.
static void multiply_all(std::vector<Product> &products, int threads) {
    const auto is_before = [](const Product &a, const Product &b) { return *a.matrix < *b.matrix; };
    std::stable_sort(products.begin(), products.end(), is_before);
    multiply_in_order(products, threads);
}
