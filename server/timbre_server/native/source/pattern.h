// Which coefficients of a spectral adapter add what of one spectrum to which sum of another.
#pragma once

#include <cstdint>

// A coefficient: value times what is at `column`, a frequency or a coordinate, is added to what it belongs to. The
// factor is of a frequency's imaginary part alone, or of a coordinate.
struct SpectralEntry {
    int32_t column;
    int32_t source;  // Among the values of rows that share them, or of one.
    float factor;
};

// The sum of the next `count` entries, times `scale`, which holds what transforms leave out.
struct SpectralSum {
    int32_t row, count;
    float scale;
};

// In order of their counts: a processor foresees the end of a loop that was as long the last time.
struct SpectralPattern {
    const SpectralSum *sums;  // One for each frequency, or coordinate.
    int64_t count;
    const SpectralEntry *entries;
    int64_t is_complex;  // Of frequencies.
};
