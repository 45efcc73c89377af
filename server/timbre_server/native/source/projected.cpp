// y[row] += weight Σ_n outer_n ∘ Q_n (core_n ∘ P_n (inner_n ∘ x[row])), for adapters whose P and Q are shared.
//
// Each matrix is read where it lies, once for many products with it: the sums of some of its rows with some of what
// they are multiplied by stay in registers. A sum has the same terms in the same order whatever other rows and
// adapters there are.
#include <algorithm>
#include <tuple>

#include "wide.h"

struct Matrix {
    const float *values;
    int64_t rows, columns, stride;

    auto fields() const { return std::tie(values, rows, columns, stride); }
    bool operator==(const Matrix &other) const { return fields() == other.fields(); }
    bool operator<(const Matrix &other) const { return fields() < other.fields(); }
};

// All blocks of P are one matrix, as are those of Q; but where inner vectors come before P, or outer ones after Q, it
// is one block that all have in common.
struct Projected {
    Matrix p, q;
    const float *core;   // [blocks, size]
    const float *inner;  // [blocks, in], or null
    const float *outer;  // [blocks, out], or null
    int64_t blocks, size;
};

// to += after ∘ M (weight before ∘ from); null: ones.
struct Product {
    const Matrix *matrix;
    float weight;
    const float *before, *from, *after;
    float *to;
};

constexpr int SIDE = LANES;  // Rows of a matrix that are summed together: their sums are one vector.
constexpr int AT_ONCE = WIDTH > LANES ? 3 : 1;  // Products, as many as there are registers for.
constexpr int64_t MANY = 48;  // Products that a part of a matrix stays in the cache for.
constexpr int64_t COLUMNS = 640;  // Of which SIDE rows do so, beside what they are multiplied by.
constexpr int64_t AHEAD = 64;  // Numbers of an outer vector, after which they are asked for.
constexpr int64_t FLOATS = LINE / sizeof(float);

// SIDE rows of some columns of a matrix; the last row again where there are fewer.
struct Strip {
    const float *rows[SIDE];
    int64_t first;  // Of the rows.
    int64_t count;
    int64_t whole;  // Columns that fill registers.
    bool has_rest;
    float rest[SIDE][WIDTH];  // The other columns, and zeros.

    Strip(const Matrix &matrix, int64_t row, Share columns)
        : first(row), count(std::min<int64_t>(matrix.rows - row, SIDE)) {
        const int64_t size = columns.end - columns.begin;
        whole = size / WIDTH * WIDTH;
        has_rest = whole < size;
        for (int r = 0; r < SIDE; r++)
            rows[r] = matrix.values + std::min(row + r, matrix.rows - 1) * matrix.stride + columns.begin;
        if (!has_rest) return;
        std::memset(rest, 0, sizeof rest);
        for (int r = 0; r < SIDE; r++) std::copy(rows[r] + whole, rows[r] + size, rest[r]);
    }

    // Asks for what the next strip has in the place of some rows.
    void ask_for_next(int64_t begin, int64_t end, int64_t stride) const {
        for (int64_t r = begin; r < end; r++)
            for (int64_t i = 0; i < whole; i += FLOATS) __builtin_prefetch(rows[r] + SIDE * stride + i, 0, 2);
    }
};

// A row of the matrix is read into a register: the compiler would read it from memory for each product.
template <int N>
static inline void add_products(
    Wide sums[N][SIDE], const float *const rows[SIDE], int64_t i, const float *panel, int64_t stride
) {
    Wide from[N];
    for (int n = 0; n < N; n++) from[n] = wide(panel + n * stride);
    for (int r = 0; r < SIDE; r++) {
        Wide row = wide(rows[r] + i);
#ifdef __x86_64__
        asm("" : "+v"(row));
#endif
        for (int n = 0; n < N; n++) add_product(sums[n][r], row, from[n]);
    }
}

