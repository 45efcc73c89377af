// Patterns of places: a file's own are made at its adapter's load, in a few hundred layers.
#include "pattern.h"

#include <vector>

#include "played.h"

// Where a transform leaves a frequency, or wants it.
struct Frequency {
    int64_t place;  // Of a frequency, or of a coordinate.
    double factor, scale;  // Of what is added there, and of the sum.
};

// Places in the order that `SpectralPattern` has.
struct Order {
    std::vector<int32_t> counts, first, rank;

    // How many places each of so many sums has; where its entries begin, and its rank by that number.
    Order(int64_t num_sums, const int64_t *rows, int64_t count, const Frequency *out)
        : counts(num_sums), first(num_sums), rank(num_sums) {
        for (int64_t n = 0; n < count; n++) counts[out[rows[n]].place]++;
        std::vector<int32_t> with(count + 2), entries(count + 2);  // Sums of each number, and all of theirs.
        for (const int32_t own : counts) with[own + 1]++, entries[own + 1] += own;
        for (int64_t n = 0; n <= count; n++) with[n + 1] += with[n], entries[n + 1] += entries[n];
        for (int64_t k = 0; k < num_sums; k++) {
            rank[k] = with[counts[k]]++;
            first[k] = entries[counts[k]], entries[counts[k]] += counts[k];
        }
    }
};

// `sums` [num_sums] and `entries` [count] of coefficients at these frequencies, each below the number that its
// transform has; else `is_wrong` is set, and nothing else.
extern "C" void timbre_spectral_pattern(
    const int64_t *rows, const int64_t *columns, int64_t count, const Frequency *out, int64_t num_out,
    const Frequency *in, int64_t num_in, int64_t num_sums, SpectralSum *sums, SpectralEntry *entries,
    int64_t *is_wrong, int
) {
    for (int64_t n = 0; n < count; n++)
        if (uint64_t(rows[n]) >= uint64_t(num_out) || uint64_t(columns[n]) >= uint64_t(num_in)) *is_wrong = 1;
    if (*is_wrong) return;
    Order order(num_sums, rows, count, out);
    for (int64_t k = 0; k < num_sums; k++) sums[order.rank[k]] = {int32_t(k), order.counts[k], 0};
    for (int64_t n = 0; n < count; n++) {
        const Frequency &to = out[rows[n]], &from = in[columns[n]];
        sums[order.rank[to.place]].scale = to.scale * from.scale;  // The same for all of a sum.
        entries[order.first[to.place]++] = {int32_t(from.place), int32_t(n), float(to.factor * from.factor)};
    }
}
PLAYED(timbre_spectral_pattern)
