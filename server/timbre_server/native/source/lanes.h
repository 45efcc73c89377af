// Eight floats at once, by the compiler's vector types: one source for every processor.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#ifdef __FMA__
#include <immintrin.h>
#endif

#include "played.h"
#include "threads.h"

typedef float Lanes __attribute__((vector_size(32)));
typedef int32_t Integers __attribute__((vector_size(32)));
typedef uint32_t Bits __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));
constexpr int LANES = 8;
constexpr int LINE = 64;  // Bytes that memory gives at once.

static inline Lanes load(const float *from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

static inline void store(float *to, Lanes lanes) { std::memcpy(to, &lanes, sizeof lanes); }

static inline Lanes all(float value) {
    return Lanes{value, value, value, value, value, value, value, value};
}

// Rounded once, where the processor can: compilers do so in one loop and not in the other.
static inline void add_product(Lanes &sum, Lanes x, Lanes y) {
#ifdef __FMA__
    sum = (Lanes)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)sum);
#else
    sum += x * y;
#endif
}

static inline void add_product(float &sum, float x, float y) {
#ifdef __FMA__
    sum = std::fma(x, y, sum);
#else
    sum += x * y;
#endif
}

// Has it read once: compilers would read it anew for each product, and wait for that.
static inline void keep(Lanes &lanes) {
#ifdef __FMA__
    asm("" : "+v"(lanes));
#else
    (void)lanes;
#endif
}

// Formats of 16 bits: every number is one of float32's, too.
struct BFloat16 {
    uint16_t bits;  // The upper half of a float's.
};
struct Float16 {
    uint16_t bits;
};

static inline Bits load_bits(const void *from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    return __builtin_convertvector(halves, Bits);
}

static inline Lanes load(const BFloat16 *from) { return (Lanes)(load_bits(from) << 16); }

// Of finite numbers: exponents count from 15, and those of float32 from 127; below the normal ones, too.
static inline Lanes load(const Float16 *from) {
    const Bits bits = load_bits(from);
    const Lanes size = (Lanes)((bits & 0x7fff) << 13) * all(0x1p112f);
    return (Lanes)((Bits)size | (bits & 0x8000) << 16);
}

static inline float value(float number) { return number; }

static inline float value(BFloat16 number) {
    const uint32_t bits = uint32_t(number.bits) << 16;
    float found;
    std::memcpy(&found, &bits, sizeof found);
    return found;
}

static inline float value(Float16 number) {
    const uint32_t bits = uint32_t(number.bits & 0x7fff) << 13;
    float size;
    std::memcpy(&size, &bits, sizeof size);
    return number.bits & 0x8000 ? size * -0x1p112f : size * 0x1p112f;
}

// Memory for floats, from which no register is loaded across two lines of the cache. More of it is other memory.
class Scratch {
  public:
    float *of(int64_t count) {
        const int64_t needed = (count + FLOATS - 1) / FLOATS;
        if (size < needed) lines.reset(new Line[size = needed]);  // Zeros would cost as much as what is written there.
        return reinterpret_cast<float *>(lines.get());
    }

  private:
    static constexpr int FLOATS = LINE / sizeof(float);
    struct alignas(LINE) Line {
        float numbers[FLOATS];
    };
    std::unique_ptr<Line[]> lines;
    int64_t size = 0;
};

// As floats: where they lie, else in `to`.
static inline const float *floats(const float *from, int64_t, float *) { return from; }

template <typename Number> static inline const float *floats(const Number *from, int64_t count, float *to) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
    for (; i < count; i++) to[i] = value(from[i]);
    return to;
}

constexpr int64_t FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2;

struct Numbers {
    const void *first;
    int64_t format;
};

template <typename Visit> static inline void as_they_lie(const Numbers &numbers, Visit visit) {
    if (numbers.format == BFLOAT16)
        visit(static_cast<const BFloat16 *>(numbers.first));
    else if (numbers.format == FLOAT16)
        visit(static_cast<const Float16 *>(numbers.first));
    else
        visit(static_cast<const float *>(numbers.first));
}

// The upper halves of float32's bits, one or a vector of them: to the nearest, ties to even.
template <typename Bits> static inline Bits rounded_to_bfloat16(Bits bits) {
    const Bits not_a_number = Bits{} + 0x7fc0, rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? not_a_number : rounded;
}

static inline void put(float value, float *to) { *to = value; }

static inline void put(float value, BFloat16 *to) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    to->bits = rounded_to_bfloat16(bits);
}

static inline void store(BFloat16 *to, Lanes lanes) {
    const Halves halves = __builtin_convertvector(rounded_to_bfloat16((Bits)lanes), Halves);
    std::memcpy(to, &halves, sizeof halves);
}

// Integers of a register of floats.
template <typename Floats> using IntegersOf = decltype(Floats{} < Floats{});

// e^x for x <= 0 as 2^n e^r with |r| <= ln(2) / 2, by Taylor's series of e^r; below -87 as at -87. NaN stays.
template <typename Floats> static inline Floats exponential(Floats x) {
    const Floats lowest = Floats{} - 87.0f, shift = Floats{} + 12582912.0f;  // 1.5 * 2^23: leaves n in the last bits.
    x = x < lowest ? lowest : x;
    const Floats shifted = x * 1.44269504f + shift, n = shifted - shift;
    const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Floats series = Floats{} + 1.0f / 5040;
    for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) series = series * r + term;
    const IntegersOf<Floats> bits = ((IntegersOf<Floats>)shifted << 23) + (127 << 23);
    return series * (Floats)bits;
}

