// y[row] += irfft(S rfft(x[row])), or with another transform, for rows with values of their own in one sparse pattern
// of S, or in patterns of their own.
//
// Rows lie side by side in every step, in the narrowest register that has room for a group of them. S is real between
// coordinates of spectra, or between the parts of frequencies with both. A row's sums are the same ones in the same
// order whether it shares its pattern with the others of its register or not.
#include "pattern.h"
#include "spectrum.h"

constexpr int64_t AHEAD = 64;  // Entries' values that are on their way from memory.

// One of the adapters of a row: its values [N] times `weight`, in a pattern of its own.
struct SpectralUse {
    int64_t lane;
    const SpectralPattern *pattern;
    const float *values;
    double weight;
};

struct SpectralCore {
    const SpectralPattern *pattern;  // That of all rows, or null.
    const float *values;  // [N] of all rows, or side by side in the order of entries.
    int64_t is_shared;
    const SpectralUse *uses;  // Where rows have patterns of their own.
    int64_t num_uses;  // Without a pattern and without these nothing is added.
};

struct SpectralSource {
    const SpectralTransform *transform;
    const SpectralRows *groups;
    int64_t count;
    int64_t is_small;  // Too little for more than one thread.
};

struct SpectralMember {
    const SpectralTransform *transform;
    const SpectralRows *groups;
    const SpectralCore *cores;
    int64_t count;
    int64_t is_small;
    int64_t in_coordinates;
};

// How many rows of a group lie side by side in one register.
extern "C" int timbre_spectral_rows() { return WIDTH; }

template <typename Number>
static void spectra_of(const SpectralSource &source, const Number *x, float *z, int threads) {
    const SpectralTransform &own = *source.transform;
#pragma omp parallel num_threads(threads) if (threads > 1 && !source.is_small)
    {
        thread_local Scratch memory;  // Kept: fresh pages cost more than what is written to them.
#pragma omp for schedule(static)
        for (int64_t g = 0; g < source.count; g++)
            in_registers(source.groups[g].count, [&](auto lanes) {
                typedef decltype(lanes) V;
                V *X = reinterpret_cast<V *>(z + g * own.coordinates * WIDTH);
                transformed<V>(own, x, source.groups[g], X, memory.of(scratch_size(own) * SIDE<V>));
            });
    }
}

// z [count, coordinates, most rows]: the spectra of x's rows. x is of bfloat16 or of floats.
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

// What an entry adds, with its value in each row.
template <typename V> INLINED void add_entry(Complex<V> &sum, const SpectralEntry &entry, V value, const Complex<V> *z) {
    const Complex<V> &read = z[entry.column];
    add_product(sum.re, value, read.re);
    add_product(sum.im, value * spread<V>(entry.factor), read.im);
}
template <typename V> INLINED void add_entry(V &sum, const SpectralEntry &entry, V value, const V *z) {
    add_product(sum, value * spread<V>(entry.factor), z[entry.column]);
}

template <typename V> INLINED Complex<V> scaled(Complex<V> sum, float scale) { return {sum.re * scale, sum.im * scale}; }
template <typename V> INLINED V scaled(V sum, float scale) { return sum * scale; }

// Of rows with one pattern; `Number` is V, or a complex one.
template <bool SHARED, typename V, typename Number>
static void apply_core(const SpectralPattern &pattern, const float *values, const Number *z, Number *h) {
    const SpectralEntry *entry = pattern.entries;
    for (int64_t k = 0; k < pattern.count; k++) {
        const SpectralSum &own = pattern.sums[k];
        Number sum = {};
        for (const SpectralEntry *end = entry + own.count; entry < end; entry++) {
            V value;
            if constexpr (SHARED) {
                value = spread<V>(values[entry->source]);
            } else {
                std::memcpy(&value, values, sizeof value);
                __builtin_prefetch(values + AHEAD * SIDE<V>, 0, 2);
                values += SIDE<V>;
            }
            add_entry(sum, *entry, value, z);
        }
        h[own.row] = scaled(sum, own.scale);
    }
}

