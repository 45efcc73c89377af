// y[row] += weight S x[row] with S in CSR, for adapters with S and rows of their own.
#include "lanes.h"

struct SparseUse {
    const int64_t *row_ends;  // [out + 1]
    const int32_t *columns;
    const float *values;
    Rows rows;
};

static void one_row(const SparseUse &use, int64_t n, const float *x, int64_t in, float *y, int64_t out, Share own) {
    const float *v = x + use.rows.rows[n] * in;
    const float weight = use.rows.weights[n];
    float *to = y + use.rows.rows[n] * out;
    for (int64_t o = own.begin; o < own.end; o++) {
        const int64_t begin = use.row_ends[o], end = use.row_ends[o + 1];
        if (begin == end) continue;
        float total = 0, other = 0;
        int64_t k = begin;
        for (; k + 2 <= end; k += 2) {
            total += use.values[k] * v[use.columns[k]];
            other += use.values[k + 1] * v[use.columns[k + 1]];
        }
        if (k < end) total += use.values[k] * v[use.columns[k]];
        to[o] += weight * (total + other);
    }
}

// Eight rows side by side: `lanes` holds their inputs, [in, LANES].
static void eight_rows(const SparseUse &use, int64_t first, const float *lanes, float *y, int64_t out, Share own) {
    const Lanes weights = load(use.rows.weights + first);
    for (int64_t o = own.begin; o < own.end; o++) {
        if (use.row_ends[o] == use.row_ends[o + 1]) continue;
        Lanes total = {};
        for (int64_t k = use.row_ends[o]; k < use.row_ends[o + 1]; k++)
            total += use.values[k] * load(lanes + int64_t(use.columns[k]) * LANES);
        total *= weights;
        for (int n = 0; n < LANES; n++) y[use.rows.rows[first + n] * out + o] += total[n];
    }
}

// x [T, in] and y [T, out] are contiguous.
extern "C" void timbre_sparse(
    const SparseUse *uses, int64_t count, const float *x, int64_t in, float *y, int64_t out, int threads
) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Share own = share(out, thread_number(), thread_count(), 1);
        std::vector<float> lanes;
        for (int64_t u = 0; u < count; u++) {
            const SparseUse &use = uses[u];
            int64_t row = 0;
            for (; row + LANES <= use.rows.count; row += LANES) {
                lanes.resize(in * LANES);
                for (int n = 0; n < LANES; n++) {
                    const float *from = x + use.rows.rows[row + n] * in;
                    for (int64_t i = 0; i < in; i++) lanes[i * LANES + n] = from[i];
                }
                eight_rows(use, row, lanes.data(), y, out, own);
            }
            for (; row < use.rows.count; row++) one_row(use, row, x, in, y, out, own);
        }
    }
}
