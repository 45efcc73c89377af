// A product of the base's to which adapters of low rank add before it is rounded: nothing else is written or read in
// float32 on the way, which with many rows takes as long as the product.
#include "linear.h"
#include "low_rank_unit.h"

// B z of each row's adapters, in their order.
class Expanded : public Addend {
  public:
    Expanded(const Shrinks &shrinks, const TiledLowRank *chunks, int64_t rows, int64_t out)
        : chunks(chunks), begins(rows + 1, 0), out(out) {
        static_assert(STEP == PANEL);
        const auto visit = [&](auto with) {
            for (int64_t u = 0; u < shrinks.count(); u++)
                for (int64_t n = 0; n < shrinks.uses[u].rows->count; n++) with(shrinks.uses[u], n, shrinks.starts[u]);
        };
        visit([&](const LowRankUse &use, int64_t n, int64_t) { begins[use.rows->rows[n] + 1]++; });
        for (int64_t row = 0; row < rows; row++) begins[row + 1] += begins[row];
        own.resize(begins[rows]);
        std::vector<int64_t> ends(begins.begin(), begins.end() - 1);
        visit([&](const LowRankUse &use, int64_t n, int64_t start) {
            own[ends[use.rows->rows[n]]++] = {use.part, shrinks.z.data() + start + n * use.part->rank};
        });
    }

    std::unique_ptr<TiledAddend> tiled() const override { return chunks ? chunks->adding() : nullptr; }

    void add(int64_t row, int64_t count, int64_t first, float *sums) const override {
        if (begins[row] == begins[row + count]) return;
        for (int64_t i = 0, together; i < count; i += together) {
            const int64_t begin = begins[row + i];
            float *to = sums + i * PANEL;
            together = alike(row + i, count - i);
            if (together == ROWS) add_to<ROWS>(own[begin], first, to);
            else if (together == 2) add_to<2>(own[begin], first, to);
            else
                for (int64_t e = begin; e < begins[row + i + 1]; e++) add_to<1>(own[e], first, to);
        }
    }

  private:
    struct Own {
        const LowRank *part;
        const float *z;
    };

    const TiledLowRank *chunks;  // Or null.
    std::vector<int64_t> begins;  // Of each other row.
    std::vector<Own> own;
    int64_t out;

    // ROWS or 2 of the next `most` rows, which have one and the same adapter, and z one after the other; else 1.
    int64_t alike(int64_t row, int64_t most) const {
        const int64_t begin = begins[row];
        const auto is_next = [&](int64_t n) {
            const Own &one = own[begin], &other = own[begin + n];
            return other.part == one.part && other.z == one.z + n * one.part->rank;
        };
        int64_t n = 0;
        while (n < std::min<int64_t>(most, ROWS) && begins[row + n + 1] == begin + n + 1 && is_next(n)) n++;
        return n == ROWS ? n : n >= 2 ? 2 : 1;
    }

    template <int N> void add_to(const Own &use, int64_t first, float *sums) const {
        float *to[N];
        for (int n = 0; n < N; n++) to[n] = sums + n * PANEL - first;
        as_they_lie(use.part->b, [&](auto b) {
            expand<N>(use.part->rank, b, use.z, to, out, {first, std::min(first + PANEL, out)}, b + PANEL);
        });
    }
};

// To the bit what `timbre_low_rank` makes of a float32 y = x W^T + b, which is then rounded.
extern "C" void timbre_linear_low_rank(
    const Uses<LowRank> *all, const void *x, int64_t format, int64_t rows, int64_t in, const void *panels,
    int64_t panels_format, const float *bias, void *y, int64_t y_format, int64_t out, int threads
) {
    threads = threads_for(rows * in * out, threads);
    const Input input = {{x, format}, in};
    const Parted<LowRank> own = parted(all->with_rows(), input, all->chunks());
    TiledLowRank tiled(own.tiled, input, rows, out);
    Shrinks shrinks(own.others, input, threads);
    const Expanded expanded(shrinks, own.tiled.empty() ? nullptr : &tiled, rows, out);
    const Linear linear = {{x, format}, rows, in, {panels, panels_format}, bias, y, y_format, out, &expanded};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        tiled.shrink();
#pragma omp for schedule(dynamic, 1)
        for (int64_t u = 0; u < shrinks.count(); u++) shrinks.shrink(u, thread_count());
        multiply_linear(linear, thread_number(), thread_count());
    }
}
PLAYED(timbre_linear_low_rank)
