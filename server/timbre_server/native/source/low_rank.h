// weight B (A x[row]), for adapters with A, B, ranks and rows of their own.
//
// Every adapter's factors are read once for each block of its rows, where they lie, and the next adapter's are
// asked of memory meanwhile, so that reading and arithmetic go on at once. A row's sums are the same ones in the
// same order whatever other rows and adapters there are; those of float32 rows are, too, in any format of the factors.
#pragma once

#include <algorithm>
#include <cmath>
#include <deque>
#include <type_traits>

#include "wide.h"

struct LowRank {
    Numbers a;  // [rank, in]
    Numbers b;  // [rank, out]
    int64_t rank;
};

typedef Use<LowRank> LowRankUse;

constexpr int ROWS = 4;  // Rows of one adapter that read its factors together.
constexpr int64_t PIECE = 8;  // Rows of one adapter, that are one thread's.
constexpr int SUMS = 8;  // That grow at once, where registers are wide: no addition waits for the last.
constexpr int STEP = 2 * WIDTH;  // Numbers of a factor that are read together.

template <int N> using Count = std::integral_constant<int, N>;

// STEP numbers as they are cheapest to read: in order, but of bfloat16 every other one, and then the rest.
struct Two {
    Wide first, second;
};

static inline Two two(const float *from) { return {wide(from), wide(from + WIDTH)}; }

static inline Two two(const Float16 *from) {
    float numbers[STEP];
    for (int i = 0; i < STEP; i += LANES) store(numbers + i, load(from + i));
    return two(numbers);
}

static inline Two two(const BFloat16 *from) { return {first_of(wide(from)), second_of(wide(from))}; }

template <typename Number> static inline Two in_order(Two sums, const Number *) { return sums; }

static inline Two in_order(Two sums, const BFloat16 *) {
    WideIntegers low, high;
    for (int i = 0; i < WIDTH; i++) {
        low[i] = i / 2 + i % 2 * WIDTH;
        high[i] = low[i] + WIDTH / 2;
    }
    return {picked(sums.first, sums.second, low), picked(sums.first, sums.second, high)};
}

// Asks for STEP numbers of a factor at one place, if a line begins there.
template <typename Number> static inline void ask(const Number *soon, int64_t place) {
    if (place * sizeof(Number) % LINE) return;
    for (size_t i = 0; i < STEP * sizeof(Number); i += LINE)
        __builtin_prefetch(reinterpret_cast<const char *>(soon + place) + i, 0, 2);
}

// The sum of a factor's numbers times those of a row, STEP by STEP; a row of float32 has the order of `two`.
template <typename Number, typename X> struct Sum {
    Two sums;

    void add(const Number *factor, const float *x) {
        const Two own = two(factor), row = two(x);
        sums.first += own.first * row.first;
        sums.second += own.second * row.second;
    }

    float total() const {
        const Two ordered = in_order(sums, static_cast<const Number *>(nullptr));
        return sum(ordered.first + ordered.second);
    }
};

template <> struct Sum<BFloat16, BFloat16> {
    Wide products;

    void add(const BFloat16 *factor, const BFloat16 *x) { products = plus_products(products, wide(factor), wide(x)); }

    float total() const { return sum(products); }
};

// z[n, r] = weight_n a_r x_n for R ranks and N rows.
template <int R, int N, typename Number, typename X>
static void shrink(
    const LowRankUse &use, const Number *factor, int64_t first, int64_t rank, const X *x, int64_t in, float *z,
    const Number *soon
) {
    Sum<Number, X> sums[R][N] = {};
    const Number *a[R];
    const X *v[N];
    for (int r = 0; r < R; r++) a[r] = factor + (rank + r) * in;
    for (int n = 0; n < N; n++) v[n] = x + use.rows->rows[first + n] * in;
    int64_t i = 0;
    for (; i + STEP <= in; i += STEP)
        for (int r = 0; r < R; r++) {
            ask(soon, (rank + r) * in + i);
            for (int n = 0; n < N; n++) sums[r][n].add(a[r] + i, v[n] + i);
        }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            float total = sums[r][n].total();
            for (int64_t j = i; j < in; j++) total = std::fma(value(a[r][j]), value(v[n][j]), total);
            z[(first + n) * use.part->rank + rank + r] = total * use.rows->weights[first + n];
        }
}

template <int N, typename Number, typename X>
static void shrink_rows(
    const LowRankUse &use, const Number *a, int64_t first, const X *x, int64_t in, float *z, const Number *soon
) {
    constexpr int R = (sizeof(X) < sizeof(float) ? SUMS : ROWS) / N;
    int64_t rank = 0;
    for (; rank + R <= use.part->rank; rank += R) shrink<R, N>(use, a, first, rank, x, in, z, soon);
    for (; rank < use.part->rank; rank++) shrink<1, N>(use, a, first, rank, x, in, z, soon);
}

