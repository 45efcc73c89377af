// As many floats at once as a register of the processor holds.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "lanes.h"

#ifdef __AVX512F__
typedef float Wide __attribute__((vector_size(64)));
typedef int32_t WideIntegers __attribute__((vector_size(64)));
typedef uint32_t WideBits __attribute__((vector_size(64)));
typedef uint16_t WideHalves __attribute__((vector_size(32)));
#else
typedef Lanes Wide;
typedef Integers WideIntegers;
typedef Bits WideBits;
typedef Halves WideHalves;
#endif
constexpr int WIDTH = sizeof(Wide) / sizeof(float);

static inline Wide wide(const void *from) {
    Wide found;
    std::memcpy(&found, from, sizeof found);
    return found;
}

// As floats, of as many numbers as the first argument holds.
static inline void get(float &to, const float *from) { to = *from; }
static inline void get(Lanes &to, const float *from) { to = load(from); }
static inline void get(Lanes &to, const BFloat16 *from) { to = load(from); }
#ifdef __AVX512F__
static inline void get(Wide &to, const float *from) { to = wide(from); }
static inline void get(Wide &to, const BFloat16 *from) {
    __m256i halves;
    std::memcpy(&halves, from, sizeof halves);
    to = (Wide)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);  // GCC would widen each quarter by itself.
}
#endif

static inline void put(Wide numbers, float *to) { std::memcpy(to, &numbers, sizeof numbers); }

static inline void put(Wide numbers, BFloat16 *to) {
#if defined __AVX512BF16__ && defined __AVX512DQ__
    constexpr int BELOW_NORMAL = 0x20;  // Of which the processor would make zeros.
    if (!_mm512_fpclass_ps_mask((__m512)numbers, BELOW_NORMAL)) {
        const __m256bh halves = _mm512_cvtneps_pbh((__m512)numbers);
        std::memcpy(to, &halves, sizeof halves);
        return;
    }
#endif
    const WideHalves halves = __builtin_convertvector(rounded_to_bfloat16((WideBits)numbers), WideHalves);
    std::memcpy(to, &halves, sizeof halves);
}

// Sums of two numbers each, where there are more than LANES.
static inline Lanes folded(Lanes v) { return v; }
#ifdef __AVX512F__
static inline void put(Lanes numbers, float *to) { store(to, numbers); }

static inline Lanes folded(Wide v) {
    const __m512d pairs = (__m512d)v;
    return (Lanes)_mm512_castpd512_pd256(pairs) + (Lanes)_mm512_extractf64x4_pd(pairs, 1);
}

static inline float sum(Wide v) { return sum(folded(v)); }

static inline void add_product(Wide &sum, Wide x, Wide y) {
    sum = (Wide)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)sum);
}

// As many vectors as one has numbers: the rows of a matrix become its columns.
static inline void transpose(Wide p[WIDTH]) {
    WideIntegers lane;
    for (int i = 0; i < WIDTH; i++) lane[i] = i;
#pragma GCC unroll 4
    for (int apart = 1; apart < WIDTH; apart *= 2) {
        const WideIntegers is_odd = (lane & apart) != 0;
        const WideIntegers low = is_odd ? lane - apart + WIDTH : lane, high = is_odd ? lane + WIDTH : lane + apart;
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++)
            if (!(i & apart)) {
                const Wide first = p[i], second = p[i + apart];
                p[i] = picked(first, second, low), p[i + apart] = picked(first, second, high);
            }
    }
}
#endif

// A number in all places.
template <typename V> static inline V spread(float number);
template <> inline Lanes spread<Lanes>(float number) { return all(number); }
#ifdef __AVX512F__
template <> inline Wide spread<Wide>(float number) { return (Wide)_mm512_set1_ps(number); }
#endif

// The first and the second ones of pairs of bfloat16.
static inline Wide first_of(Wide pairs) { return (Wide)((WideBits)pairs << 16); }
static inline Wide second_of(Wide pairs) { return (Wide)((WideBits)pairs & 0xffff0000); }

static inline Wide all_pairs(uint32_t pair) { return (Wide)(WideBits{} + pair); }

// sum + x[0] y[0] + x[1] y[1], of pairs x and y of bfloat16 in the places of a float.
static inline Wide plus_products(Wide sum, Wide x, Wide y) {
#ifdef __AVX512BF16__
    return (Wide)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
#else
    return sum + first_of(x) * first_of(y) + second_of(x) * second_of(y);
#endif
}