static inline float sum(Lanes v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

#ifdef __clang__
template <typename Floats, typename Order>
static inline Floats picked(Floats x, Floats y, Order order) {
    constexpr int COUNT = sizeof(Floats) / sizeof(float);
    Floats found;
    for (int i = 0; i < COUNT; i++) found[i] = order[i] < COUNT ? x[order[i]] : y[order[i] - COUNT];
    return found;
}
#else
// A macro, because its order must be a constant to the compiler.
#define picked(x, y, order) __builtin_shuffle(x, y, order)
#endif

// The sums of eight vectors as one.
static inline Lanes sums_of(const Lanes p[LANES]) {
    const Integers even = {0, 8, 2, 10, 4, 12, 6, 14}, odd = {1, 9, 3, 11, 5, 13, 7, 15};
    const Integers low = {0, 1, 8, 9, 4, 5, 12, 13}, high = {2, 3, 10, 11, 6, 7, 14, 15};
    const Integers left = {0, 1, 2, 3, 8, 9, 10, 11}, right = {4, 5, 6, 7, 12, 13, 14, 15};
    Lanes pairs[4], fours[2];
    for (int i = 0; i < 4; i++)
        pairs[i] = picked(p[2 * i], p[2 * i + 1], even) + picked(p[2 * i], p[2 * i + 1], odd);
    for (int i = 0; i < 2; i++)
        fours[i] = picked(pairs[2 * i], pairs[2 * i + 1], low) + picked(pairs[2 * i], pairs[2 * i + 1], high);
    return picked(fours[0], fours[1], left) + picked(fours[0], fours[1], right);
}

// Eight vectors as the rows of a matrix become its columns.
static inline void transpose(Lanes p[LANES]) {
    const Integers low = {0, 8, 1, 9, 4, 12, 5, 13}, high = {2, 10, 3, 11, 6, 14, 7, 15};
    const Integers first = {0, 1, 8, 9, 4, 5, 12, 13}, second = {2, 3, 10, 11, 6, 7, 14, 15};
    const Integers left = {0, 1, 2, 3, 8, 9, 10, 11}, right = {4, 5, 6, 7, 12, 13, 14, 15};
    Lanes pairs[LANES], fours[LANES];
    for (int i = 0; i < LANES; i += 2) {
        pairs[i] = picked(p[i], p[i + 1], low);
        pairs[i + 1] = picked(p[i], p[i + 1], high);
    }
    for (int i = 0; i < LANES; i += 4)
        for (int j = 0; j < 2; j++) {
            fours[i + 2 * j] = picked(pairs[i + j], pairs[i + j + 2], first);
            fours[i + 2 * j + 1] = picked(pairs[i + j], pairs[i + j + 2], second);
        }
    for (int i = 0; i < 4; i++) {
        p[i] = picked(fours[i], fours[i + 4], left);
        p[i + 4] = picked(fours[i], fours[i + 4], right);
    }
}

// lanes [in, LANES]: up to eight rows of x side by side, zeros where there is none; of each input from `step` floats
// after the one before.
template <typename Number>
static inline void side_by_side(
    const Number *x, int64_t in, const int64_t *rows, int64_t count, float *lanes, int64_t step = LANES
) {
    int64_t i = 0;
    for (; i + LANES <= in; i += LANES) {
        Lanes block[LANES] = {};
        for (int64_t n = 0; n < count; n++) block[n] = load(x + rows[n] * in + i);
        transpose(block);
        for (int j = 0; j < LANES; j++) store(lanes + (i + j) * step, block[j]);
    }
    for (; i < in; i++)
        for (int n = 0; n < LANES; n++) lanes[i * step + n] = n < count ? value(x[rows[n] * in + i]) : 0;
}

// All rows of a batch that use one adapter, each once, with their weights.
struct Rows {
    const int64_t *rows;
    const float *weights;
    int64_t count;
};

// An adapter's part, and who uses it.
template <typename Part> struct Use {
    const Part *part;
    const Rows *rows;
};

// Whether no row is of two of them.
template <typename Part> static bool have_own_rows(const Use<Part> *uses, int64_t count) {
    std::vector<bool> seen;
    for (int64_t u = 0; u < count; u++)
        for (int64_t n = 0; n < uses[u].rows->count; n++) {
            const size_t row = uses[u].rows->rows[n];
            if (row >= seen.size()) seen.resize(row + 1);
            if (seen[row]) return false;
            seen[row] = true;
        }
    return true;
}

template <typename Part> struct Uses {
    const Use<Part> *first;
    int64_t count;
    int64_t least_rows;  // Of a table, for which more than one thread is worth waking.
    const uint8_t *const *in_chunks;  // See below; or null.

    int threads(int64_t rows, int most) const { return rows < least_rows ? 1 : most; }

    // Of each row of the table, whether it is one of a chunk; null: none is.
    const uint8_t *chunks() const { return in_chunks ? *in_chunks : nullptr; }

    // Without those of nobody.
    std::vector<Use<Part>> with_rows() const {
        std::vector<Use<Part>> found;
        for (const Use<Part> *use = first; use < first + count; use++)
            if (use->rows->count) found.push_back(*use);
        return found;
    }
};
