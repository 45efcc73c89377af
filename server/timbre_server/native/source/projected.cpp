// y[row] += weight after ∘ Q (core ∘ P (before ∘ x[row])), for adapters whose P and Q are shared.
//
// Each matrix is read where it lies, once for up to sixteen rows, which lie side by side as lanes; where there
// are few rows, its own rows are the lanes.
#include "lanes.h"

struct SharedMatrix {
    const float *values;
    int64_t rows, columns, stride;
};

// The rows of one adapter at one product with a matrix, and what they are multiplied by. Null: ones.
struct ProjectedUse {
    Rows rows;
    const float *before;  // [columns]
    const float *after;   // [rows of the matrix]
    int64_t between;      // Where z, what is between P and Q, has the first of its rows; each takes `width`.
    int64_t width;
    int64_t has_own;      // z has the adapter's rows alone, in their order; else those of the whole batch.
};

// to += after ∘ M (weight before ∘ from)
struct Product {
    const float *from, *before, *after;
    float weight;
    float *to;
};

constexpr int SUMS = 12;  // As many vectors as registers hold beside what they are summed of.
constexpr int FEW = 5;  // Up to so many rows the matrix's own are the lanes.
constexpr int64_t COLUMNS = LINE / sizeof(float);  // That the processor fetches at once.

struct alignas(64) Column {
    float lanes[2 * LANES];
};

static void take(const Product &own, int64_t columns, float *to, int64_t step) {
    for (int64_t i = 0; i < columns; i++)
        to[i * step] = own.before ? own.weight * own.before[i] * own.from[i] : own.weight * own.from[i];
}

template <int M, int WIDTH>
static void add(const Product *products, int count, int64_t row, const float *sums) {
    for (int n = 0; n < count; n++)
        for (int m = 0; m < M; m++) {
            const float total = sums[m * WIDTH + n];
            products[n].to[row + m] += products[n].after ? products[n].after[row + m] * total : total;
        }
}

// M rows of the matrix with N vectors of products, which `panel` has side by side: [columns, N, LANES].
template <int M, int N>
static void side_by_side(
    const SharedMatrix &matrix, Share own, const Product *products, int count, const float *panel
) {
    for (; own.begin + M <= own.end; own.begin += M) {
        const float *rows[M];
        for (int m = 0; m < M; m++) rows[m] = matrix.values + (own.begin + m) * matrix.stride;
        Lanes sums[M][N] = {};
        for (int64_t begin = 0; begin < matrix.columns; begin += COLUMNS) {
            for (int m = 0; m < M; m++) __builtin_prefetch(rows[m] + M * matrix.stride + begin);
            const int64_t end = begin + COLUMNS < matrix.columns ? begin + COLUMNS : matrix.columns;
            for (int64_t i = begin; i < end; i++) {
                Lanes from[N];
                for (int n = 0; n < N; n++) from[n] = load(panel + (i * N + n) * LANES);
                for (int m = 0; m < M; m++)
                    for (int n = 0; n < N; n++) sums[m][n] += all(rows[m][i]) * from[n];
            }
        }
        float found[M * N * LANES];
        for (int m = 0; m < M; m++)
            for (int n = 0; n < N; n++) store(found + (m * N + n) * LANES, sums[m][n]);
        add<M, N * LANES>(products, count, own.begin, found);
    }
    if constexpr (M > 1) side_by_side<M / 2, N>(matrix, own, products, count, panel);
}

// M rows of the matrix with N products, which `panel` has one after the other: [N, columns].
template <int M, int N>
static void one_by_one(const SharedMatrix &matrix, Share own, const Product *products, const float *panel) {
    const int64_t columns = matrix.columns;
    for (; own.begin + M <= own.end; own.begin += M) {
        constexpr int VECTORS = (M * N + LANES - 1) / LANES;
        const float *rows = matrix.values + own.begin * matrix.stride;
        Lanes sums[VECTORS * LANES] = {};
        int64_t i = 0;
        for (; i + LANES <= columns; i += LANES)
            for (int m = 0; m < M; m++) {
                const Lanes factor = load(rows + m * matrix.stride + i);
                for (int n = 0; n < N; n++) sums[m * N + n] += factor * load(panel + n * columns + i);
            }
        float found[VECTORS * LANES];
        for (int v = 0; v < VECTORS; v++) store(found + v * LANES, sums_of(sums + v * LANES));
        for (; i < columns; i++)
            for (int m = 0; m < M; m++)
                for (int n = 0; n < N; n++)
                    found[m * N + n] += rows[m * matrix.stride + i] * panel[n * columns + i];
        add<M, N>(products, N, own.begin, found);
    }
    if constexpr (M > 1) one_by_one<M / 2, N>(matrix, own, products, panel);
}

// As many of the first products as suit; says how many.
static int64_t some(const SharedMatrix &matrix, Share own, const Product *products, int64_t left, float *panel) {
    if (left <= FEW) {
        const int64_t count = left == FEW ? 3 : left < 4 ? left : 2;
        for (int64_t n = 0; n < count; n++) take(products[n], matrix.columns, panel + n * matrix.columns, 1);
        if (count == 3) one_by_one<4, 3>(matrix, own, products, panel);
        if (count == 2) one_by_one<4, 2>(matrix, own, products, panel);
        if (count == 1) one_by_one<8, 1>(matrix, own, products, panel);
        return count;
    }
    const int64_t width = left > LANES + FEW ? 2 * LANES : LANES, count = left < width ? left : width;
    if (count < width) std::memset(panel, 0, matrix.columns * width * sizeof *panel);
    for (int64_t n = 0; n < count; n++) take(products[n], matrix.columns, panel + n, width);
    if (width == LANES)
        side_by_side<SUMS, 1>(matrix, own, products, count, panel);
    else
        side_by_side<SUMS / 2, 2>(matrix, own, products, count, panel);
    return count;
}

static void multiply(const SharedMatrix &matrix, const std::vector<Product> &products, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Share own = share(matrix.rows, thread_number(), thread_count(), SUMS);
        std::vector<Column> panel(matrix.columns);
        for (size_t first = 0; first < products.size();)
            first += some(matrix, own, &products[first], products.size() - first, panel[0].lanes);
    }
}

static std::vector<Product> products_of(
    const ProjectedUse *uses, int64_t count, const float *x, int64_t in, float *z, float *y, int64_t out
) {
    std::vector<Product> found;
    for (const ProjectedUse *use = uses; use < uses + count; use++)
        for (int64_t n = 0; n < use->rows.count; n++) {
            const int64_t row = use->rows.rows[n];
            float *between = z + use->between + (use->has_own ? n : row) * use->width;
            const float weight = use->rows.weights ? use->rows.weights[n] : 1;
            found.push_back(
                {x ? x + row * in : between, use->before, use->after, weight, y ? y + row * out : between}
            );
        }
    return found;
}

// z += P (before ∘ x); x [T, columns] is contiguous.
extern "C" void timbre_projected_in(
    const SharedMatrix *p, const ProjectedUse *uses, int64_t count, const float *x, float *z, int threads
) {
    multiply(*p, products_of(uses, count, x, p->columns, z, nullptr, 0), threads);
}
PLAYED(timbre_projected_in)

// y += weight after ∘ Q (before ∘ z); y [T, rows of Q] is contiguous.
extern "C" void timbre_projected_out(
    const SharedMatrix *q, const ProjectedUse *uses, int64_t count, float *z, float *y, int threads
) {
    multiply(*q, products_of(uses, count, nullptr, 0, z, y, q->rows), threads);
}
PLAYED(timbre_projected_out)