// A strip with N products, which `panel` has: [N, stride].
template <int N> static void tile(const Strip &strip, const float *panel, int64_t stride, const Product *products) {
    for (int n = 0; n < N; n++)
        if (products[n].after) __builtin_prefetch(products[n].after + strip.first + AHEAD);
    Wide sums[N][SIDE] = {};
    int64_t i = 0;
    for (; i < strip.whole; i += WIDTH) add_products<N>(sums, strip.rows, i, panel + i, stride);
    if (strip.has_rest) {
        const float *rest[SIDE];
        for (int r = 0; r < SIDE; r++) rest[r] = strip.rest[r];
        add_products<N>(sums, rest, 0, panel + i, stride);
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
        Lanes each[SIDE];
        for (int r = 0; r < SIDE; r++) each[r] = folded(sums[n][r]);
        const Lanes totals = sums_of(each);
        const float *after = products[n].after ? products[n].after + strip.first : nullptr;
        float *to = products[n].to + strip.first;
        if (strip.count == SIDE) {
            store(to, load(to) + (after ? load(after) * totals : totals));
            continue;
        }
        float each_total[SIDE];
        store(each_total, totals);
        for (int r = 0; r < strip.count; r++) to[r] += after ? after[r] * each_total[r] : each_total[r];
    }
}

// `count` of them, which are N at most.
template <int N>
static void tile_of(int64_t count, const Strip &strip, const float *panel, int64_t stride, const Product *products) {
    if constexpr (N > 1)
        if (count < N) return tile_of<N - 1>(count, strip, panel, stride, products);
    tile<N>(strip, panel, stride, products);
}

// [stride]: what some columns of a matrix are multiplied by, and zeros.
static void take(const Product &own, Share columns, float *to, int64_t stride) {
    const int64_t size = columns.end - columns.begin;
    const float *from = own.from + columns.begin, *before = own.before ? own.before + columns.begin : nullptr;
    for (int64_t i = 0; i < size; i++) to[i] = before ? own.weight * before[i] * from[i] : own.weight * from[i];
    std::fill(to + size, to + stride, 0.0f);
}

// Some columns of rows of a matrix with MANY products at most.
static void multiply(const Product *products, int64_t count, Share rows, Share columns, Scratch &scratch) {
    const Matrix &matrix = *products->matrix;
    const int64_t stride = (columns.end - columns.begin + WIDTH - 1) / WIDTH * WIDTH;
    float *panel = scratch.of(count * stride);
    for (int64_t n = 0; n < count; n++) take(products[n], columns, panel + n * stride, stride);
    for (int64_t row = rows.begin; row < rows.end; row += SIDE) {
        const Strip strip(matrix, row, columns);
        int64_t n = 0;
        for (int64_t tiles = (count + AT_ONCE - 1) / AT_ONCE; tiles; tiles--) {  // Of nearly one size.
            const int64_t size = (count - n + tiles - 1) / tiles;
            strip.ask_for_next(SIDE * n / count, SIDE * (n + size) / count, matrix.stride);
            tile_of<AT_ONCE>(size, strip, panel + n * stride, stride, products + n);
            n += size;
        }
    }
}

// All of one matrix. Columns come first: what is added to one number is added in the same order, however many
// products there are.
static void multiply(const Product *products, int64_t count, int threads) {
    const Matrix &matrix = *products->matrix;
    const int pieces = (matrix.columns + COLUMNS - 1) / COLUMNS;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Share rows = share(matrix.rows, thread_number(), thread_count(), SIDE);
        Scratch scratch;
        for (int piece = 0; piece < pieces; piece++)
            for (int64_t first = 0; first < count; first += MANY) {
                const Share columns = share(matrix.columns, piece, pieces, WIDTH);
                multiply(products + first, std::min(MANY, count - first), rows, columns, scratch);
            }
    }
}

