// out[row, h] = softmax(scale q[row, h] K) V, for rows with slots of their own in a paged cache.
//
// One thread makes one row's heads of one KV head, whose keys and values are read where they lie, once for
// all of them. A row's result follows from nothing but its own slots.
#include "lanes.h"

struct AttentionRow {
    int64_t row;
    const int64_t *slots;
    int64_t count;
};

struct AttentionShape {
    int64_t kv_heads, group, key_dim, value_dim;
    int64_t q_row_stride, q_head_stride;
    float scale;
};

constexpr int KEYS = LANES;  // Keys that are read together.
constexpr int AHEAD = 4 * KEYS;  // Keys that are asked of memory before they are read.

static inline void put(float value, float *to) { *to = value; }

// To the nearest, ties to even.
static inline void put(float value, BFloat16 *to) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    to->bits = value != value ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// e^x for x <= 0 as 2^n e^r with |r| <= ln(2) / 2, by Taylor's series of e^r; below -87 as at -87. NaN stays.
static inline Lanes exponential(Lanes x) {
    const Lanes lowest = all(-87.0f), shift = all(12582912.0f);  // 1.5 * 2^23: leaves n in the last bits.
    x = x < lowest ? lowest : x;
    const Lanes shifted = x * 1.44269504f + shift, n = shifted - shift;
    const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Lanes series = all(1.0f / 5040);
    for (const float term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) series = series * r + term;
    Integers bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + (127 << 23);
    Lanes power;
    std::memcpy(&power, &bits, sizeof power);
    return series * power;
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

// One head's numbers at KEYS slots from `first` on; after the last slot the last again.
template <class Number>
static inline void gather(
    const Number *head, int64_t stride, int64_t dim, const AttentionRow &row, int64_t first, float *scratch,
    const float *found[KEYS]
) {
    const auto at = [&](int64_t key) { return head + row.slots[key < row.count ? key : row.count - 1] * stride; };
    for (int j = 0; j < KEYS; j++) {
        const char *soon = reinterpret_cast<const char *>(at(first + AHEAD + j));
        for (int64_t byte = 0; byte < dim * int64_t(sizeof(Number)); byte += 64) __builtin_prefetch(soon + byte);
        found[j] = floats(at(first + j), dim, scratch + j * dim);
    }
}

template <class Number>
static void attend(
    const AttentionShape &shape, const AttentionRow &row, int64_t kv_head, const Number *q, const Number *keys,
    const Number *values, Number *out
) {
    const int64_t D = shape.key_dim, E = shape.value_dim, group = shape.group;
    const int64_t padded = (row.count + KEYS - 1) / KEYS * KEYS;
    thread_local std::vector<float> memory;  // Kept: fresh pages cost more than what is written to them.
    memory.resize(group * (D + E + padded) + KEYS * (D > E ? D : E));
    float *queries = memory.data(), *sums = queries + group * D;
    float *scores = sums + group * E, *scratch = scores + group * padded;
    const float *found[KEYS];
    for (int64_t m = 0; m < group; m++) {
        const Number *from = q + row.row * shape.q_row_stride + (kv_head * group + m) * shape.q_head_stride;
        const float *query = floats(from, D, scratch);
        for (int64_t d = 0; d < D; d++) queries[m * D + d] = query[d] * shape.scale;
    }
    for (int64_t first = 0; first < row.count; first += KEYS) {
        gather(keys + kv_head * D, shape.kv_heads * D, D, row, first, scratch, found);
        for (int64_t m = 0; m < group; m++) {
            Lanes products[KEYS] = {};
            for (int64_t d = 0; d < D; d += LANES) {
                const Lanes query = load(queries + m * D + d);
                for (int j = 0; j < KEYS; j++) products[j] += load(found[j] + d) * query;
            }
            store(scores + m * padded + first, sums_of(products));
        }
    }
    for (int64_t m = 0; m < group; m++) softmax(scores + m * padded, row.count);
    for (int64_t i = 0; i < group * E; i++) sums[i] = 0;
    for (int64_t first = 0; first < row.count; first += KEYS) {
        gather(values + kv_head * E, shape.kv_heads * E, E, row, first, scratch, found);
        for (int64_t m = 0; m < group; m++) {
            Lanes weights[KEYS];
            for (int j = 0; j < KEYS; j++) weights[j] = all(scores[m * padded + first + j]);
            for (int64_t e = 0; e < E; e += LANES) {
                Lanes total = load(sums + m * E + e);
                for (int j = 0; j < KEYS; j++) total += load(found[j] + e) * weights[j];
                store(sums + m * E + e, total);
            }
        }
    }
    Number *to = out + (row.row * shape.kv_heads + kv_head) * group * E;
    for (int64_t i = 0; i < group * E; i++) put(sums[i], to + i);
}

template <class Number>
static void attend_all(
    const AttentionShape &shape, const AttentionRow *rows, int64_t count, const Number *q, const Number *keys,
    const Number *values, Number *out, int threads
) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < count * shape.kv_heads; task++)
        attend(shape, rows[task / shape.kv_heads], task % shape.kv_heads, q, keys, values, out);
}

// Pools [slots, kv_heads, dim] and out [rows, heads, value_dim] are contiguous; dims are multiples of LANES.
#define ATTENTION(NAME, NUMBER)                                                                              \
    extern "C" void NAME(                                                                                    \
        const AttentionShape *shape, const AttentionRow *rows, int64_t count, const NUMBER *q,               \
        const NUMBER *keys, const NUMBER *values, NUMBER *out, int threads                                   \
    ) {                                                                                                      \
        attend_all(*shape, rows, count, q, keys, values, out, threads);                                      \
    }

ATTENTION(timbre_attention_float32, float)
ATTENTION(timbre_attention_bfloat16, BFloat16)
