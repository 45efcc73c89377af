// y = x sigmoid(slope x + bend x^3), times a factor where there is one.
//
// In float32 whatever the numbers' type, and rounded once.
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
template <typename Number> static inline void activate(const Number *x, const Number *factor, Curve curve, Number *y) {
    const Lanes found = activated(load(x), curve);
    store(y, factor == nullptr ? found : found * load(factor));
}

template <typename Number>
static void activate_all(const Number *x, const Number *factor, Curve curve, Number *y, Share own) {
    int64_t i = own.begin;
    for (; i + LANES <= own.end; i += LANES) activate(x + i, factor == nullptr ? factor : factor + i, curve, y + i);
    Number numbers[LANES] = {}, factors[LANES] = {};
    std::copy(x + i, x + own.end, numbers);
    if (factor != nullptr) std::copy(factor + i, factor + own.end, factors);
    activate(numbers, factor == nullptr ? factor : factors, curve, numbers);
    std::copy(numbers, numbers + (own.end - i), y + i);
}

// All are contiguous; factor may be null, and y may be x.
#define ACTIVATION(NAME, NUMBER)                                                                             \
    extern "C" void NAME(                                                                                    \
        const NUMBER *x, const NUMBER *factor, float slope, float bend, NUMBER *y, int64_t count, int threads \
    ) {                                                                                                      \
        _Pragma("omp parallel num_threads(threads) if (threads > 1)")                                        \
        activate_all(x, factor, {slope, bend}, y, share(count, thread_number(), thread_count(), LANES));     \
    }

ACTIVATION(timbre_activation_float32, float)
ACTIVATION(timbre_activation_bfloat16, BFloat16)
