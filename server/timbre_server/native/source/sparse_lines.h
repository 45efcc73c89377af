// Products of sparse matrices in slices with rows of bfloat16 that lie side by side, an input of all of them in one
// line of the cache: those of the first rows in the lower halves of its numbers, of the others in the upper ones.
#pragma once

#include "sparse.h"
#include "wide.h"

#ifdef __AVX512F__
constexpr int LINE_ROWS = 2 * WIDTH;

// Whether so many rows are multiplied so.
static inline bool are_in_lines(const BFloat16 *, int64_t count) { return count == LINE_ROWS; }

// lines [in]
static void put_in_lines(const BFloat16 *x, int64_t in, const int64_t *rows, WideBits *lines) {
    int64_t i = 0;
    for (; i + 2 * WIDTH <= in; i += 2 * WIDTH) {
        Wide pairs[2][WIDTH];  // Of inputs, by rows.
        for (int half : {0, 1}) {
            for (int n = 0; n < WIDTH; n++) pairs[half][n] = wide(x + rows[half * WIDTH + n] * in + i);
            transpose(pairs[half]);
        }
        for (int p = 0; p < WIDTH; p++) {
            const WideBits lower = (WideBits)pairs[0][p], upper = (WideBits)pairs[1][p];
            lines[i + 2 * p] = (lower & 0xffff) | upper << 16;
            lines[i + 2 * p + 1] = lower >> 16 | (upper & 0xffff0000);
        }
    }
    for (; i < in; i++)
        for (int n = 0; n < WIDTH; n++)
            lines[i][n] = x[rows[n] * in + i].bits | uint32_t(x[rows[n + WIDTH] * in + i].bits) << 16;
}

// Each of OUTPUTS values in all places of a register.
constexpr int OUTPUTS = 4;  // At once: no addition waits for the last.

template <typename Number> static inline void spread_each(const Number *values, Wide to[OUTPUTS]) {
    for (int o = 0; o < OUTPUTS; o++) to[o] = spread<Wide>(value(values[o]));
}

static inline void spread_each(const BFloat16 *values, Wide to[OUTPUTS]) {
    for (int o = 0; o < OUTPUTS; o += 2) {
        uint32_t pair;
        std::memcpy(&pair, values + o, sizeof pair);
        to[o] = first_of(all_pairs(pair));
        to[o + 1] = second_of(all_pairs(pair));
    }
}

template <typename Number>
static void multiply_lines(
    const Slices &matrix, Share slices, const uint16_t *columns, const Number *values, const WideBits *lines,
    float *sums
) {
    for (int64_t s = slices.begin; s < slices.end; s++) {
        const int64_t count = matrix.lengths[s] * LANES;
        for (int j = 0; j < LANES; j += OUTPUTS) {
            Wide totals[OUTPUTS][2] = {};
            for (int64_t k = j; k < count; k += LANES) {
                Wide entries[OUTPUTS];
                spread_each(values + k, entries);
                for (int o = 0; o < OUTPUTS; o++) {
                    const Wide line = (Wide)lines[columns[k + o]];
                    add_product(totals[o][0], first_of(line), entries[o]);
                    add_product(totals[o][1], second_of(line), entries[o]);
                }
            }
            for (int o = 0; o < OUTPUTS; o++, sums += LINE_ROWS) {
                put(totals[o][0], sums);
                put(totals[o][1], sums + WIDTH);
            }
        }
        values += count, columns += count;
    }
}

// sums [outputs in the order of slices, LINE_ROWS], for the slices of a share, which begin with this step; `memory` has
// room for the rows as floats.
static void multiply_lines(
    const Slices &matrix, Share slices, int64_t step, const BFloat16 *x, int64_t in, const int64_t *rows, float *memory,
    float *sums
) {
    WideBits *lines = reinterpret_cast<WideBits *>(memory);
    put_in_lines(x, in, rows, lines);
    as_they_lie(matrix.values, [&](auto values) {
        const uint16_t *columns = matrix.columns + step * LANES;
        sums += slices.begin * LANES * LINE_ROWS;
        multiply_lines(matrix, slices, columns, values + step * LANES, lines, sums);
    });
}

// To outputs of y, by rows.
static void add_lines(const Slices &matrix, const Rows &rows, const float *sums, float *y, int64_t out, Share own) {
    for (int first = 0; first < LINE_ROWS; first += WIDTH) {
        const Wide scale = wide(rows.weights + first);
        const auto of = [&](int64_t o) { return wide(sums + matrix.ranks[o] * LINE_ROWS + first) * scale; };
        int64_t o = own.begin;
        for (; o + WIDTH <= own.end; o += WIDTH) {
            Wide block[WIDTH];
            for (int j = 0; j < WIDTH; j++) block[j] = of(o + j);
            transpose(block);
            for (int n = 0; n < WIDTH; n++) {
                float *to = y + rows.rows[first + n] * out + o;
                put(wide(to) + block[n], to);
            }
        }
        for (; o < own.end; o++) {
            const Wide each = of(o);
            for (int n = 0; n < WIDTH; n++) y[rows.rows[first + n] * out + o] += each[n];
        }
    }
}
#else
static inline bool are_in_lines(const BFloat16 *, int64_t) { return false; }
static inline void multiply_lines(
    const Slices &, Share, int64_t, const BFloat16 *, int64_t, const int64_t *, float *, float *
) {}
static inline void add_lines(const Slices &, const Rows &, const float *, float *, int64_t, Share) {}
#endif

static inline bool are_in_lines(const float *, int64_t) { return false; }
static inline void multiply_lines(
    const Slices &, Share, int64_t, const float *, int64_t, const int64_t *, float *, float *
) {}
