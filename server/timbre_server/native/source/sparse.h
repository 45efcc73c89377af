// Sparse matrices in slices (sliced ELLPACK) of eight outputs, and what other sources call for them.
#pragma once

#include "lanes.h"

struct Slices {
    const uint16_t *ranks;  // [out], of each output among all slices' outputs
    const uint16_t *lengths;  // [slices], in steps
    const uint16_t *columns;  // [steps of all slices, LANES]
    Numbers values;  // like columns
};

// y[row] += weight S x[row]. x [rows, in] and y [rows, out] are contiguous; x is of float32 or of bfloat16.
extern "C" void timbre_sparse(
    const Uses<Slices> *uses, const void *x, int64_t format, int64_t rows, int64_t in, float *y, int64_t out, int threads
);
