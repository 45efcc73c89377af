// y[row] += weight S x[row] with S in CSR, for adapters with S and rows of their own.
#include "lanes.h"

struct SparseUse {
    const int64_t *row_ends;  // [out + 1]
    const int32_t *columns;
    const float *values;
    Rows rows;
};

constexpr int64_t PIECE = 2048;  // Entries whose products stay in the nearest cache.

static inline float dot(const SparseUse &use, int64_t o, const float *v) {
    float total = 0;
    for (int64_t k = use.row_ends[o]; k < use.row_ends[o + 1]; k++) total += use.values[k] * v[use.columns[k]];
    return total;
}

// products[k] = values[k] v[columns[k]] for begin <= k < end, without a branch on where rows end. As many entries
// of the next adapter are brought near meanwhile; where it has fewer, that does nothing.
static void multiply(
    const SparseUse &use, const SparseUse &next, int64_t begin, int64_t end, const float *v, float *products
) {
    const float *values = use.values + begin;
    const int32_t *columns = use.columns + begin;
    const int64_t count = end - begin;
    int64_t k = 0;
    for (; k + LANES <= count; k += LANES) {
        __builtin_prefetch(next.values + begin + k, 0, 2);
        __builtin_prefetch(next.columns + begin + k, 0, 2);
        const int32_t *c = columns + k;
        const Lanes read = {v[c[0]], v[c[1]], v[c[2]], v[c[3]], v[c[4]], v[c[5]], v[c[6]], v[c[7]]};
        store(products + k, read * load(values + k));
    }
    for (; k < count; k++) products[k] = values[k] * v[columns[k]];
}

// The first `count` of eight floats, zeros for the others whatever they are.
static inline Lanes first_of(const float *from, int64_t count) {
    static const int32_t masks[2 * LANES] = {-1, -1, -1, -1, -1, -1, -1, -1};
    Integers mask, found;
    const int64_t kept = count < 0 ? 0 : count < LANES ? count : LANES;
    std::memcpy(&mask, masks + LANES - kept, sizeof mask);
    std::memcpy(&found, from, sizeof found);
    found &= mask;
    Lanes lanes;
    std::memcpy(&lanes, &found, sizeof lanes);
    return lanes;
}

// Products of eight outputs lie one after another. There is a branch on the most that one of them has, not on how
// many each has: nothing foretells that.
static inline Lanes sums_of_outputs(const int64_t *row_ends, const float *products) {
    Lanes sums[LANES] = {};
    int64_t most = 0;
    for (int j = 0; j < LANES; j++) {
        const int64_t count = row_ends[j + 1] - row_ends[j];
        most = count > most ? count : most;
    }
    for (int64_t done = 0; done < most; done += LANES)
        for (int j = 0; j < LANES; j++) {
            const int64_t begin = row_ends[j] + done;
            sums[j] += first_of(products + (begin - row_ends[0]), row_ends[j + 1] - begin);
        }
    return sums_of(sums);
}

// to += weight S v for the outputs of a share.
static void one_row(
    const SparseUse &use, const SparseUse &next, const float *v, float weight, float *to, Share own
) {
    float products[2 * PIECE + LANES];  // Of all that may be read, if only to be left out.
    for (int64_t o = own.begin; o < own.end;) {
        const int64_t begin = use.row_ends[o];
        int64_t last = o;
        while (last + LANES <= own.end && use.row_ends[last + LANES] - begin <= PIECE) last += LANES;
        if (last == o) {  // Fewer than eight outputs are left, or they have many entries.
            if (use.row_ends[o + 1] > begin) to[o] += weight * dot(use, o, v);
            o++;
            continue;
        }
        multiply(use, next, begin, use.row_ends[last], v, products);
        for (; o < last; o += LANES) {
            __builtin_prefetch(next.row_ends + o, 0, 2);
            const float *from = products + (use.row_ends[o] - begin);
            store(to + o, load(to + o) + sums_of_outputs(use.row_ends + o, from) * weight);
        }
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
                side_by_side(x, in, use.rows.rows + row, LANES, lanes.data());
                eight_rows(use, row, lanes.data(), y, out, own);
            }
            const SparseUse &next = uses[u + 1 < count ? u + 1 : u];
            for (; row < use.rows.count; row++) {
                const int64_t n = use.rows.rows[row];
                one_row(use, next, x + n * in, use.rows.weights[row], y + n * out, own);
            }
        }
    }
}
