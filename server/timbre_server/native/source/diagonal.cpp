// y[row] += weight (extra_gain x[row] + shift), for adapters with gains and rows of their own. x may be y.
#include <algorithm>

#include "gates.h"

struct Gains {
    const float *extra;  // [features]
    const float *shift;  // [features]; null: there is none.
    const Gates *gates;  // Of an expert, in this column: they multiply the weights; or null.
    int64_t column;

    float gate(int64_t n) const { return gates ? gates->values[n * gates->columns + column] : 1; }
};

// What the rows are that several uses change: these read copies of them, where they change what they read.
static std::vector<const float *> inputs_of(
    const std::vector<Use<Gains>> &uses, const float *x, int64_t features, bool are_changed, Scratch &copies
) {
    std::vector<int> times;
    for (const auto &use : uses)
        for (int64_t n = 0; n < use.rows->count; n++) {
            const int64_t row = use.rows->rows[n];
            if (row >= int64_t(times.size())) times.resize(row + 1);
            times[row]++;
        }
    const auto is_copied = [&](int count) { return are_changed && count > 1; };
    float *copy = copies.of(std::count_if(times.begin(), times.end(), is_copied) * features);
    std::vector<const float *> found;
    for (size_t row = 0; row < times.size(); row++) {
        const float *own = x + row * features;
        if (is_copied(times[row])) {
            std::copy_n(own, features, copy);
            found.push_back(copy);
            copy += features;
        } else {
            found.push_back(own);
        }
    }
    return found;
}

// What one row is given by one adapter.
static void add_gains(
    const Use<Gains> &use, int64_t n, const std::vector<const float *> &inputs, float *y, int64_t features, Share own
) {
    const Gains &gains = *use.part;
    const int64_t row = use.rows->rows[n];
    const float *from = inputs[row], gate = gains.gate(n), weight = use.rows->weights[n] * gate;
    if (gate == 0) return;
    float *to = y + row * features;
    if (gains.shift == nullptr)
        for (int64_t d = own.begin; d < own.end; d++) add_product(to[d], weight * gains.extra[d], from[d]);
    else
        for (int64_t d = own.begin; d < own.end; d++) {
            float change = gains.shift[d];
            add_product(change, gains.extra[d], from[d]);
            add_product(to[d], weight, change);
        }
}

// x and y [rows, features] are contiguous.
extern "C" void timbre_diagonal(
    const Uses<Gains> *all, const float *x, float *y, int64_t rows, int64_t features, int threads
) {
    const auto uses = all->with_rows();
    threads = all->threads(rows, threads);
    Scratch copies;
    const auto inputs = inputs_of(uses, x, features, x == y, copies);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Share own = share(features, thread_number(), thread_count(), LANES);
        for (const auto &use : uses)
            for (int64_t n = 0; n < use.rows->count; n++) add_gains(use, n, inputs, y, features, own);
    }
}
PLAYED(timbre_diagonal)
