// y[row] = weight x[row] / sqrt(mean(x[row]^2) + epsilon).
//
// In float32 whatever the numbers' type, and rounded once. A row's result follows from that row alone.
#include <cmath>

#include "lanes.h"

constexpr int SUMS = 4;  // Sums at once: no addition waits for the last.

static float mean_square(const float *x, int64_t features) {
    Lanes sums[SUMS] = {};
    int64_t d = 0;
    for (; d + SUMS * LANES <= features; d += SUMS * LANES)
        for (int j = 0; j < SUMS; j++) {
            const Lanes own = load(x + d + j * LANES);
            sums[j] += own * own;
        }
    float rest = 0;
    for (; d < features; d++) rest += x[d] * x[d];
    return (sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest) / features;
}

template <class Number>
static void normalise(
    const Number *x, const Number *weight, float epsilon, Number *y, int64_t rows, int64_t features, int threads
) {
    threads = threads_for(rows * features, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        thread_local Scratch memory;
        float *scratch = memory.of(2 * features);
        const float *weights = floats(weight, features, scratch);
        const Share own = share(rows, thread_number(), thread_count(), 1);
        for (int64_t row = own.begin; row < own.end; row++) {
            const float *from = floats(x + row * features, features, scratch + features);
            const float factor = 1 / std::sqrt(mean_square(from, features) + epsilon);
            Number *to = y + row * features;
            int64_t d = 0;
            for (; d + LANES <= features; d += LANES) store(to + d, load(from + d) * factor * load(weights + d));
            for (; d < features; d++) put(from[d] * factor * weights[d], to + d);
        }
    }
}

// x and y [rows, features] are contiguous, and apart.
#define NORM(NAME, NUMBER)                                                                                   \
    extern "C" void NAME(                                                                                    \
        const NUMBER *x, const NUMBER *weight, float epsilon, NUMBER *y, int64_t rows, int64_t features,     \
        int threads                                                                                          \
    ) {                                                                                                      \
        normalise(x, weight, epsilon, y, rows, features, threads);                                           \
    }                                                                                                        \
    PLAYED(NAME)

NORM(timbre_norm_float32, float)
NORM(timbre_norm_bfloat16, BFloat16)
