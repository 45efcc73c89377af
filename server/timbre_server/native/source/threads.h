// Who computes what.
#pragma once

#include <cstdint>

// The share of `size` things that one of `count` threads has, in whole steps of `step`.
struct Share {
    int64_t begin, end;
};

static inline Share share(int64_t size, int thread, int count, int64_t step) {
    const int64_t steps = (size + step - 1) / step;
    const int64_t begin = steps * thread / count * step, end = steps * (thread + 1) / count * step;
    return {begin < size ? begin : size, end < size ? end : size};
}

extern "C" int64_t timbre_least_work;  // Multiplications below which waking other threads costs more than they do.

// Of `most`, those that are worth waking for so many multiplications.
static inline int threads_for(int64_t work, int most) { return work < timbre_least_work ? 1 : most; }

#ifdef _OPENMP
#include <omp.h>
static inline int thread_number() { return omp_get_thread_num(); }
static inline int thread_count() { return omp_get_num_threads(); }
#else
static inline int thread_number() { return 0; }
static inline int thread_count() { return 1; }
#endif
