// Sequences with one row, whose keys and values are read once for all of its heads.
#pragma once

#include <algorithm>

#include "attention.h"

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
    const int64_t heads = call.num_singles < threads ? 1 : call.kv_heads;
    for (int64_t i = 0; i < call.num_singles; i++)
        for (int64_t g = 0; g < call.kv_heads; g += heads) singles.push_back({call.singles + i, g, heads});
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
        for (int64_t i = 0; i < dim; i += 64 / sizeof(Number)) __builtin_prefetch(from + i);
    }
};

// One head's numbers at KEYS keys from `begin` on; after the last key the last again. `after` is read next.
template <class Number>
static inline void gather(
    const Run<Number> &run, const Run<Number> &after, int64_t begin, int64_t head, float *scratch,
    const float *found[KEYS]
) {
    for (int j = 0; j < KEYS; j++) {
        const int64_t key = std::min(begin + j, run.count - 1), soon = begin + j + AHEAD;
        if (soon < run.count)
            run.ask(soon, head);
        else if (soon - run.count < after.count)
            after.ask(soon - run.count, head);
        found[j] = floats(run.at(key, head), run.dim, scratch + j * run.dim);
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
    float *queries = memory.of(heads * (D + E + padded) + KEYS * std::max(D, E)), *sums = queries + heads * D;
    float *scores = sums + heads * E, *scratch = scores + heads * padded;
    const float *found[KEYS];
    for (int64_t h = 0; h < heads; h++) {
        const Number *query = call.q.at<Number>(row, first_head + h);
        for (int64_t d = 0; d < D; d += LANES) store(queries + h * D + d, load(query + d) * call.scale);
    }
    for (int64_t first = 0; first < count; first += KEYS)
        for (int64_t h = 0; h < heads; h++) {
            if (h % group == 0) gather(keys, values, first, h / group, scratch, found);
            Lanes products[KEYS] = {};
            for (int64_t d = 0; d < D; d += LANES) {
                const Lanes query = load(queries + h * D + d);
                for (int j = 0; j < KEYS; j++) products[j] += load(found[j] + d) * query;
            }
            store(scores + h * padded + first, sums_of(products));
        }
    for (int64_t h = 0; h < heads; h++) softmax(scores + h * padded, count);
    for (int64_t i = 0; i < heads * E; i++) sums[i] = 0;
    for (int64_t first = 0; first < count; first += KEYS)
        for (int64_t h = 0; h < heads; h++) {
            if (h % group == 0) gather(values, after, first, h / group, scratch, found);
            Lanes weights[KEYS];
            for (int j = 0; j < KEYS; j++) weights[j] = all(scores[h * padded + first + j]);
            for (int64_t e = 0; e < E; e += LANES) {
                Lanes total = load(sums + h * E + e);
                for (int j = 0; j < KEYS; j++) total += load(found[j] + e) * weights[j];
                store(sums + h * E + e, total);
            }
        }
    Number *to = static_cast<Number *>(call.out) + (row * call.kv_heads * group + first_head) * E;
    for (int64_t i = 0; i < heads * E; i++) put(sums[i], to + i);
}
