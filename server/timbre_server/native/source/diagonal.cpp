// y[row] += weight (extra_gain x[row] + shift), for adapters with gains and rows of their own. x may be y.
#include <algorithm>

#include "gates.h"
#include "wide.h"

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

// to += weight (extra from + shift), of numbers of a row side by side or of one.
template <typename V> static inline void add_change(const Gains &gains, float weight, int64_t d, V from, V &to) {
    V extra, change;
    get(extra, gains.extra + d);
    if (gains.shift == nullptr) return add_product(to, weight * extra, from);
    get(change, gains.shift + d);
    add_product(change, extra, from);
    add_product(to, V{} + weight, change);
}

// What one row is given by one adapter. The next one's gains are brought near meanwhile.
static void add_gains(
    const Use<Gains> &use, int64_t n, const Gains &next, const std::vector<const float *> &inputs, float *y,
    int64_t features, Share own
) {
    const Gains &gains = *use.part;
    const int64_t row = use.rows->rows[n];
    const float *from = inputs[row], gate = gains.gate(n), weight = use.rows->weights[n] * gate;
    if (gate == 0) return;
    float *to = y + row * features;
    int64_t d = own.begin;
    for (; d + WIDTH <= own.end; d += WIDTH) {
        __builtin_prefetch(next.extra + d, 0, 3);
        Wide sums = wide(to + d);
        add_change(gains, weight, d, wide(from + d), sums);
        put(sums, to + d);
    }
    for (; d < own.end; d++) add_change(gains, weight, d, from[d], to[d]);
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
        for (size_t u = 0; u < uses.size(); u++) {
            const Gains &next = *uses[std::min(u + 1, uses.size() - 1)].part;
            for (int64_t n = 0; n < uses[u].rows->count; n++) add_gains(uses[u], n, next, inputs, y, features, own);
        }
    }
}
PLAYED(timbre_diagonal)
