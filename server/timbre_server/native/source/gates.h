// What routers write and experts read.
#pragma once

#include "lanes.h"

// Of an adapter's rows at a group of layers, in their order.
struct Gates {
    float *values;  // [rows, columns]
    int64_t columns;
    int64_t *acted;  // Of each number of an expert, on how many rows any did; or null.
};
