// out[row, h] = softmax(scale q[row, h] K) V, for rows of sequences with keys and values in a paged cache.
//
// Those of the step's rows are stored there first; all that a row sees is read where it lies. A row's result
// follows from nothing but its own sequence.
#include "attention_chunk.h"
#include "attention_single.h"

template <class Number> static void store_row(const Attention &call, int64_t row) {
    const int64_t D = call.key_dim, E = call.value_dim, heads = call.rows->slots[row] * call.kv_heads;
    Number *keys = static_cast<Number *>(call.keys) + heads * D;
    Number *values = static_cast<Number *>(call.values) + heads * E;
    for (int64_t g = 0; g < call.kv_heads; g++) {
        std::memcpy(keys + g * D, call.k.at<Number>(row, g), D * sizeof(Number));
        std::memcpy(values + g * E, call.v.at<Number>(row, g), E * sizeof(Number));
    }
}

template <class Number> static void attend(const Attention &call, int most_threads) {
    const int threads = call.pairs() < call.least_pairs ? 1 : most_threads;
    const std::vector<Tile> tiles = tiles_of(call, threads);
    const std::vector<Single> singles = singles_of(call, threads);
    const int64_t num_tiles = tiles.size(), num_singles = singles.size();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for
        for (int64_t row = 0; row < call.rows->num_rows; row++) store_row<Number>(call, row);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t t = 0; t < num_tiles; t++) attend_tile<Number>(tiles[t]);
#pragma omp for schedule(dynamic, 1)
        for (int64_t s = 0; s < num_singles; s++)
            attend_single<Number>(call, singles[s], s + 1 < num_singles ? &singles[s + 1] : nullptr);
    }
}

#define ATTENTION(NAME, NUMBER)                                                                              \
    extern "C" void NAME(const Attention *call, int threads) { attend<NUMBER>(*call, threads); }             \
    PLAYED(NAME)

ATTENTION(timbre_attention_float32, float)
ATTENTION(timbre_attention_bfloat16, BFloat16)
