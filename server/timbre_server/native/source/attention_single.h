// Sequences with one row, whose keys and values are read once for all of its heads.
#pragma once

#include <algorithm>

#include "attention.h"
#include "wide.h"

constexpr int KEYS = LANES;  // Keys that are read together.
constexpr int AHEAD = 4 * KEYS;  // Keys that are asked of memory before they are read.

// `kv_heads` KV heads of a row, from `kv_head` on, with all heads that share them.
struct Single {
    const Sequence *sequence;
    int64_t kv_head, kv_heads;
};

// Of enough parts for all threads: memory is read fastest where the KV heads of a slot are read together.
static std::vector<Single> singles_of(const Attention &call, int threads) {
    std::vector<Single> singles;
    const int64_t heads = call.rows->num_singles < threads ? 1 : call.kv_heads;
    for (int64_t i = 0; i < call.rows->num_singles; i++)
        for (int64_t g = 0; g < call.kv_heads; g += heads) singles.push_back({call.rows->singles + i, g, heads});
    return singles;
}

// In place, of `count` scores; up to a whole number of lanes the last is repeated, and becomes zero.
static void softmax(float *scores, int64_t count) {
    Lanes most = load(scores), totals = {};
    for (int64_t i = LANES; i < count; i += LANES) most = load(scores + i) > most ? load(scores + i) : most;
    float highest = most[0];
    for (int i = 1; i < LANES; i++) highest = most[i] > highest ? most[i] : highest;
    for (int64_t i = 0; i < count; i += LANES) {
        store(scores + i, exponential(load(scores + i) - highest));
        for (int64_t j = count; j < i + LANES; j++) scores[j] = 0;
        totals += load(scores + i);
    }
    const Lanes factor = all(1.0f / sum(totals));
    for (int64_t i = 0; i < count; i += LANES) store(scores + i, load(scores + i) * factor);
}

// The keys that a row sees, or their values, in the order in which they are read.
template <class Number> struct Run {
    const Number *first;
    int64_t stride, dim, count;
    const int64_t *slots;

    Run(const Attention &call, const Single &single, const void *pool, int64_t dim) : dim(dim) {
        first = static_cast<const Number *>(pool) + single.kv_head * dim;
        stride = call.kv_heads * dim;
        const int64_t position = single.sequence->start, lowest = call.lowest_seen(position);
        count = position + 1 - lowest;
        slots = single.sequence->slots + lowest;
    }
    const Number *at(int64_t key, int64_t head) const { return first + slots[key] * stride + head * dim; }
    void ask(int64_t key, int64_t head) const {
        const Number *from = at(key, head);
        for (int64_t i = 0; i < dim; i += LINE / sizeof(Number)) __builtin_prefetch(from + i, 0, 2);
    }
};

// Where one head's numbers lie at KEYS keys from `begin` on; after the last key the last again. `after` is read next.
template <class Number>
static inline void find(
    const Run<Number> &run, const Run<Number> &after, int64_t begin, int64_t head, const Number *found[KEYS]
) {
    for (int j = 0; j < KEYS; j++) {
        const int64_t key = std::min(begin + j, run.count - 1), soon = begin + j + AHEAD;
        if (soon < run.count)
            run.ask(soon, head);
        else if (soon - run.count < after.count)
            after.ask(soon - run.count, head);
        found[j] = run.at(key, head);
    }
}

// sum + x y, of as many numbers as a register has places for a type's.
static inline Wide plus_product(Wide sum, const float *x, const float *y) { return sum + wide(x) * wide(y); }
static inline Wide plus_product(Wide sum, const BFloat16 *x, const BFloat16 *y) {
    return plus_products(sum, wide(x), wide(y));
}

// The products of one query, of D numbers, with KEYS keys.
template <class Number> static inline Lanes products_of(const Number *query, const Number *const keys[KEYS], int64_t D) {
    constexpr int STEP = sizeof(Wide) / sizeof(Number);
    Wide sums[KEYS] = {};
    Lanes halves[KEYS];
    int64_t d = 0;
    for (; d + STEP <= D; d += STEP)
#pragma GCC unroll 8
        for (int j = 0; j < KEYS; j++) sums[j] = plus_product(sums[j], query + d, keys[j] + d);
    for (int j = 0; j < KEYS; j++) halves[j] = folded(sums[j]);
    for (; d < D; d += LANES)
        for (int j = 0; j < KEYS; j++) halves[j] += load(query + d) * load(keys[j] + d);
    return sums_of(halves);
}

// sums [heads, E] += weights [heads, KEYS of `stride`] times values, of the numbers e .. that a V holds.
template <class V, class Number>
static inline void add_values(
    const Number *const values[KEYS], const float *weights, int64_t stride, int64_t heads, int64_t E, int64_t e,
    float *sums
) {
    V own[KEYS];
    for (int j = 0; j < KEYS; j++) get(own[j], values[j] + e);
    for (int64_t h = 0; h < heads; h++) {
        V total;
        get(total, sums + h * E + e);
        for (int j = 0; j < KEYS; j++) total += own[j] * weights[h * stride + j];
        put(total, sums + h * E + e);
    }
}

template <class Number>
static void attend_single(const Attention &call, const Single &single, const Single *next) {
    const int64_t D = call.key_dim, E = call.value_dim, group = call.group, heads = single.kv_heads * group;
    const Run<Number> keys(call, single, call.keys, D), values(call, single, call.values, E);
    const Run<Number> after(call, next ? *next : single, call.keys, D);
    const int64_t count = keys.count, padded = (count + KEYS - 1) / KEYS * KEYS;
    const int64_t row = single.sequence->first_row, first_head = single.kv_head * group;
    thread_local Scratch memory;  // Kept: fresh pages cost more than what is written to them.
    float *sums = memory.of(heads * (E + padded)), *scores = sums + heads * E;
    const Number *found[KEYS];
    for (int64_t first = 0; first < count; first += KEYS)
        for (int64_t h = 0; h < heads; h++) {
            if (h % group == 0) find(keys, values, first, h / group, found);
            const Lanes products = products_of(call.q.at<Number>(row, first_head + h), found, D);
            store(scores + h * padded + first, products * call.scale);
        }
    for (int64_t h = 0; h < heads; h++) softmax(scores + h * padded, count);
    for (int64_t i = 0; i < heads * E; i++) sums[i] = 0;
    for (int64_t first = 0; first < count; first += KEYS)
        for (int64_t h = 0; h < heads; h += group) {
            find(values, after, first, h / group, found);
            const float *weights = scores + h * padded + first;
            int64_t e = 0;
            for (; e + WIDTH <= E; e += WIDTH) add_values<Wide>(found, weights, padded, group, E, e, sums + h * E);
            for (; e < E; e += LANES) add_values<Lanes>(found, weights, padded, group, E, e, sums + h * E);
        }
    Number *to = static_cast<Number *>(call.out) + (row * call.kv_heads * group + first_head) * E;
    int64_t i = 0;
    for (; i + WIDTH <= heads * E; i += WIDTH) put(wide(sums + i), to + i);
    for (; i < heads * E; i++) put(sums[i], to + i);
}
