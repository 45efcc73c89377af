// y[row] += weight S x[row] with S in slices (sliced ELLPACK), for adapters with S and rows of their own.
//
// A slice is eight outputs with about as many entries each: its steps are an entry of each of them, side by side.
// So no branch is on how many entries an output has, and each entry takes one multiplication of its own. First all
// sums are made, in the order of slices; then outputs fetch theirs. A row's sums are the same ones in the same
// order whatever other rows there are, and in any format of the values.
#include <algorithm>

#include "sparse_lines.h"

constexpr int VECTORS = 4;  // Of rows side by side, of which all sums stay in registers.
constexpr int MOST_ROWS = VECTORS * LANES;
constexpr int FEWEST_ROWS = 3;  // That are faster side by side, in a vector that may have room left, than one by one.

// Where a slice begins.
struct Place {
    int64_t slice, step;
};

// Where the share of a thread begins, of shares with about as many steps; the last one's end has no step.
static Place place_of(const Slices &matrix, int64_t slices, int thread, int threads) {
    if (thread == 0) return {0, 0};
    if (thread == threads) return {slices, 0};
    int64_t total = 0;
    for (int64_t s = 0; s < slices; s++) total += matrix.lengths[s];
    Place place = {0, 0};
    while (place.slice < slices && place.step < total * thread / threads) place.step += matrix.lengths[place.slice++];
    return place;
}

// One step: an output's vector has its product in the output's own lane, and in the others what nobody reads.
template <typename Number>
static inline void add_step(Lanes sums[LANES], const Number *values, const uint16_t *columns, const float *v) {
    const Lanes entries = load(values);
    uint32_t pairs[LANES / 2];  // Reading columns one by one would keep x waiting.
    std::memcpy(pairs, columns, sizeof pairs);
#pragma GCC unroll 4
    for (int j = 0; j < LANES / 2; j++) {
        add_product(sums[2 * j], all(v[uint16_t(pairs[j])]), entries);
        add_product(sums[2 * j + 1], all(v[pairs[j] >> 16]), entries);
    }
}

static inline Lanes own_lanes(const Lanes sums[LANES]) {
    const Integers place = {0, 1, 2, 3, 4, 5, 6, 7};
    Lanes found = sums[0];
#pragma GCC unroll 8
    for (int j = 1; j < LANES; j++) found = place == j ? sums[j] : found;
    return found;
}

// sums = weight S v for the slices from `begin` to `end`. As many entries of the next matrix are brought near
// meanwhile; where it has fewer, that does nothing.
template <typename Number>
static void multiply_row(
    const Slices &matrix, const Slices &next, const Number *values, Place begin, Place end, const float *v,
    float weight, float *sums
) {
    const uint16_t *columns = matrix.columns + begin.step * LANES;
    values += begin.step * LANES;
    int64_t to_values = intptr_t(next.values.first) - intptr_t(matrix.values.first);
    int64_t to_columns = intptr_t(next.columns) - intptr_t(matrix.columns);
    const auto bring = [&] {
        __builtin_prefetch((const char *)values + to_values, 0, 2);
        __builtin_prefetch((const char *)columns + to_columns, 0, 2);
    };
    asm("" : "+r"(v), "+r"(to_values), "+r"(to_columns));  // The compiler would make them anew at each step.
    sums += begin.slice * LANES;
    const uint16_t *const last = matrix.lengths + end.slice;
    for (const uint16_t *length = matrix.lengths + begin.slice; length < last; length++, sums += LANES) {
        Lanes totals[LANES] = {};
        int64_t left = *length;
        for (; left >= 2; left -= 2, values += 2 * LANES, columns += 2 * LANES) {
            add_step(totals, values, columns, v);
            bring();
            add_step(totals, values + LANES, columns + LANES, v);
        }
        if (left) {
            add_step(totals, values, columns, v);
            bring();
            values += LANES, columns += LANES;
        }
        store(sums, own_lanes(totals) * weight);
    }
}

static void add_row(const Slices &matrix, const Slices &next, const float *sums, float *to, Share own) {
    int64_t o = own.begin;
    for (; o + LANES <= own.end; o += LANES) {
        __builtin_prefetch(next.ranks + o, 0, 2);
        const uint16_t *r = matrix.ranks + o;
        Lanes found;
        for (int j = 0; j < LANES; j++) found[j] = sums[r[j]];
        store(to + o, load(to + o) + found);
    }
    for (; o < own.end; o++) to[o] += sums[matrix.ranks[o]];
}

