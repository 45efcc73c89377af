// Eight floats at once, by the compiler's vector types: one source for every processor.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

typedef float Lanes __attribute__((vector_size(32)));
typedef int32_t Integers __attribute__((vector_size(32)));
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

// The sums of eight vectors as one.
static inline Lanes sums_of(const Lanes p[LANES]) {
    const Integers even = {0, 8, 2, 10, 4, 12, 6, 14}, odd = {1, 9, 3, 11, 5, 13, 7, 15};
    const Integers low = {0, 1, 8, 9, 4, 5, 12, 13}, high = {2, 3, 10, 11, 6, 7, 14, 15};
    const Integers left = {0, 1, 2, 3, 8, 9, 10, 11}, right = {4, 5, 6, 7, 12, 13, 14, 15};
#ifdef __clang__
#define PICK(x, y, order) pick(x, y, order)
    auto pick = [](Lanes x, Lanes y, Integers order) {
        Lanes picked;
        for (int i = 0; i < LANES; i++) picked[i] = order[i] < LANES ? x[order[i]] : y[order[i] - LANES];
        return picked;
    };
#else
#define PICK(x, y, order) __builtin_shuffle(x, y, order)
#endif
    Lanes pairs[4], fours[2];
    for (int i = 0; i < 4; i++)
        pairs[i] = PICK(p[2 * i], p[2 * i + 1], even) + PICK(p[2 * i], p[2 * i + 1], odd);
    for (int i = 0; i < 2; i++)
        fours[i] = PICK(pairs[2 * i], pairs[2 * i + 1], low) + PICK(pairs[2 * i], pairs[2 * i + 1], high);
    return PICK(fours[0], fours[1], left) + PICK(fours[0], fours[1], right);
#undef PICK
}

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
