// Rotary positions, in place: of each head's halves a and b,  a cos - b sin  and  b cos + a sin.
#include "lanes.h"

static void rotate(
    float *__restrict x, const float *__restrict cos, const float *__restrict sin, int64_t heads, int64_t dim
) {
    const int64_t half = dim / 2;
    for (int64_t h = 0; h < heads; h++, x += dim)
        for (int64_t d = 0; d < half; d++) {
            const float a = x[d], b = x[half + d];
            x[d] = a * cos[d] - b * sin[d];
            x[half + d] = b * cos[half + d] + a * sin[half + d];
        }
}

// q [rows, heads, dim], k [rows, kv_heads, dim], cos and sin [rows, dim] are contiguous.
extern "C" void timbre_rotary(
    float *q, int64_t heads, float *k, int64_t kv_heads, const float *cos, const float *sin, int64_t rows,
    int64_t dim, int threads
) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        rotate(q + row * heads * dim, cos + row * dim, sin + row * dim, heads, dim);
        rotate(k + row * kv_heads * dim, cos + row * dim, sin + row * dim, kv_heads, dim);
    }
}