// sums [outputs in the order of slices, V LANES] = S v of as many rows, which lie side by side.
template <int V, typename Number>
static void multiply_rows(
    const Slices &matrix, const Number *values, Place begin, Place end, const float *lanes, float *sums
) {
    constexpr int OUTPUTS = LANES / V;  // At once: no addition waits for the last.
    const uint16_t *columns = matrix.columns + begin.step * LANES;
    values += begin.step * LANES;
    sums += begin.slice * LANES * V * LANES;
    for (int64_t s = begin.slice; s < end.slice; s++) {
        const int64_t count = matrix.lengths[s] * LANES;
        for (int j = 0; j < LANES; j += OUTPUTS) {
            Lanes totals[OUTPUTS][V] = {};
            for (int64_t k = j; k < count; k += LANES)
                for (int o = 0; o < OUTPUTS; o++) {
                    const Lanes entry = all(value(values[k + o]));
                    const float *inputs = lanes + columns[k + o] * V * LANES;
                    for (int v = 0; v < V; v++) add_product(totals[o][v], load(inputs + v * LANES), entry);
                }
            for (int o = 0; o < OUTPUTS; o++)
                for (int v = 0; v < V; v++, sums += LANES) store(sums, totals[o][v]);
        }
        values += count, columns += count;
    }
}

// Eight rows of y at a time: lines of more would drive each other out of the cache.
template <int V>
static void add_rows(const Slices &matrix, const Rows &rows, const float *sums, float *y, int64_t out, Share own) {
    for (int v = 0; v < V; v++, sums += LANES) {
        const int64_t *to = rows.rows + v * LANES, count = std::min(rows.count - v * LANES, int64_t(LANES));
        Lanes scale = {};
        for (int n = 0; n < count; n++) scale[n] = rows.weights[v * LANES + n];
        const auto of = [&](int64_t o) { return load(sums + matrix.ranks[o] * V * LANES) * scale; };
        int64_t o = own.begin;
        for (; o + LANES <= own.end; o += LANES) {
            Lanes block[LANES];
            for (int j = 0; j < LANES; j++) block[j] = of(o + j);
            transpose(block);
            for (int n = 0; n < count; n++) store(y + to[n] * out + o, load(y + to[n] * out + o) + block[n]);
        }
        for (; o < own.end; o++)
            for (int n = 0; n < count; n++) y[to[n] * out + o] += of(o)[n];
    }
}

// Rows of one adapter that read its entries together, and what is read after them.
struct RowBlock {
    const Slices *own, *next;
    Rows rows;
    int64_t width;  // Rows that there is room for.
};

static std::vector<RowBlock> blocks_of(const std::vector<Use<Slices>> &uses) {
    std::vector<RowBlock> blocks;
    for (size_t u = 0; u < uses.size(); u++) {
        const Rows &rows = *uses[u].rows;
        for (int64_t row = 0, width; row < rows.count; row += width) {
            const int64_t left = rows.count - row;
            width = left >= MOST_ROWS ? MOST_ROWS : left >= FEWEST_ROWS ? LANES : 1;
            const Rows own = {rows.rows + row, rows.weights + row, std::min(width, left)};
            blocks.push_back({uses[u].part, uses[std::min(u + 1, uses.size() - 1)].part, own, width});
        }
    }
    return blocks;
}

// A thread for each block, so that no row is added to by two of them; none where some thread would have nothing.
static std::vector<int> threads_of(const std::vector<RowBlock> &blocks, int threads) {
    std::vector<int> of_rows, found;
    std::vector<int64_t> loads(threads, 0);
    for (const RowBlock &block : blocks) {
        const int64_t *rows = block.rows.rows, *end = rows + block.rows.count;
        int own = -1;
        for (const int64_t *row = rows; row < end; row++) {
            if (*row >= int64_t(of_rows.size())) of_rows.resize(*row + 1, -1);
            const int known = of_rows[*row];
            if (own >= 0 && known >= 0 && known != own) return {};
            own = std::max(own, known);
        }
        if (own < 0) own = std::min_element(loads.begin(), loads.end()) - loads.begin();
        for (const int64_t *row = rows; row < end; row++) of_rows[*row] = own;
        loads[own] += block.rows.count;
        found.push_back(own);
    }
    return *std::min_element(loads.begin(), loads.end()) ? found : std::vector<int>();
}

