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

#ifdef __clang__
template <typename Order>
static inline Lanes picked(Lanes x, Lanes y, Order order) {
    Lanes found;
    for (int i = 0; i < LANES; i++) found[i] = order[i] < LANES ? x[order[i]] : y[order[i] - LANES];
    return found;
}
#else
// A macro, because its order must be a constant to the compiler.
#define picked(x, y, order) __builtin_shuffle(x, y, order)
#endif

// The sums of eight vectors as one.
static inline Lanes sums_of(const Lanes p[LANES]) {
    const Integers even = {0, 8, 2, 10, 4, 12, 6, 14}, odd = {1, 9, 3, 11, 5, 13, 7, 15};
    const Integers low = {0, 1, 8, 9, 4, 5, 12, 13}, high = {2, 3, 10, 11, 6, 7, 14, 15};
    const Integers left = {0, 1, 2, 3, 8, 9, 10, 11}, right = {4, 5, 6, 7, 12, 13, 14, 15};
    Lanes pairs[4], fours[2];
    for (int i = 0; i < 4; i++)
        pairs[i] = picked(p[2 * i], p[2 * i + 1], even) + picked(p[2 * i], p[2 * i + 1], odd);
    for (int i = 0; i < 2; i++)
        fours[i] = picked(pairs[2 * i], pairs[2 * i + 1], low) + picked(pairs[2 * i], pairs[2 * i + 1], high);
    return picked(fours[0], fours[1], left) + picked(fours[0], fours[1], right);
}

// Eight vectors as the rows of a matrix become its columns.
static inline void transpose(Lanes p[LANES]) {
    const Integers low = {0, 8, 1, 9, 4, 12, 5, 13}, high = {2, 10, 3, 11, 6, 14, 7, 15};
    const Integers first = {0, 1, 8, 9, 4, 5, 12, 13}, second = {2, 3, 10, 11, 6, 7, 14, 15};
    const Integers left = {0, 1, 2, 3, 8, 9, 10, 11}, right = {4, 5, 6, 7, 12, 13, 14, 15};
    Lanes pairs[LANES], fours[LANES];
    for (int i = 0; i < LANES; i += 2) {
        pairs[i] = picked(p[i], p[i + 1], low);
        pairs[i + 1] = picked(p[i], p[i + 1], high);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = picked(pairs[i + j], pairs[i + j + 2], first);
            fours[i + 2 * j + 1] = picked(pairs[i + j], pairs[i + j + 2], second);
        }
    for (int i = 0; i < 4; i++) {
        p[i] = picked(fours[i], fours[i + 4], left);
        p[i + 4] = picked(fours[i], fours[i + 4], right);
    }
}

// lanes [in, LANES]: up to eight rows of x side by side, zeros where there is none.
static void side_by_side(const float *x, int64_t in, const int64_t *rows, int64_t count, float *lanes) {
    int64_t i = 0;
    for (; i + LANES <= in; i += LANES) {
        Lanes block[LANES] = {};
        for (int64_t n = 0; n < count; n++) block[n] = load(x + rows[n] * in + i);
        transpose(block);
        for (int j = 0; j < LANES; j++) store(lanes + (i + j) * LANES, block[j]);
    }
    for (; i < in; i++)
        for (int n = 0; n < LANES; n++) lanes[i * LANES + n] = n < count ? x[rows[n] * in + i] : 0;
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
