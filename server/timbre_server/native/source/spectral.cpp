// y[row] += irfft(S rfft(x[row])), for rows with values of their own in one sparse pattern of S.
//
// Rows lie side by side in every step, in the narrowest register that has room for a group of them; S is real
// between the parts of half spectra.
#include <algorithm>
#include <utility>

#include "fourier.h"

constexpr int MOST_ROWS = 16;
constexpr int64_t AHEAD = 64;  // Entries' values that are on their way from memory.

// Rows with equal values share them; others have theirs side by side.
struct SpectralRows {
    int64_t rows[MOST_ROWS];  // Of each lane; -1: there is none.
    int64_t count;  // Of lanes.
};

struct SpectralCore {
    const float *values;  // [N] of all rows, or side by side in the order of entries; null: nothing is added.
    int64_t is_shared;
};

// A coefficient: value times the frequency `column` is added to the one that it belongs to, the imaginary part with a
// sign of its own.
struct SpectralEntry {
    int32_t column;
    int32_t source;  // Among the values of rows that share them.
    float sign;
};

// The sum of the next `count` entries, times `scale`, which holds what transforms leave out.
struct SpectralFrequency {
    int32_t row, count;
    float scale;
};

// In order of their counts: a processor foresees the end of a loop that was as long the last time.
struct SpectralPattern {
    const SpectralFrequency *frequencies;  // All of them.
    int64_t count;
    const SpectralEntry *entries;
    int64_t in_count;  // Frequencies that entries read.
};

struct SpectralSource {
    const FourierPlan *plan;
    const SpectralRows *groups;
    int64_t count;
    int64_t is_small;  // Too little for more than one thread.
};

struct SpectralMember {
    const FourierPlan *plan;
    const SpectralPattern *pattern;
    const SpectralRows *groups;
    const SpectralCore *cores;
    int64_t count;
    int64_t is_small;
};

// How many rows of a group lie side by side in one register.
extern "C" int timbre_spectral_rows() { return WIDTH; }

template <typename V> constexpr int64_t SIDE = sizeof(V) / sizeof(float);  // Rows side by side.

// Visits with a register of the width for so many rows.
template <typename Visit> static inline void in_registers(int64_t count, Visit visit) {
    if (count > LANES) visit(Wide{});
    else visit(Lanes{});
}

// lanes [in, side]; where there is no row, what nobody reads.
template <typename V, typename Number>
static void put_side_by_side(const Number *x, int64_t in, const SpectralRows &own, float *lanes) {
    const Number *from[MOST_ROWS];
    for (int64_t n = 0; n < own.count; n++) from[n] = x + std::max(own.rows[n], int64_t(0)) * in;
    int64_t i = 0;
    for (; i + LANES <= in; i += LANES)
        for (int64_t first = 0; first < SIDE<V>; first += LANES) {
            Lanes block[LANES] = {};
            if (own.count - first >= LANES)
                for (int n = 0; n < LANES; n++) block[n] = load(from[first + n] + i);
            else
                for (int n = 0; first + n < own.count; n++) block[n] = load(from[first + n] + i);
            transpose(block);
            for (int j = 0; j < LANES; j++) store(lanes + (i + j) * SIDE<V> + first, block[j]);
        }
    for (; i < in; i++)
        for (int64_t n = 0; n < SIDE<V>; n++) lanes[i * SIDE<V> + n] = n < own.count ? value(from[n][i]) : 0;
}

template <typename Number>
static void spectra_of(const SpectralSource &source, const Number *x, float *z, int threads) {
    const FourierPlan &plan = *source.plan;
    const int64_t m = plan.m;
#pragma omp parallel num_threads(threads) if (threads > 1 && !source.is_small)
    {
        thread_local Scratch memory;  // Kept: fresh pages cost more than what is written to them.
        const auto transform = [&](const SpectralRows &own, float *X, auto lanes) {
            typedef decltype(lanes) V;
            float *numbers = memory.of(4 * m * SIDE<V>);
            put_side_by_side<V>(x, 2 * m, own, numbers);
            Complex<V> *packed = reinterpret_cast<Complex<V> *>(numbers);
            spectra(plan, packed, packed + m, reinterpret_cast<Complex<V> *>(X));
        };
#pragma omp for schedule(static)
        for (int64_t g = 0; g < source.count; g++) {
            float *X = z + g * 2 * (m + 1) * WIDTH;
            in_registers(source.groups[g].count, [&](auto lanes) { transform(source.groups[g], X, lanes); });
        }
    }
}

