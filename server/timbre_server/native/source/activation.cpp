// y = x sigmoid(slope x + bend x^3), times a factor where there is one.
//
// In float32 whatever the numbers' type, and rounded once.
#include <algorithm>

#include "wide.h"

struct Curve {
    float slope, bend;
};

static inline Wide activated(Wide x, Curve curve) {
    const Wide bent = curve.bend == 0 ? Wide{} : x * curve.bend * x;  // Of infinity times zero there is no number.
    const Wide at = x * (bent + curve.slope);
    const Wide below = exponential((Wide)((WideBits)at | 0x80000000));  // e^-|at|
    return x * (at < 0 ? (at < -87 ? Wide{} : below) : Wide{} + 1.0f) / (below + 1.0f);
}

// WIDTH numbers.
template <typename Number> static inline void activate(const Number *x, const Number *factor, Curve curve, Number *y) {
    Wide numbers, factors;
    get(numbers, x);
    Wide found = activated(numbers, curve);
    if (factor != nullptr) {
        get(factors, factor);
        found *= factors;
    }
    put(found, y);
}

template <typename Number>
static void activate_all(const Number *x, const Number *factor, Curve curve, Number *y, Share own) {
    int64_t i = own.begin;
    for (; i + WIDTH <= own.end; i += WIDTH) activate(x + i, factor == nullptr ? factor : factor + i, curve, y + i);
    Number numbers[WIDTH] = {}, factors[WIDTH] = {};
    std::copy(x + i, x + own.end, numbers);
    if (factor != nullptr) std::copy(factor + i, factor + own.end, factors);
    activate(numbers, factor == nullptr ? factor : factors, curve, numbers);
    std::copy(numbers, numbers + (own.end - i), y + i);
}

constexpr int64_t WORK = 8;  // Multiplications that one number takes as long as.

template <typename Number>
static void activate_all(
    const Number *x, const Number *factor, Curve curve, Number *y, int64_t count, int threads
) {
    threads = threads_for(WORK * count, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    activate_all(x, factor, curve, y, share(count, thread_number(), thread_count(), WIDTH));
}

// All are contiguous; factor may be null, and y may be x.
#define ACTIVATION(NAME, NUMBER)                                                                             \
    extern "C" void NAME(                                                                                    \
        const NUMBER *x, const NUMBER *factor, float slope, float bend, NUMBER *y, int64_t count, int threads \
    ) {                                                                                                      \
        activate_all(x, factor, {slope, bend}, y, count, threads);                                           \
    }                                                                                                        \
    PLAYED(NAME)

ACTIVATION(timbre_activation_float32, float)
ACTIVATION(timbre_activation_bfloat16, BFloat16)
