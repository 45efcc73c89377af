// y[row] += weight B (A x[row]), for adapters with A, B, ranks and rows of their own.
#include "gates.h"
#include "low_rank_unit.h"

// y[n] += B z_n of N rows.
template <int N, typename Number>
static void expand_rows(
    const LowRankUse &use, const Number *b, int64_t first, const float *z, float *y, int64_t out, Share own,
    const Number *soon
) {
    const int64_t rank = use.part->rank;
    float *to[N];
    for (int n = 0; n < N; n++) to[n] = y + use.rows->rows[first + n] * out;
    expand<N>(rank, b, z + first * rank, to, out, own, soon);
}

// y += B z of one adapter, for the outputs of a share; `next` is the next B to be read.
static void expand_all(const LowRankUse &use, const float *z, float *y, int64_t out, Share own, const void *next) {
    as_they_lie(use.part->b, [&](auto b) {
        in_blocks(use.rows->count, b, next, [&](auto n, int64_t row, auto soon) {
            expand_rows<n>(use, b, row, z, y, out, own, soon);
        });
    });
}

// Threads share pieces; where rows have several adapters, each thread adds to outputs of its own instead.
static void add_others(const std::vector<LowRankUse> &whole, const Input &input, float *y, int64_t out, int threads) {
    Shrinks shrinks(whole, input, threads);
    const LowRankUse *uses = shrinks.uses.data();
    const int64_t count = shrinks.count();
    const bool are_apart = threads == 1 || have_own_rows(uses, count);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const auto expand = [&](int64_t u, int64_t more, Share own) {
            const void *next = shrinks.part_after(u, more).b.first;
            expand_all(uses[u], shrinks.z.data() + shrinks.starts[u], y, out, own, next);
        };
#pragma omp for schedule(dynamic, 1)
        for (int64_t u = 0; u < count; u++) {
            shrinks.shrink(u, thread_count());
            if (are_apart) expand(u, thread_count(), {0, out});
        }
        const Share own = share(out, thread_number(), thread_count(), STEP);
        for (int64_t u = 0; u < count && !are_apart; u++) expand(u, 1, own);
    }
}

static void add_low_rank(
    std::vector<LowRankUse> uses, const Input &input, int64_t rows, float *y, int64_t out, const uint8_t *in_chunks,
    int threads
) {
    const Parted<LowRank> own = parted(std::move(uses), input, in_chunks);
    if (!own.tiled.empty()) {
        TiledLowRank tiled(own.tiled, input, rows, out);
#pragma omp parallel num_threads(threads) if (threads > 1)
        {
            tiled.shrink();
            tiled.add_to(y, share(out, thread_number(), thread_count(), PANEL));
        }
    }
    if (!own.others.empty()) add_others(own.others, input, y, out, threads);
}

// x [rows, in] and y [rows, out] are contiguous; x is of float32 or of bfloat16.
extern "C" void timbre_low_rank(
    const Uses<LowRank> *all, const void *x, int64_t format, int64_t rows, int64_t in, float *y, int64_t out,
    int threads
) {
    add_low_rank(all->with_rows(), {{x, format}, in}, rows, y, out, all->chunks(), all->threads(rows, threads));
}
PLAYED(timbre_low_rank)

// An expert of low rank, and which of its adapter's gates is its own.
struct Expert {
    LowRank part;
    int64_t column;
};

// All experts of an adapter at one layer.
struct AdapterExperts {
    const Expert *experts;
    int64_t count;
    const Gates *gates;
};

// As above, for experts: each runs, and is read, for the rows alone whose gate is not zero.
extern "C" void timbre_low_rank_experts(
    const Uses<AdapterExperts> *all, const void *x, int64_t format, int64_t rows, int64_t in, float *y, int64_t out,
    int threads
) {
    const auto uses = all->with_rows();
    int64_t size = 0, experts = 0;
    for (const auto &use : uses) size += use.rows->count * use.part->count, experts += use.part->count;
    std::vector<int64_t> numbers(size);
    std::vector<float> weights(size);
    std::vector<Rows> kept_rows(experts);
    std::vector<LowRankUse> kept;
    int64_t end = 0, e = 0;
    for (const auto &[adapter, own] : uses) {
        const Gates &gates = *adapter->gates;
        for (const Expert *expert = adapter->experts; expert < adapter->experts + adapter->count; expert++, e++) {
            const int64_t begin = end;
            for (int64_t n = 0; n < own->count; n++) {
                const float gate = gates.values[n * gates.columns + expert->column];
                if (gate == 0) continue;
                numbers[end] = own->rows[n];
                weights[end++] = gate * own->weights[n];
            }
            kept_rows[e] = {numbers.data() + begin, weights.data() + begin, end - begin};
            if (end > begin) kept.push_back({&expert->part, &kept_rows[e]});
        }
    }
    add_low_rank(std::move(kept), {{x, format}, in}, rows, y, out, all->chunks(), all->threads(rows, threads));
}
PLAYED(timbre_low_rank_experts)
