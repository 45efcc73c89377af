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

// lanes [in, side]; zeros where there is no row.
template <typename V, typename Number>
static void put_side_by_side(
    const Number *const *from, int64_t count, int64_t in, float *lanes, const int32_t *places = nullptr
) {
    const int64_t whole = in / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES)
        for (int64_t first = 0; first < SIDE<V>; first += LANES) {
            Lanes block[LANES] = {};
            if (count - first >= LANES)
                for (int n = 0; n < LANES; n++) block[n] = load(from[first + n] + i);
            else
                for (int n = 0; first + n < count; n++) block[n] = load(from[first + n] + i);
            transpose(block);
            for (int j = 0; j < LANES; j++) store(lanes + place_of(places, i + j) * SIDE<V> + first, block[j]);
        }
    for (int64_t i = whole; i < in; i++) {
        float *to = lanes + place_of(places, i) * SIDE<V>;
        for (int64_t n = 0; n < SIDE<V>; n++) to[n] = n < count ? value(from[n][i]) : 0;
    }
}

// put(n, o, numbers): of row n, from o on, either LANES numbers or one.
template <typename V, typename Put>
static void take_apart(
    const float *lanes, int64_t count, int64_t out, Put put, const int32_t *places = nullptr
) {
    int64_t o = 0;
    for (; o + LANES <= out; o += LANES)
        for (int64_t first = 0; first < count; first += LANES) {
            Lanes block[LANES];
            for (int j = 0; j < LANES; j++) block[j] = load(lanes + place_of(places, o + j) * SIDE<V> + first);
            transpose(block);
            if (count - first >= LANES)
                for (int n = 0; n < LANES; n++) put(first + n, o, block[n]);
            else
                for (int n = 0; first + n < count; n++) put(first + n, o, block[n]);
        }
    for (; o < out; o++)
        for (int64_t n = 0; n < count; n++) put(n, o, lanes[place_of(places, o) * SIDE<V> + n]);
}

static inline void add(float *to, float number) { *to += number; }
static inline void add(float *to, Lanes numbers) { store(to, load(to) + numbers); }

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
