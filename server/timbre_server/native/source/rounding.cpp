// y = x, rounded.
#include "wide.h"

extern "C" void timbre_rounded(const float *x, BFloat16 *y, int64_t count, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Share own = share(count, thread_number(), thread_count(), WIDTH);
        int64_t i = own.begin;
        for (; i + WIDTH <= own.end; i += WIDTH) put(wide(x + i), y + i);
        for (; i < own.end; i++) put(x[i], y + i);
    }
}