// Matrix after matrix, in an order that does not follow from which others are used.
static void multiply_all(std::vector<Product> &products, int threads) {
    const auto is_before = [](const Product &a, const Product &b) { return *a.matrix < *b.matrix; };
    std::stable_sort(products.begin(), products.end(), is_before);
    for (size_t first = 0, end = 0; first < products.size(); first = end) {
        while (end < products.size() && *products[end].matrix == *products[first].matrix) end++;
        multiply(&products[first], end - first, threads);
    }
}

// What is made of x for all members: x itself as floats, [T, in], and P x for each P in use, [T, rows of P].
struct Shrunk {
    struct Place {
        const Matrix *p;
        float *first;
    };
    std::vector<Place> places;

    Shrunk(const std::vector<Use<Matrix>> &uses, float *z, int64_t rows, int64_t in) {
        z += rows * in;
        for (const auto &use : uses)
            if (of(*use.part) == nullptr) {
                places.push_back({use.part, z});
                z += rows * use.part->rows;
            }
    }

    float *of(const Matrix &p) const {
        for (const Place &place : places)
            if (*place.p == p) return place.first;
        return nullptr;
    }
};

// z as above, which has room for every P, in use or not; rows that nobody uses it for are left as they are.
extern "C" void timbre_projected_in(
    const Uses<Matrix> *all, const void *x, int64_t format, int64_t rows, int64_t in, float *z, int threads
) {
    as_they_lie({x, format}, [&](auto numbers) {
        if (const float *found = floats(numbers, rows * in, z); found != z) std::copy_n(found, rows * in, z);
    });
    const auto uses = all->with_rows();
    const Shrunk shrunk(uses, z, rows, in);
    std::vector<Product> products;
    for (const auto &place : shrunk.places) {
        std::vector<bool> is_used(rows);
        for (const auto &use : uses)
            if (*use.part == *place.p)
                for (int64_t n = 0; n < use.rows->count; n++) is_used[use.rows->rows[n]] = true;
        for (int64_t row = 0; row < rows; row++) {
            if (!is_used[row]) continue;
            float *to = place.first + row * place.p->rows;
            std::fill_n(to, place.p->rows, 0.0f);
            products.push_back({place.p, 1, nullptr, z + row * in, nullptr, to});
        }
    }
    multiply_all(products, all->threads(rows, threads));
}
PLAYED(timbre_projected_in)

// Of one member; y [rows, out] is contiguous.
extern "C" void timbre_projected(
    const Uses<Projected> *all, const Uses<Matrix> *shrinks, float *z, int64_t rows, int64_t in, float *y, int64_t out,
    int threads
) {
    const auto uses = all->with_rows();
    const Shrunk shrunk(shrinks->with_rows(), z, rows, in);
    int64_t alone = 0;
    for (const auto &use : uses)
        if (use.part->inner) alone += use.rows->count * use.part->blocks * use.part->size;
    std::vector<float> own(alone);  // What is between P and Q, where P has a row for each use.
    float *next = own.data();
    std::vector<Product> ins, outs;
    for (const auto &use : uses) {
        const Projected &part = *use.part;
        const int64_t width = part.blocks * part.size;
        float *const first = part.inner ? nullptr : shrunk.of(part.p);
        for (int64_t n = 0; n < use.rows->count; n++) {
            const int64_t row = use.rows->rows[n];
            const float weight = use.rows->weights[n];
            float *between = first ? first + row * width : next, *to = y + row * out;
            for (int64_t b = 0; part.inner && b < part.blocks; b++, next += part.size)
                ins.push_back({&part.p, 1, part.inner + b * in, z + row * in, nullptr, next});
            if (part.outer == nullptr) outs.push_back({&part.q, weight, part.core, between, nullptr, to});
            for (int64_t b = 0; part.outer && b < part.blocks; b++) {
                const int64_t place = b * part.size;
                outs.push_back({&part.q, weight, part.core + place, between + place, part.outer + b * out, to});
            }
        }
    }
    threads = all->threads(rows, threads);
    multiply_all(ins, threads);
    multiply_all(outs, threads);
}
PLAYED(timbre_projected)
