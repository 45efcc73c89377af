// Copies of adapters' factors in bfloat16, with what says whether their values come back: made at a load, in a few
// hundred layers.
#include <algorithm>

#include "lanes.h"
#include "played.h"

// What is known of the numbers that were rounded, in each lane.
struct Seen {
    Bits any = {};  // Every bit that one of them has.
    Bits largest = {};  // Of their bits without the sign, which are in order of size.

    void add(Lanes numbers) {
        const Bits bits = (Bits)numbers, size = bits & 0x7fffffff;
        any |= bits;
        largest = size > largest ? size : largest;
    }
};

static void round_number(const float *x, BFloat16 *y, Seen &seen) {
    seen.add(Lanes{*x});
    put(*x, y);
}

static void round_row(const float *x, int64_t count, BFloat16 *y, Seen &seen) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const Lanes numbers = load(x + i);
        seen.add(numbers);
        store(y + i, numbers);
    }
    for (; i < count; i++) round_number(x + i, y + i, seen);
}

// Eight rows of y, `y_step` apart, of eight columns in each of which x lies side by side.
static void round_columns(const float *x, int64_t x_step, BFloat16 *y, int64_t y_step, Seen &seen) {
    Lanes block[LANES];
    for (int n = 0; n < LANES; n++) {
        block[n] = load(x + n * x_step);
        seen.add(block[n]);
    }
    transpose(block);
    for (int n = 0; n < LANES; n++) store(y + n * y_step, block[n]);
}

// y [rows, columns] = x, whose rows lie `row_step` and whose columns `column_step` floats apart, rounded to the
// nearest. `any` and `largest`: as of `Seen`, of these numbers and what they were.
extern "C" void timbre_narrowed(
    const float *x, int64_t rows, int64_t columns, int64_t row_step, int64_t column_step, BFloat16 *y, int64_t *any,
    int64_t *largest, int
) {
    Seen seen;
    const int64_t in_blocks = row_step == 1 ? columns / LANES * LANES : 0;
    int64_t r = 0;
    for (; r + LANES <= rows && in_blocks > 0; r += LANES) {
        for (int64_t c = 0; c < in_blocks; c += LANES)
            round_columns(x + c * column_step + r, column_step, y + r * columns + c, columns, seen);
        for (int64_t n = r; n < r + LANES; n++)
            for (int64_t c = in_blocks; c < columns; c++)
                round_number(x + n + c * column_step, y + n * columns + c, seen);
    }
    for (; r < rows; r++) {
        if (column_step == 1)
            round_row(x + r * row_step, columns, y + r * columns, seen);
        else
            for (int64_t c = 0; c < columns; c++)
                round_number(x + r * row_step + c * column_step, y + r * columns + c, seen);
    }
    for (int lane = 0; lane < LANES; lane++) {
        *any |= seen.any[lane];
        *largest = std::max(*largest, int64_t(seen.largest[lane]));
    }
}
PLAYED(timbre_narrowed)
