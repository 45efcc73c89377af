// y[row] += weight B (A x[row]), for adapters with A, B, ranks and rows of their own.
//
// Every adapter's factors are read once for each block of its rows, where they lie.
#include "lanes.h"

struct LowRankUse {
    Numbers a;  // [rank, in]
    Numbers b;  // [out, rank]
    int64_t rank;
    Rows rows;
};

constexpr int ROWS = 4;  // Rows of one adapter that read its factors together.

// z[n, r] = weight_n a_r x_n for R ranks and N rows.
template <int R, int N, typename Number>
static void shrink(
    const LowRankUse &use, const Number *factor, int64_t first, int64_t rank, const float *x, int64_t in,
    float *z
) {
    Lanes sums[R][N] = {};
    const Number *a[R];
    const float *v[N];
    for (int r = 0; r < R; r++) a[r] = factor + (rank + r) * in;
    for (int n = 0; n < N; n++) v[n] = x + use.rows.rows[first + n] * in;
    int64_t i = 0;
    for (; i + LANES <= in; i += LANES)
        for (int r = 0; r < R; r++) {
            const Lanes lanes = load(a[r] + i);
            for (int n = 0; n < N; n++) sums[r][n] += lanes * load(v[n] + i);
        }
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) {
            float total = sum(sums[r][n]);
            for (int64_t j = i; j < in; j++) total += value(a[r][j]) * v[n][j];
            z[(first + n) * use.rank + rank + r] = total * use.rows.weights[first + n];
        }
}

template <int N, typename Number>
static void shrink_rows(
    const LowRankUse &use, const Number *a, int64_t first, const float *x, int64_t in, float *z
) {
    constexpr int R = N == 1 ? 8 : N == 2 ? 4 : 2;
    int64_t rank = 0;
    for (; rank + R <= use.rank; rank += R) shrink<R, N>(use, a, first, rank, x, in, z);
    for (; rank < use.rank; rank++) shrink<1, N>(use, a, first, rank, x, in, z);
}

template <typename Number>
static void shrink_all(const LowRankUse &use, const Number *a, const float *x, int64_t in, float *z) {
    int64_t row = 0;
    for (; row + ROWS <= use.rows.count; row += ROWS) shrink_rows<ROWS>(use, a, row, x, in, z);
    if (row + 2 <= use.rows.count) shrink_rows<2>(use, a, row, x, in, z), row += 2;
    if (row < use.rows.count) shrink_rows<1>(use, a, row, x, in, z);
}

// y[n, o] += b_o z_n for the outputs of a share, whose factor `b` is.
template <typename Number>
static void expand(const LowRankUse &use, const Number *b, const float *z, float *y, int64_t out, Share own) {
    const int64_t rank = use.rank, whole = rank / LANES * LANES;
    for (int64_t first = 0; first < use.rows.count; first += ROWS) {
        const int64_t last = first + ROWS < use.rows.count ? first + ROWS : use.rows.count;
        const Number *from = b;
        int64_t o = own.begin;
        for (; o + LANES <= own.end; o += LANES, from += LANES * rank)
            for (int64_t n = first; n < last; n++) {
                const float *v = z + n * rank;
                float *to = y + use.rows.rows[n] * out + o;
                Lanes total = load(to);
                if (whole) {
                    Lanes products[LANES] = {};
                    for (int64_t r = 0; r < whole; r += LANES) {
                        const Lanes lanes = load(v + r);
                        for (int j = 0; j < LANES; j++) products[j] += load(from + j * rank + r) * lanes;
                    }
                    total += sums_of(products);
                }
                for (int64_t r = whole; r < rank; r++)
                    for (int j = 0; j < LANES; j++) total[j] += value(from[j * rank + r]) * v[r];
                store(to, total);
            }
        for (; o < own.end; o++, from += rank)
            for (int64_t n = first; n < last; n++) {
                float total = 0;
                for (int64_t r = 0; r < rank; r++) total += value(from[r]) * z[n * rank + r];
                y[use.rows.rows[n] * out + o] += total;
            }
    }
}

// `count` rows of a factor from `begin` on: where they are read again, or not in whole lanes, as floats in
// `scratch`.
static Numbers part_of(
    const Numbers &factor, int64_t begin, int64_t count, int64_t width, const Rows &rows, Scratch &scratch
) {
    Numbers part = factor;
    as_they_lie(factor, [&](auto first) {
        if (factor.format != FLOAT32 && (rows.count > 1 || width % LANES))
            part = {floats(first + begin * width, count * width, scratch.of(count * width)), FLOAT32};
        else
            part.first = first + begin * width;
    });
    return part;
}

// x [T, in] and y [T, out] are contiguous.
extern "C" void timbre_low_rank(
    const LowRankUse *uses, int64_t count, const float *x, int64_t in, float *y, int64_t out, int threads
) {
    std::vector<int64_t> starts(count + 1, 0);
    for (int64_t u = 0; u < count; u++) starts[u + 1] = starts[u] + uses[u].rows.count * uses[u].rank;
    std::vector<float> z(starts[count]);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        Scratch scratch;
#pragma omp for schedule(dynamic, 1)
        for (int64_t u = 0; u < count; u++) {
            const Numbers factor = part_of(uses[u].a, 0, uses[u].rank, in, uses[u].rows, scratch);
            as_they_lie(factor, [&](auto a) { shrink_all(uses[u], a, x, in, z.data() + starts[u]); });
        }
        const Share own = share(out, thread_number(), thread_count(), LANES);
        for (int64_t u = 0; u < count; u++) {
            const int64_t size = own.end - own.begin;
            const Numbers factor = part_of(uses[u].b, own.begin, size, uses[u].rank, uses[u].rows, scratch);
            as_they_lie(factor, [&](auto b) { expand(uses[u], b, z.data() + starts[u], y, out, own); });
        }
    }
}

// An expert of low rank, and where the gates of its adapter's rows are.
struct Expert {
    LowRankUse use;
    int64_t adapter;
    int64_t column;
};

struct Gates {
    const float *values;  // [rows of the adapter, columns]
    int64_t columns;
};

// As above, for experts: each runs, and is read, for the rows alone whose gate is not zero.
extern "C" void timbre_low_rank_experts(
    const Expert *experts, int64_t count, const Gates *gates, const float *x, int64_t in, float *y, int64_t out,
    int threads
) {
    int64_t size = 0;
    for (int64_t e = 0; e < count; e++) size += experts[e].use.rows.count;
    std::vector<int64_t> rows(size);
    std::vector<float> weights(size);
    std::vector<LowRankUse> kept;
    int64_t end = 0;
    for (int64_t e = 0; e < count; e++) {
        const LowRankUse &use = experts[e].use;
        const Gates &own = gates[experts[e].adapter];
        const int64_t begin = end;
        for (int64_t n = 0; n < use.rows.count; n++) {
            const float gate = own.values[n * own.columns + experts[e].column];
            if (gate == 0) continue;
            rows[end] = use.rows.rows[n];
            weights[end++] = gate * use.rows.weights[n];
        }
        if (end > begin)
            kept.push_back({use.a, use.b, use.rank, {rows.data() + begin, weights.data() + begin, end - begin}});
    }
    timbre_low_rank(kept.data(), kept.size(), x, in, y, out, threads);
}
