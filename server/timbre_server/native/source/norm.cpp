// y[row] = weight x[row] / sqrt(mean(x[row]^2) + epsilon).
//
// In float32 whatever the numbers' type, and rounded once. A row's result follows from that row alone.
#include <cmath>

#include "wide.h"

constexpr int SUMS = 4;  // Sums at once: no addition waits for the last.

template <class Number> static Wide wide_of(const Number *from) {
    Wide numbers;
    get(numbers, from);
    return numbers;
}

template <class Number> static float mean_square(const Number *x, int64_t features) {
    Wide sums[SUMS] = {};
    int64_t d = 0;
    for (; d + SUMS * WIDTH <= features; d += SUMS * WIDTH)
        for (int j = 0; j < SUMS; j++) {
            const Wide own = wide_of(x + d + j * WIDTH);
            add_product(sums[j], own, own);
        }
    for (; d + WIDTH <= features; d += WIDTH) add_product(sums[0], wide_of(x + d), wide_of(x + d));
    float rest = 0;
    for (; d < features; d++) rest += value(x[d]) * value(x[d]);
    return (sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest) / features;
}

template <class Number>
static void normalise(
    const Number *x, const Number *weight, float epsilon, Number *y, int64_t rows, int64_t features, int threads
) {
    threads = threads_for(rows * features, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Share own = share(rows, thread_number(), thread_count(), 1);
        for (int64_t row = own.begin; row < own.end; row++) {
            const Number *from = x + row * features;
            Number *to = y + row * features;
            const float factor = 1 / std::sqrt(mean_square(from, features) + epsilon);
            int64_t d = 0;
            for (; d + WIDTH <= features; d += WIDTH) put(wide_of(from + d) * factor * wide_of(weight + d), to + d);
            for (; d < features; d++) put(value(from[d]) * factor * value(weight[d]), to + d);
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
