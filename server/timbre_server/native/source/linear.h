// Products of rows with a weight in panels, for kernels that make rows of their own.
#pragma once

#include <cstdint>

extern "C" void timbre_linear(
    const void *x, int64_t x_format, int64_t rows, int64_t in, const void *panels, int64_t format,
    const float *bias, void *y, int64_t y_format, int64_t out, int threads
);
