// Rows side by side in registers, one in each lane, and back.
#pragma once

#include "wide.h"

constexpr int MOST_ROWS = 16;

template <typename V> constexpr int64_t SIDE = sizeof(V) / sizeof(float);  // Rows side by side.

// Visits with a register of the width for so many rows.
template <typename Visit> static inline void in_registers(int64_t count, Visit visit) {
    if (count > LANES) visit(Wide{});
    else visit(Lanes{});
}

// Where the number i of a row lies among those in lanes; null: in order.
static inline int64_t place_of(const int32_t *places, int64_t i) { return places ? places[i] : i; }

// Numbers i to i + SIDE of each row, as registers; zeros where there is no row.
template <typename V, typename Number>
static inline void get_block(const Number *const *from, int64_t count, int64_t i, V block[SIDE<V>]) {
    if (count == SIDE<V>)
        for (int n = 0; n < SIDE<V>; n++) get(block[n], from[n] + i);
    else
        for (int n = 0; n < SIDE<V>; n++) {
            block[n] = V{};
            if (n < count) get(block[n], from[n] + i);
        }
    transpose(block);
}

// Of all whole blocks of numbers of rows, where lanes [in, side] are put by `put(i, numbers)`. Returns their number.
template <typename V, typename Number, typename Put>
static int64_t put_blocks(const Number *const *from, int64_t count, int64_t in, Put put) {
    int64_t i = 0;
#ifdef __AVX512F__
    if constexpr (sizeof(V) == sizeof(Wide) && sizeof(Number) == sizeof(BFloat16)) {
        const float *pairs[MOST_ROWS];
        for (int64_t n = 0; n < count; n++) pairs[n] = reinterpret_cast<const float *>(from[n]);
        for (; i + 2 * WIDTH <= in; i += 2 * WIDTH) {
            V block[SIDE<V>];
            get_block<V>(pairs, count, i / 2, block);
            for (int j = 0; j < WIDTH; j++) put(i + 2 * j, first_of(block[j])), put(i + 2 * j + 1, second_of(block[j]));
        }
    }
#endif
    for (; i + SIDE<V> <= in; i += SIDE<V>) {
        V block[SIDE<V>];
        get_block<V>(from, count, i, block);
        for (int j = 0; j < SIDE<V>; j++) put(i + j, block[j]);
    }
    return i;
}

// lanes [in, side]; zeros where there is no row.
template <typename V, typename Number>
static void put_side_by_side(
    const Number *const *from, int64_t count, int64_t in, float *lanes, const int32_t *places = nullptr
) {
    const auto put_at = [&](int64_t i, V numbers) { put(numbers, lanes + place_of(places, i) * SIDE<V>); };
    for (int64_t i = put_blocks<V>(from, count, in, put_at); i < in; i++) {
        float *to = lanes + place_of(places, i) * SIDE<V>;
        for (int64_t n = 0; n < SIDE<V>; n++) to[n] = n < count ? value(from[n][i]) : 0;
    }
}

// put(n, o, numbers): of row n, from o on, either a register of numbers or one.
template <typename V, typename Put>
static void take_apart(
    const float *lanes, int64_t count, int64_t out, Put put, const int32_t *places = nullptr
) {
    int64_t o = 0;
    for (; o + SIDE<V> <= out; o += SIDE<V>) {
        V block[SIDE<V>];
        for (int j = 0; j < SIDE<V>; j++) get(block[j], lanes + place_of(places, o + j) * SIDE<V>);
        transpose(block);
        if (count == SIDE<V>)
            for (int n = 0; n < SIDE<V>; n++) put(n, o, block[n]);
        else
            for (int n = 0; n < count; n++) put(n, o, block[n]);
    }
    for (; o < out; o++)
        for (int64_t n = 0; n < count; n++) put(n, o, lanes[place_of(places, o) * SIDE<V> + n]);
}

static inline void add(float *to, float number) { *to += number; }
template <typename V> static inline void add(float *to, V numbers) {
    V sums;
    get(sums, to);
    put(sums + numbers, to);
}

// y += lanes [out, side], by rows; null: there is none.
template <typename V>
static void add_to_rows(
    const float *lanes, float *const *to, int64_t count, int64_t out, const int32_t *places = nullptr
) {
    const auto put = [&](int64_t n, int64_t o, auto numbers) {
        if (to[n]) add(to[n] + o, numbers);
    };
    take_apart<V>(lanes, count, out, put, places);
}