// What one of so many threads does of a block.
template <typename Number> struct SparseWorker {
    const Number *x;
    int64_t in;
    float *y;
    int64_t out;
    int thread, threads;

    void multiply(const RowBlock &block, float *sums) {
        const Slices &matrix = *block.own;
        const int64_t slices = (out + LANES - 1) / LANES, width = block.width;
        const Place begin = place_of(matrix, slices, thread, threads);
        const Place end = place_of(matrix, slices, thread + 1, threads);
        thread_local Scratch scratch;  // Kept: fresh memory costs more than what is written to it.
        float *lanes = scratch.of(in * width);
        const Share own = {begin.slice, end.slice};
        if (are_in_lines(x, block.rows.count))
            return multiply_lines(matrix, own, begin.step, x, in, block.rows.rows, lanes, sums);
        const float *row = width == 1 ? floats(x + block.rows.rows[0] * in, in, lanes) : nullptr;
        for (int64_t n = 0; width > 1 && n < width; n += LANES)
            side_by_side(x, in, block.rows.rows + n, std::min(block.rows.count - n, int64_t(LANES)), lanes + n, width);
        as_they_lie(matrix.values, [&](auto values) {
            if (width == 1)
                multiply_row(matrix, *block.next, values, begin, end, row, block.rows.weights[0], sums);
            else if (width == LANES)
                multiply_rows<1>(matrix, values, begin, end, lanes, sums);
            else
                multiply_rows<VECTORS>(matrix, values, begin, end, lanes, sums);
        });
    }

    void add(const RowBlock &block, const float *sums) const {
        const Share own = share(out, thread, threads, LANES);
        if (are_in_lines(x, block.rows.count))
            add_lines(*block.own, block.rows, sums, y, out, own);
        else if (block.width == 1)
            add_row(*block.own, *block.next, sums, y + block.rows.rows[0] * out, own);
        else if (block.width == LANES)
            add_rows<1>(*block.own, block.rows, sums, y, out, own);
        else
            add_rows<VECTORS>(*block.own, block.rows, sums, y, out, own);
    }
};

template <typename Number>
static void add_sparse(
    const std::vector<RowBlock> &blocks, const Number *x, int64_t in, float *y, int64_t out, int threads
) {
    const auto size = [out](const RowBlock &block) { return (out + LANES - 1) / LANES * LANES * block.width; };
    if (threads == 1) {
        SparseWorker<Number> worker = {x, in, y, out, 0, 1};
        thread_local Scratch sums;
        for (const RowBlock &block : blocks) {
            worker.multiply(block, sums.of(size(block)));
            worker.add(block, sums.of(size(block)));
        }
        return;
    }
    int64_t most = 0;
    for (const RowBlock &block : blocks) most = std::max(most, size(block));
    Scratch shared;
    float *sums = shared.of(most);
#pragma omp parallel num_threads(threads)
    {
        const int thread = thread_number(), others = thread_count();
        const std::vector<int> owners = threads_of(blocks, others);
        SparseWorker<Number> together = {x, in, y, out, thread, others}, alone = {x, in, y, out, 0, 1};
        thread_local Scratch own;
        for (size_t b = 0; b < blocks.size(); b++) {
            const RowBlock &block = blocks[b];
            if (!owners.empty()) {
                if (owners[b] != thread) continue;
                alone.multiply(block, own.of(size(block)));
                alone.add(block, own.of(size(block)));
                continue;
            }
            together.multiply(block, sums);
#pragma omp barrier
            together.add(block, sums);
            if (b + 1 < blocks.size()) {
#pragma omp barrier
            }
        }
    }
}

extern "C" void timbre_sparse(
    const Uses<Slices> *uses, const void *x, int64_t format, int64_t rows, int64_t in, float *y, int64_t out, int threads
) {
    const std::vector<RowBlock> blocks = blocks_of(uses->with_rows());
    threads = uses->threads(rows, threads);
    if (format == BFLOAT16) add_sparse(blocks, static_cast<const BFloat16 *>(x), in, y, out, threads);
    else add_sparse(blocks, static_cast<const float *>(x), in, y, out, threads);
}
PLAYED(timbre_sparse)
