// Rotary positions, in place: of each head's halves a and b,  a cos - b sin  and  b cos + a sin.
//
// In float32 whatever the numbers' type, and rounded once.
#include "wide.h"

// One pair of numbers, or of lanes of them.
template <typename Of> static inline void turn(Of &a, Of &b, Of cos_a, Of sin_a, Of cos_b, Of sin_b) {
    const Of turned = a * cos_a - b * sin_a;
    b = b * cos_b + a * sin_b;
    a = turned;
}

template <typename Number>
static void rotate(Number *x, const Number *cos, const Number *sin, int64_t heads, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t h = 0; h < heads; h++, x += dim) {
        int64_t d = 0;
        for (; d + WIDTH <= half; d += WIDTH) {
            Wide a, b, cos_a, sin_a, cos_b, sin_b;
            get(a, x + d), get(b, x + half + d);
            get(cos_a, cos + d), get(sin_a, sin + d), get(cos_b, cos + half + d), get(sin_b, sin + half + d);
            turn(a, b, cos_a, sin_a, cos_b, sin_b);
            put(a, x + d), put(b, x + half + d);
        }
        for (; d < half; d++) {
            float a = value(x[d]), b = value(x[half + d]);
            turn(a, b, value(cos[d]), value(sin[d]), value(cos[half + d]), value(sin[half + d]));
            put(a, x + d), put(b, x + half + d);
        }
    }
}

// q [rows, heads, dim], k [rows, kv_heads, dim], cos and sin [rows, dim] are contiguous.
template <typename Number>
static void rotate_all(
    Number *q, int64_t heads, Number *k, int64_t kv_heads, const Number *cos, const Number *sin, int64_t rows,
    int64_t dim, int threads
) {
    threads = threads_for(rows * heads * dim, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        rotate(q + row * heads * dim, cos + row * dim, sin + row * dim, heads, dim);
        rotate(k + row * kv_heads * dim, cos + row * dim, sin + row * dim, kv_heads, dim);
    }
}

#define ROTARY(NAME, NUMBER)                                                                                 \
    extern "C" void NAME(                                                                                    \
        NUMBER *q, int64_t heads, NUMBER *k, int64_t kv_heads, const NUMBER *cos, const NUMBER *sin,         \
        int64_t rows, int64_t dim, int threads                                                               \
    ) {                                                                                                      \
        rotate_all(q, heads, k, kv_heads, cos, sin, rows, dim, threads);                                     \
    }                                                                                                        \
    PLAYED(NAME)

ROTARY(timbre_rotary_float32, float)
ROTARY(timbre_rotary_bfloat16, BFloat16)
