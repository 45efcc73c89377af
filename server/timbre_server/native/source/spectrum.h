// The transforms of spectral adapters, of rows side by side in a register: half spectra (`fourier.h`), turned by phases
// where there are any, and wavelets.
#pragma once

#include <algorithm>

#include "fourier.h"

// Rows with equal values share them; others have theirs side by side.
struct SpectralRows {
    int64_t rows[MOST_ROWS];  // Of each lane; -1: there is none.
    int64_t count;  // Of lanes.
};

// Of rows of `length` numbers, to as many coordinates and back.
struct SpectralTransform {
    int64_t length, coordinates;
    const FourierPlan *plan;  // Null: of wavelets.
    const float *phases;  // [coordinates / 2, 2], what each number of a half spectrum is turned by; or null.
    const int32_t *places;  // [length], of each number of a row, where the plan reads and leaves it; or null: there.
    const float *forward, *back;  // [taps, 2], of wavelets.
    int64_t taps;
};

template <typename V, typename Number>
static void put_rows_side_by_side(
    const SpectralTransform &own, const Number *x, const SpectralRows &rows, float *lanes
) {
    const Number *from[MOST_ROWS];
    for (int64_t n = 0; n < rows.count; n++) from[n] = x + std::max(rows.rows[n], int64_t(0)) * own.length;
    put_side_by_side<V>(from, rows.count, own.length, lanes, own.places);
}

template <int SIGN, typename V> static void turn(const SpectralTransform &transform, Complex<V> *X) {
    const float *phases = transform.phases;
    if (!phases) return;
    for (int64_t k = 0; k < transform.coordinates / 2; k++) X[k] = rooted<SIGN>(X[k], phases, k);
}

// Windows of numbers, each two further on than the last: two sums of each.
template <typename V>
static void sums_of_windows(const V *numbers, const float *filters, int64_t taps, int64_t windows, V *sums) {
    for (int64_t w = 0; w < windows; w++) {
        V first = {}, second = {};
        for (int64_t j = 0; j < taps; j++) {
            const V &number = numbers[2 * w + j];
            first += number * filters[2 * j], second += number * filters[2 * j + 1];
        }
        sums[2 * w] = first, sums[2 * w + 1] = second;
    }
}

// Floats of scratch for a register's side.
static inline int64_t scratch_size(const SpectralTransform &own) { return 2 * (own.coordinates + own.length + own.taps); }

// X [coordinates], of half spectra twice, of the rows of x.
template <typename V, typename Number>
static void transformed(const SpectralTransform &own, const Number *x, const SpectralRows &rows, V *X, float *scratch) {
    if (own.plan) {
        put_rows_side_by_side<V>(own, x, rows, scratch);
        Complex<V> *packed = reinterpret_cast<Complex<V> *>(scratch), *spectrum = reinterpret_cast<Complex<V> *>(X);
        spectra(*own.plan, packed, packed + own.plan->m, spectrum);
        return turn<-1>(own, spectrum);
    }
    const int64_t before = own.taps - 2, after = own.coordinates - own.length;
    V *numbers = reinterpret_cast<V *>(scratch);
    std::fill(numbers, numbers + before, V{});
    put_rows_side_by_side<V>(own, x, rows, scratch + before * SIDE<V>);
    std::fill(numbers + before + own.length, numbers + before + own.length + after, V{});
    sums_of_windows(numbers, own.forward, own.taps, own.coordinates / 2, X);
}

// What is made of h [coordinates], which is lost, is added to y; of half spectra times their length.
template <typename V>
static void add_transformed_back(const SpectralTransform &own, V *h, const SpectralRows &rows, float *y, float *scratch) {
    const V *numbers;
    if (own.plan) {
        Complex<V> *spectrum = reinterpret_cast<Complex<V> *>(h);
        turn<1>(own, spectrum);
        numbers = rows_of_spectra(*own.plan, spectrum, reinterpret_cast<Complex<V> *>(scratch));
    } else {
        V *sums = reinterpret_cast<V *>(scratch);
        sums_of_windows(h, own.back, own.taps, (own.length + 1) / 2, sums);
        numbers = sums;
    }
    float *to[MOST_ROWS];
    for (int64_t n = 0; n < rows.count; n++) to[n] = rows.rows[n] < 0 ? nullptr : y + rows.rows[n] * own.length;
    add_to_rows<V>(reinterpret_cast<const float *>(numbers), to, rows.count, own.length, own.places);
}
