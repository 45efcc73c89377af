// y = x, in another format, which bfloat16 is rounded to, or in the same.
#include "wide.h"

template <typename From, typename To> static void convert(const From *x, To *y, int64_t count, int threads) {
    threads = threads_for(count, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Share own = share(count, thread_number(), thread_count(), WIDTH);
        int64_t i = own.begin;
        for (; i + WIDTH <= own.end; i += WIDTH) {
            Wide numbers;
            get(numbers, x + i);
            put(numbers, y + i);
        }
        for (; i < own.end; i++) put(value(x[i]), y + i);
    }
}

extern "C" void timbre_rounded(const float *x, BFloat16 *y, int64_t count, int threads) { convert(x, y, count, threads); }
PLAYED(timbre_rounded)

extern "C" void timbre_widened(const BFloat16 *x, float *y, int64_t count, int threads) { convert(x, y, count, threads); }
PLAYED(timbre_widened)

extern "C" void timbre_copied(const float *x, float *y, int64_t count, int threads) { convert(x, y, count, threads); }
PLAYED(timbre_copied)
