// y = x sigmoid(slope x + bend x^3), times a factor where there is one.
#include <algorithm>

#include "lanes.h"

struct Curve {
    float slope, bend;
};

static inline Lanes activated(Lanes x, Curve curve) {
    const Lanes at = x * (x * curve.bend * x + curve.slope);
    const Lanes below = exponential((Lanes)((Bits)at | 0x80000000));  // e^-|at|
    return x * (at < 0 ? below : all(1.0f)) / (below + 1.0f);
}

// LANES numbers.
static inline void activate(const float *x, const float *factor, Curve curve, float *y) {
    const Lanes found = activated(load(x), curve);
    store(y, factor == nullptr ? found : found * load(factor));
}

static void activate_all(const float *x, const float *factor, Curve curve, float *y, Share own) {
    int64_t i = own.begin;
    for (; i + LANES <= own.end; i += LANES) activate(x + i, factor == nullptr ? factor : factor + i, curve, y + i);
    float numbers[LANES] = {}, factors[LANES] = {};
    std::copy(x + i, x + own.end, numbers);
    if (factor != nullptr) std::copy(factor + i, factor + own.end, factors);
    activate(numbers, factor == nullptr ? factor : factors, curve, numbers);
    std::copy(numbers, numbers + (own.end - i), y + i);
}

// All are contiguous; factor may be null, and y may be x.
extern "C" void timbre_activation(
    const float *x, const float *factor, float slope, float bend, float *y, int64_t count, int threads
) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    activate_all(x, factor, {slope, bend}, y, share(count, thread_number(), thread_count(), LANES));
}