// to[n][o] += b_o z_n for the outputs of a share and N rows of z [N, rank].
template <int N, typename Number>
static void expand(
    int64_t rank, const Number *b, const float *v, float *const to[N], int64_t out, Share own, const Number *soon
) {
    int64_t o = own.begin;
    for (; o + STEP <= own.end; o += STEP) {
        Two sums[N] = {};
        for (int64_t r = 0; r < rank; r++) {
            ask(soon, r * out + o);
            const Two numbers = two(b + r * out + o);
            for (int n = 0; n < N; n++) {
                sums[n].first += v[n * rank + r] * numbers.first;
                sums[n].second += v[n * rank + r] * numbers.second;
            }
        }
        for (int n = 0; n < N; n++) {
            const Two ordered = in_order(sums[n], b);
            put(wide(to[n] + o) + ordered.first, to[n] + o);
            put(wide(to[n] + o + WIDTH) + ordered.second, to[n] + o + WIDTH);
        }
    }
    for (; o < own.end; o++)
        for (int n = 0; n < N; n++) {
            float total = 0;
            for (int64_t r = 0; r < rank; r++) total = std::fma(v[n * rank + r], value(b[r * out + o]), total);
            to[n][o] += total;
        }
}

// What `of_rows` does to blocks of rows; the first of them asks for the next factor, the others for this one.
template <typename Number, typename OfRows>
static void in_blocks(int64_t count, const Number *factor, const void *next, OfRows of_rows) {
    const Number *soon = static_cast<const Number *>(next);
    int64_t row = 0;
    for (; row + ROWS <= count; row += ROWS, soon = factor) of_rows(Count<ROWS>(), row, soon);
    if (row + 2 <= count) of_rows(Count<2>(), row, soon), row += 2, soon = factor;
    if (row < count) of_rows(Count<1>(), row, soon);
}

// [in] as `two` reads bfloat16.
static void reorder(const float *x, int64_t in, float *to) {
    int64_t i = 0;
    for (; i + STEP <= in; i += STEP)
        for (int j = 0; j < WIDTH; j++) {
            to[i + j] = x[i + 2 * j];
            to[i + WIDTH + j] = x[i + 2 * j + 1];
        }
    std::copy(x + i, x + in, to + i);
}

// Rows [T, in], of float32 or bfloat16.
struct Input {
    Numbers x;
    int64_t in;

    bool is_narrow() const { return x.format == BFLOAT16; }

    // Whether an A of this format does not meet the rows as they lie: one of bfloat16 in float32, or any other in bfloat16.
    bool is_prepared(int64_t format) const { return is_narrow() != (format == BFLOAT16); }
};

// The rows as floats for such A, as many as any of their adapters has: in the order of `two`, or as they are.
static std::vector<float> prepared(const LowRankUse *uses, int64_t count, const Input &input) {
    int64_t rows = 0;
    for (int64_t u = 0; u < count; u++)
        if (input.is_prepared(uses[u].part->a.format))
            for (int64_t n = 0; n < uses[u].rows->count; n++) rows = std::max(rows, uses[u].rows->rows[n] + 1);
    const int64_t in = input.in;
    std::vector<float> found(rows * in);
    for (int64_t row = 0; row < rows; row++) {
        float *to = found.data() + row * in;
        if (input.is_narrow()) floats(static_cast<const BFloat16 *>(input.x.first) + row * in, in, to);
        else reorder(static_cast<const float *>(input.x.first) + row * in, in, to);
    }
    return found;
}

// z = A x of one adapter, of which `next` is the next A to be read.
static void shrink_all(const LowRankUse &use, const Input &input, const float *made, float *z, const void *next) {
    const auto with = [&](auto a, auto x) {
        in_blocks(use.rows->count, a, next, [&](auto n, int64_t row, auto soon) {
            shrink_rows<n>(use, a, row, x, input.in, z, soon);
        });
    };
    if (input.is_narrow() && use.part->a.format == BFLOAT16)
        return with(static_cast<const BFloat16 *>(use.part->a.first), static_cast<const BFloat16 *>(input.x.first));
    const float *x = input.is_prepared(use.part->a.format) ? made : static_cast<const float *>(input.x.first);
    as_they_lie(use.part->a, [&](auto a) { with(a, x); });
}

// The same uses, of PIECE rows at most, which lie in `rows`: threads share these however few adapters there are.
static std::vector<LowRankUse> in_pieces(const std::vector<LowRankUse> &uses, std::deque<Rows> &rows) {
    std::vector<LowRankUse> found;
    for (const auto &[part, own] : uses)
        for (int64_t n = 0; n < own->count; n += PIECE) {
            rows.push_back({own->rows + n, own->weights + n, std::min(PIECE, own->count - n)});
            found.push_back({part, &rows.back()});
        }
    return found;
}

// All that A x is made of, and where it goes.
struct Shrinks {
    std::deque<Rows> rows;
    std::vector<LowRankUse> uses;
    std::vector<int64_t> starts;  // Of each use in z: [its rows, rank].
    std::vector<float> z;
    Input input;
    std::vector<float> made;

    Shrinks(const std::vector<LowRankUse> &whole, const Input &input, int threads)
        : uses(threads > 1 ? in_pieces(whole, rows) : whole), starts(uses.size() + 1, 0), input(input) {
        for (size_t u = 0; u < uses.size(); u++) starts[u + 1] = starts[u] + uses[u].rows->count * uses[u].part->rank;
        z.resize(starts.back());
        made = prepared(uses.data(), uses.size(), input);
    }

    int64_t count() const { return uses.size(); }
    const LowRank &part_after(int64_t u, int64_t more) const { return *uses[std::min(u + more, count() - 1)].part; }

    void shrink(int64_t u, int threads) {
        shrink_all(uses[u], input, made.data(), z.data() + starts[u], part_after(u, threads).a.first);
    }
};
