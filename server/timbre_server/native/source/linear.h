// Products of rows with a weight in panels, for kernels that make rows of their own, or add to what comes of them.
#pragma once

#include <memory>

#include "wide.h"

constexpr int PANEL_VECTORS = 2;
constexpr int PANEL = PANEL_VECTORS * WIDTH;  // Outputs that lie together.

// What one thread adds to the sums of up to MOST_TILED rows from `row` on, and PANEL outputs from `first` on, in tiles.
struct TiledAddend {
    virtual void add(int64_t row, int count, int64_t first) = 0;
    virtual ~TiledAddend() = default;
};

// What is added to sums before they are rounded.
struct Addend {
    // Where the matrix unit multiplies, before all else; null: nothing.
    virtual std::unique_ptr<TiledAddend> tiled() const { return nullptr; }

    // To sums [count, PANEL] of rows from `row` on, with outputs from `first` on, of which there may be fewer.
    virtual void add(int64_t row, int64_t count, int64_t first, float *sums) const = 0;
};

// Rows x, a weight in panels, and what they make. The weights are float32 or bfloat16: [out / PANEL rounded up] panels
// of `in` rounded up to whole pairs, and those of bfloat16 to pairs that lie together, with zeros beyond the last output
// and input. Rows of bfloat16 have weights of bfloat16.
struct Linear {
    Numbers x;  // [rows, in]
    int64_t rows, in;
    Numbers panels;
    const float *bias;  // [out], or null
    void *y;  // [rows, out]
    int64_t y_format;
    int64_t out;
    const Addend *addend;  // Or null.
};

// The outputs of one of so many threads.
void multiply_linear(const Linear &linear, int thread, int threads);

extern "C" void timbre_linear(
    const void *x, int64_t x_format, int64_t rows, int64_t in, const void *panels, int64_t format,
    const float *bias, void *y, int64_t y_format, int64_t out, int threads
);