static inline int64_t bytes_between(const void *from, const void *to) { return intptr_t(to) - intptr_t(from); }

// Of one row, whose numbers are `side` apart. As much of the next use is brought near meanwhile; where that is less,
// it does nothing.
template <bool COMPLEX>
static void apply_use(const SpectralUse &use, const SpectralUse &next, int64_t side, const float *z, float *h) {
    const int64_t to_sums = bytes_between(use.pattern->sums, next.pattern->sums);
    const int64_t to_entries = bytes_between(use.pattern->entries, next.pattern->entries);
    const auto bring = [](const void *from, int64_t bytes) { __builtin_prefetch((const char *)from + bytes, 0, 2); };
    const float *next_values = next.values;
    const SpectralEntry *entry = use.pattern->entries;
    const float weight = use.weight;
    for (const SpectralSum *own = use.pattern->sums, *last = own + use.pattern->count; own < last; own++) {
        bring(own, to_sums);
        if (!own->count) continue;
        float re = 0, im = 0;
        for (const SpectralEntry *end = entry + own->count; entry < end; entry++) {
            bring(entry, to_entries);
            bring(next_values++, 0);
            const float value = use.values[entry->source] * weight;
            if constexpr (COMPLEX) {
                const float *read = z + int64_t(entry->column) * 2 * side;
                add_product(re, value, read[0]);
                add_product(im, value * entry->factor, read[side]);
            } else {
                add_product(re, value * entry->factor, z[entry->column * side]);
            }
        }
        float *to = h + int64_t(own->row) * (COMPLEX ? 2 : 1) * side;
        to[0] += re * own->scale;
        if constexpr (COMPLEX) to[side] += im * own->scale;
    }
}

template <typename V>
static void apply_uses(const SpectralCore &core, int64_t coordinates, const float *z, float *h) {
    std::fill(h, h + coordinates * SIDE<V>, 0.0f);
    for (int64_t u = 0; u < core.num_uses; u++) {
        const SpectralUse &use = core.uses[u], &next = core.uses[std::min(u + 1, core.num_uses - 1)];
        const auto apply = use.pattern->is_complex ? apply_use<true> : apply_use<false>;
        apply(use, next, SIDE<V>, z + use.lane, h + use.lane);
    }
}

// h [coordinates], of the spectra z.
template <typename V>
static void apply(const SpectralCore &core, int64_t coordinates, const float *z, float *h) {
    if (!core.pattern) return apply_uses<V>(core, coordinates, z, h);
    const auto of = [&](const auto *read, auto *to) {
        if (core.is_shared) apply_core<true, V>(*core.pattern, core.values, read, to);
        else apply_core<false, V>(*core.pattern, core.values, read, to);
    };
    if (core.pattern->is_complex) of(reinterpret_cast<const Complex<V> *>(z), reinterpret_cast<Complex<V> *>(h));
    else of(reinterpret_cast<const V *>(z), reinterpret_cast<V *>(h));
}

// y [T, length] is contiguous; z is what `timbre_spectra` made for the same groups.
extern "C" void timbre_spectral(const SpectralMember *member, const float *z, float *y, int threads) {
    const SpectralTransform &own = *member->transform;
#pragma omp parallel num_threads(threads) if (threads > 1 && !member->is_small)
    {
        thread_local Scratch memory;
#pragma omp for schedule(static)
        for (int64_t g = 0; g < member->count; g++) {
            const SpectralRows &rows = member->groups[g];
            const SpectralCore &core = member->cores[g];
            if (!core.pattern && !core.num_uses) continue;
            in_registers(rows.count, [&](auto lanes) {
                typedef decltype(lanes) V;
                float *h = memory.of((own.coordinates + scratch_size(own)) * SIDE<V>);
                apply<V>(core, own.coordinates, z + g * member->in_coordinates * WIDTH, h);
                add_transformed_back<V>(own, reinterpret_cast<V *>(h), rows, y, h + own.coordinates * SIDE<V>);
            });
        }
    }
}
PLAYED(timbre_spectral)
