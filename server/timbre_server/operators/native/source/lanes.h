// Eight floats at once, by the compiler's vector types: one source for every processor.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

typedef float Lanes __attribute__((vector_size(32)));
constexpr int LANES = 8;

static inline Lanes load(const float *from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

static inline void store(float *to, Lanes lanes) { std::memcpy(to, &lanes, sizeof lanes); }

static inline Lanes all(float value) {
    return Lanes{value, value, value, value, value, value, value, value};
}

static inline float sum(Lanes v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// All rows of a batch that use one adapter, each once, with their weights.
struct Rows {
    const int64_t *rows;
    const float *weights;
    int64_t count;
};

// The share of `size` things that one of `count` threads has, in whole steps of `step`.
struct Share {
    int64_t begin, end;
};

static inline Share share(int64_t size, int thread, int count, int64_t step) {
    const int64_t steps = (size + step - 1) / step;
    const int64_t begin = steps * thread / count * step, end = steps * (thread + 1) / count * step;
    return {begin < size ? begin : size, end < size ? end : size};
}

#ifdef _OPENMP
#include <omp.h>
static inline int thread_number() { return omp_get_thread_num(); }
static inline int thread_count() { return omp_get_num_threads(); }
#else
static inline int thread_number() { return 0; }
static inline int thread_count() { return 1; }
#endif
