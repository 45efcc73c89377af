// y = a + b, rounded once.
#include "wide.h"

template <typename Number>
static void add_all(const Number *a, const Number *b, Number *y, int64_t count, int threads) {
    threads = threads_for(count, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Share own = share(count, thread_number(), thread_count(), WIDTH);
        int64_t i = own.begin;
        for (; i + WIDTH <= own.end; i += WIDTH) {
            Wide first, second;
            get(first, a + i);
            get(second, b + i);
            put(first + second, y + i);
        }
        for (; i < own.end; i++) put(value(a[i]) + value(b[i]), y + i);
    }
}

#define SUM(NAME, NUMBER)                                                                                    \
    extern "C" void NAME(const NUMBER *a, const NUMBER *b, NUMBER *y, int64_t count, int threads) {          \
        add_all(a, b, y, count, threads);                                                                    \
    }                                                                                                        \
    PLAYED(NAME)

SUM(timbre_sum_float32, float)
SUM(timbre_sum_bfloat16, BFloat16)
