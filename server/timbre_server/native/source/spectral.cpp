// y[row] += irfft(S rfft(x[row])), for rows with values of their own in one sparse pattern of S.
//
// Eight rows lie side by side in every step; S is real between the parts of half spectra ("coordinates").
#include <memory>

#include "fourier.h"

// Up to eight rows. Rows with equal values share them; others have theirs side by side.
struct SpectralRows {
    int64_t rows[LANES];
    int64_t count;
};

struct SpectralCore {
    const float *values;  // [N] of all rows, or [N, LANES] in order of use; null: nothing is added.
    int64_t is_shared;
};

// A coefficient in the order of those side by side: value times both parts of the frequency whose real part is
// coordinate `column` is added, each with a factor of its own, to those of the frequency at `row`. Factors hold
// what transforms leave out, 1 / 4 m.
struct SpectralEntry {
    int32_t row, column;
    int32_t source;  // Among the values of rows that share them.
    float factors[2];
};

struct SpectralPattern {
    const SpectralEntry *entries;
    int64_t count;
};

// The first place in a buffer that vectors may lie at.
static Complex *aligned(const std::unique_ptr<float[]> &buffer) {
    const uintptr_t step = LANES * sizeof(float), at = reinterpret_cast<uintptr_t>(buffer.get());
    return reinterpret_cast<Complex *>((at + step - 1) / step * step);
}

// z, where vectors may lie, [count, 2 (m + 1), LANES]: the half spectra of x's rows, twice.
extern "C" void timbre_spectra(
    const FourierPlan *plan, const SpectralRows *groups, int64_t count, const float *x, float *z, int threads
) {
    const int64_t m = plan->m, in = 2 * m;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const std::unique_ptr<float[]> buffers(new float[2 * m * 2 * LANES + LANES]);
        Complex *packed = aligned(buffers), *scratch = packed + m;
#pragma omp for schedule(static)
        for (int64_t g = 0; g < count; g++) {
            const SpectralRows &own = groups[g];
            side_by_side(x, in, own.rows, own.count, reinterpret_cast<float *>(packed));
            spectra(*plan, packed, scratch, reinterpret_cast<Complex *>(z) + g * (m + 1));
        }
    }
}

// Not output by output: there is no branch on how many coefficients a frequency has.
template <bool SHARED>
static void apply_core(const SpectralPattern &pattern, const float *values, const float *z, Complex *h, int64_t size) {
    float *to = reinterpret_cast<float *>(h);
    std::memset(to, 0, size * sizeof *h);
    for (int64_t e = 0; e < pattern.count; e++) {
        const SpectralEntry &entry = pattern.entries[e];
        const Lanes value = SHARED ? all(values[entry.source]) : load(values + e * LANES);
        const float *read = z + int64_t(entry.column) * LANES;
        float *written = to + int64_t(entry.row) * LANES;
        store(written, load(written) + value * entry.factors[0] * load(read));
        store(written + LANES, load(written + LANES) + value * entry.factors[1] * load(read + LANES));
    }
}

// y += lanes [out, LANES], by rows.
static void add_to_rows(const float *lanes, int64_t out, const SpectralRows &own, float *y) {
    int64_t o = 0;
    for (; o + LANES <= out; o += LANES) {
        Lanes block[LANES];
        for (int j = 0; j < LANES; j++) block[j] = load(lanes + (o + j) * LANES);
        transpose(block);
        const auto add = [&](int n) {
            float *to = y + own.rows[n] * out + o;
            store(to, load(to) + block[n]);
        };
        if (own.count == LANES)
            for (int n = 0; n < LANES; n++) add(n);
        else
            for (int n = 0; n < own.count; n++) add(n);
    }
    for (; o < out; o++)
        for (int64_t n = 0; n < own.count; n++) y[own.rows[n] * out + o] += lanes[o * LANES + n];
}

// y [T, 2 m] is contiguous; `z` has `in_coordinates` for each group of rows.
extern "C" void timbre_spectral(
    const FourierPlan *plan, const SpectralPattern *pattern, const SpectralRows *groups, const SpectralCore *cores,
    int64_t count, const float *z, int64_t in_coordinates, float *y, int threads
) {
    const int64_t m = plan->m, out = 2 * m;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const std::unique_ptr<float[]> buffers(new float[(3 * m + 1) * 2 * LANES + LANES]);
        Complex *h = aligned(buffers), *packed = h + m + 1, *scratch = packed + m;
        const int64_t size = in_coordinates * LANES;
#pragma omp for schedule(static)
        for (int64_t g = 0; g < count; g++) {
            const SpectralRows &own = groups[g];
            const SpectralCore &core = cores[g];
            if (core.values == nullptr) continue;
            const float *own_z = z + g * size;
            if (core.is_shared)
                apply_core<true>(*pattern, core.values, own_z, h, m + 1);
            else
                apply_core<false>(*pattern, core.values, own_z, h, m + 1);
            const float *from = reinterpret_cast<float *>(rows_of_spectra(*plan, h, packed, scratch));
            add_to_rows(from, out, own, y);
        }
    }
}
