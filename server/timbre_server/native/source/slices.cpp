// Sparse matrices of adapters, row after row as their files have them, in slices of eight outputs (`sparse.h`): made
// at a load, in a few hundred layers.
#include <algorithm>
#include <vector>

#include "lanes.h"
#include "played.h"

constexpr int64_t MOST = 0xffff;  // What 16 bits hold.

// `ranks` [out], `lengths` of all slices, and the sum of these. Entries of output o are those from row_ends[o] to
// before row_ends[o + 1] among `count`; where that cannot be, or an output has more than 16 bits hold, `steps` is -1.
extern "C" void timbre_slice_ranks(
    const int64_t *row_ends, int64_t out, int64_t count, uint16_t *ranks, uint16_t *lengths, int64_t *steps, int
) {
    *steps = -1;
    if (out > MOST || row_ends[0] != 0 || row_ends[out] != count) return;
    int64_t most = 0;
    for (int64_t o = 0; o < out; o++) {
        if (row_ends[o + 1] < row_ends[o]) return;
        most = std::max(most, row_ends[o + 1] - row_ends[o]);
    }
    if (most > MOST) return;
    std::vector<int64_t> next(most + 2);  // By how many entries less than most: the rank of the next such output.
    for (int64_t o = 0; o < out; o++) next[most - (row_ends[o + 1] - row_ends[o]) + 1]++;
    for (int64_t n = 0; n <= most; n++) next[n + 1] += next[n];
    int64_t sum = 0;
    for (int64_t o = 0; o < out; o++) {
        const int64_t own = row_ends[o + 1] - row_ends[o], rank = next[most - own]++;
        ranks[o] = rank;
        if (rank % LANES == 0) lengths[rank / LANES] = own, sum += own;
    }
    *steps = sum;
}
PLAYED(timbre_slice_ranks)

// Columns and values of all slices, whose ranks and lengths were made of the same `row_ends`. Where an output has no
// more entries, its value is zero and its column that of the slice's first output: x is read there. Where a column is
// not in [0, in), or `in` more than 16 bits hold, `is_wrong` is set, and nothing else.
extern "C" void timbre_slice_entries(
    const int64_t *row_ends, const int32_t *columns, const float *values, int64_t out, int64_t in,
    const uint16_t *ranks, const uint16_t *lengths, uint16_t *columns_KC, float *values_KC, int64_t *is_wrong, int
) {
    bool is_out_of_range = in > MOST;
    for (int64_t n = 0; n < row_ends[out]; n++) is_out_of_range |= uint32_t(columns[n]) >= uint64_t(in);
    if ((*is_wrong = is_out_of_range)) return;
    const int64_t slices = (out + LANES - 1) / LANES;
    std::vector<int64_t> order(slices * LANES, -1);
    for (int64_t o = 0; o < out; o++) order[ranks[o]] = o;
    for (int64_t s = 0; s < slices; s++) {
        const int64_t *outputs = order.data() + s * LANES, length = lengths[s];
        const int32_t *first = columns + row_ends[outputs[0]];
        for (int lane = 0; lane < LANES; lane++) {
            const int64_t o = outputs[lane], begin = o < 0 ? 0 : row_ends[o], count = o < 0 ? 0 : row_ends[o + 1] - begin;
            for (int64_t k = 0; k < length; k++) {
                columns_KC[k * LANES + lane] = k < count ? columns[begin + k] : first[k];
                values_KC[k * LANES + lane] = k < count ? values[begin + k] : 0;
            }
        }
        columns_KC += length * LANES;
        values_KC += length * LANES;
    }
}
PLAYED(timbre_slice_entries)