// z [count, 2 (m + 1), most rows]: the half spectra of x's rows, twice. x is of bfloat16 or of floats.
extern "C" void timbre_spectra(const SpectralSource *source, const void *x, int64_t is_narrow, float *z, int threads) {
    if (is_narrow) spectra_of(*source, static_cast<const BFloat16 *>(x), z, threads);
    else spectra_of(*source, static_cast<const float *>(x), z, threads);
}
PLAYED(timbre_spectra)

// lanes [count, side]: in each lane that has a source its values, in an order of their places; others stay.
extern "C" void timbre_spectral_values(
    const float *const *sources, int64_t side, const int64_t *order, int64_t count, float *lanes, int
) {
    int64_t own[MOST_ROWS], num_own = 0;
    for (int64_t n = 0; n < side; n++)
        if (sources[n]) own[num_own++] = n;
    for (int64_t k = 0; k < count; k++)
        for (int64_t i = 0; i < num_own; i++) lanes[k * side + own[i]] = sources[own[i]][order[k]];
}
PLAYED(timbre_spectral_values)

template <bool SHARED, typename V>
static void apply_core(const SpectralPattern &pattern, const float *values, const Complex<V> *z, Complex<V> *h) {
    const SpectralEntry *entry = pattern.entries;
    for (int64_t k = 0; k < pattern.count; k++) {
        const SpectralFrequency &own = pattern.frequencies[k];
        Complex<V> sum = {};
        for (const SpectralEntry *end = entry + own.count; entry < end; entry++) {
            const Complex<V> &read = z[entry->column];
            V value = {};
            if constexpr (SHARED) {
                value += values[entry->source];
            } else {
                std::memcpy(&value, values, sizeof value);
                __builtin_prefetch(values + AHEAD * SIDE<V>, 0, 2);
                values += SIDE<V>;
            }
            sum.re += value * read.re;
            sum.im += value * entry->sign * read.im;
        }
        h[own.row] = {sum.re * own.scale, sum.im * own.scale};
    }
    h[0].im = h[pattern.count - 1].im = V{};
}

// y += lanes [out, side], by rows.
template <typename V>
static void add_to_rows(const float *lanes, int64_t out, const SpectralRows &own, float *y) {
    float *to[MOST_ROWS];
    for (int64_t n = 0; n < own.count; n++) to[n] = own.rows[n] < 0 ? nullptr : y + own.rows[n] * out;
    int64_t o = 0;
    for (; o + LANES <= out; o += LANES)
        for (int64_t first = 0; first < own.count; first += LANES) {
            Lanes block[LANES];
            for (int j = 0; j < LANES; j++) block[j] = load(lanes + (o + j) * SIDE<V> + first);
            transpose(block);
            const auto add = [&](int64_t n) {
                float *row = to[first + n];
                if (row) store(row + o, load(row + o) + block[n]);
            };
            if (own.count - first >= LANES)
                for (int n = 0; n < LANES; n++) add(n);
            else
                for (int n = 0; first + n < own.count; n++) add(n);
        }
    for (; o < out; o++)
        for (int64_t n = 0; n < own.count; n++)
            if (to[n]) to[n][o] += lanes[o * SIDE<V> + n];
}

// y [T, 2 m] is contiguous; z is what `timbre_spectra` made for the same groups.
extern "C" void timbre_spectral(const SpectralMember *member, const float *z, float *y, int threads) {
    const FourierPlan &plan = *member->plan;
    const SpectralPattern &pattern = *member->pattern;
    const int64_t m = plan.m;
#pragma omp parallel num_threads(threads) if (threads > 1 && !member->is_small)
    {
        thread_local Scratch memory;
        const auto add = [&](const SpectralRows &own, const SpectralCore &core, const float *X, auto lanes) {
            typedef decltype(lanes) V;
            const Complex<V> *read = reinterpret_cast<const Complex<V> *>(X);
            Complex<V> *h = reinterpret_cast<Complex<V> *>(memory.of((2 * m + 1) * 2 * SIDE<V>));
            if (core.is_shared) apply_core<true>(pattern, core.values, read, h);
            else apply_core<false>(pattern, core.values, read, h);
            const Complex<V> *numbers = rows_of_spectra(plan, h, h + m + 1);
            add_to_rows<V>(reinterpret_cast<const float *>(numbers), 2 * m, own, y);
        };
#pragma omp for schedule(static)
        for (int64_t g = 0; g < member->count; g++) {
            const SpectralRows &own = member->groups[g];
            const SpectralCore &core = member->cores[g];
            const float *X = z + g * 2 * pattern.in_count * WIDTH;
            if (core.values != nullptr) in_registers(own.count, [&](auto lanes) { add(own, core, X, lanes); });
        }
    }
}
PLAYED(timbre_spectral)
