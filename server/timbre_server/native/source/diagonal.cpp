// y[row] += extra_gain x[row] + shift, for rows with gains of their own. x may be y.
#include "lanes.h"

struct Gains {
    int64_t row;
    const float *extra;  // [features]
    const float *shift;  // [features]; null: there is none.
};

// x and y [T, features] are contiguous.
extern "C" void timbre_diagonal(
    const Gains *gains, int64_t count, const float *x, float *y, int64_t features, int threads
) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t n = 0; n < count; n++) {
        const Gains &own = gains[n];
        const float *from = x + own.row * features;
        float *to = y + own.row * features;
        if (own.shift == nullptr)
            for (int64_t d = 0; d < features; d++) to[d] += own.extra[d] * from[d];
        else
            for (int64_t d = 0; d < features; d++) to[d] += own.extra[d] * from[d] + own.shift[d];
    }
}
