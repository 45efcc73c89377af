// y[row] += weight S x[row] with S in CSR, for adapters with S and rows of their own.
#include "lanes.h"

struct SparseUse {
    const int64_t *row_ends;  // [out + 1]
    const int32_t *columns;
    const float *values;
    Rows rows;
};

constexpr int64_t PIECE = 2048;  // Entries whose products stay in the nearest cache.
constexpr int AT_ONCE = LINE / sizeof(float);  // Numbers of one line.
constexpr int VECTORS = 4;  // Of rows side by side, of which all sums stay in registers.

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
    const auto eight = [&](int64_t k) {
        const int32_t *c = columns + k;
        const Lanes read = {v[c[0]], v[c[1]], v[c[2]], v[c[3]], v[c[4]], v[c[5]], v[c[6]], v[c[7]]};
        store(products + k, read * load(values + k));
    };
    int64_t k = 0;
    for (; k + AT_ONCE <= count; k += AT_ONCE) {
        __builtin_prefetch(next.values + begin + k, 0, 2);
        __builtin_prefetch(next.columns + begin + k, 0, 2);
        for (int j = 0; j < AT_ONCE; j += LANES) eight(k + j);
    }
    for (; k + LANES <= count; k += LANES) eight(k);
    for (; k < count; k++) products[k] = values[k] * v[columns[k]];
}

// Products of eight outputs lie one after another. There is a branch on the most that one of them has, not on how
// many each has: nothing foretells that.
static inline Lanes sums_of_outputs(const int64_t *row_ends, const float *products) {
    const Integers place = {0, 1, 2, 3, 4, 5, 6, 7};
    int32_t counts[LANES], most = 0;
    for (int j = 0; j < LANES; j++) counts[j] = row_ends[j + 1] - row_ends[j];
    for (int j = 0; j < LANES; j++) most = counts[j] > most ? counts[j] : most;
    Lanes sums[LANES] = {};
    for (int32_t done = 0; done < most; done += LANES)
#pragma GCC unroll 8
        for (int j = 0; j < LANES; j++) {
            Integers found;
            std::memcpy(&found, products + (row_ends[j] - row_ends[0]) + done, sizeof found);
            sums[j] += (Lanes)(found & (place < counts[j] - done));
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

// The outputs of a share in order of how many entries they have, so that the processor foretells where those end.
// The entries are brought near meanwhile.
static void sort_outputs(const SparseUse &use, Share own, std::vector<int32_t> &outputs) {
    constexpr int MOST = 63;
    int64_t places[MOST + 2] = {};
    const auto count = [&](int64_t o) {
        const int64_t found = use.row_ends[o + 1] - use.row_ends[o];
        return found < MOST ? found : MOST;
    };
    for (int64_t o = own.begin; o < own.end; o++) {
        __builtin_prefetch(use.values + use.row_ends[o], 0, 2);
        __builtin_prefetch(use.columns + use.row_ends[o], 0, 2);
        places[count(o) + 1]++;
    }
    for (int c = 0; c <= MOST; c++) places[c + 1] += places[c];
    outputs.resize(own.end - own.begin);
    for (int64_t o = own.begin; o < own.end; o++) outputs[places[count(o)]++] = o;
}

// V LANES rows side by side.
template <int V> struct Many {
    static constexpr int64_t WIDTH = V * LANES;
    const int64_t *rows;
    const float *weights;

    // sums [own, WIDTH] = S v of all rows.
    void multiply(
        const SparseUse &use, const std::vector<int32_t> &outputs, Share own, const float *lanes, float *sums
    ) const {
        for (const int64_t o : outputs) {
            Lanes totals[V] = {};
            for (int64_t k = use.row_ends[o]; k < use.row_ends[o + 1]; k++)
                for (int v = 0; v < V; v++)
                    totals[v] += use.values[k] * load(lanes + use.columns[k] * WIDTH + v * LANES);
            for (int v = 0; v < V; v++) store(sums + (o - own.begin) * WIDTH + v * LANES, totals[v]);
        }
    }

    void add(const float *sums, Share own, float *y, int64_t out) const {
        for (int v = 0; v < V; v++, sums += LANES) {
            const Lanes scale = load(weights + v * LANES);
            const int64_t *to = rows + v * LANES;
            int64_t o = own.begin;
            for (; o + LANES <= own.end; o += LANES) {
                Lanes block[LANES];
                for (int j = 0; j < LANES; j++) block[j] = load(sums + (o - own.begin + j) * WIDTH) * scale;
                transpose(block);
                for (int n = 0; n < LANES; n++) store(y + to[n] * out + o, load(y + to[n] * out + o) + block[n]);
            }
            for (; o < own.end; o++)
                for (int n = 0; n < LANES; n++) y[to[n] * out + o] += sums[(o - own.begin) * WIDTH + n] * scale[n];
        }
    }
};

// All rows of one adapter but fewer than eight; returns how many. What it needs memory for is kept between calls.
class ManyRows {
  public:
    int64_t operator()(const SparseUse &use, const float *x, int64_t in, float *y, int64_t out, Share own) {
        if (use.rows.count < LANES) return 0;
        sort_outputs(use, own, outputs);
        int64_t row = 0;
        const auto pass = [&](auto many) {
            constexpr int64_t width = decltype(many)::WIDTH;
            for (; row + width <= use.rows.count; row += width) {
                many = {use.rows.rows + row, use.rows.weights + row};
                float *x_lanes = lanes.of(in * width), *y_lanes = sums.of((own.end - own.begin) * width);
                for (int v = 0; v < width; v += LANES) side_by_side(x, in, many.rows + v, LANES, x_lanes + v, width);
                many.multiply(use, outputs, own, x_lanes, y_lanes);
                many.add(y_lanes, own, y, out);
            }
        };
        pass(Many<VECTORS>{});
        pass(Many<1>{});
        return row;
    }

  private:
    std::vector<int32_t> outputs;
    Scratch lanes, sums;
};

// x [T, in] and y [T, out] are contiguous.
extern "C" void timbre_sparse(
    const SparseUse *uses, int64_t count, const float *x, int64_t in, float *y, int64_t out, int threads
) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Share own = share(out, thread_number(), thread_count(), LANES);
        ManyRows many_rows;
        for (int64_t u = 0; u < count; u++) {
            const SparseUse &use = uses[u], &next = uses[u + 1 < count ? u + 1 : u];
            for (int64_t row = many_rows(use, x, in, y, out, own); row < use.rows.count; row++) {
                const int64_t n = use.rows.rows[row];
                one_row(use, next, x + n * in, use.rows.weights[row], y + n * out, own);
            }
        }
    }
}
