// y[row] += weight (w1 ⊗ w2) x[row], for adapters with w1, w2 and rows of their own: Y += weight w1 X w2ᵀ, of x[row] as
// X [m, n] and y[row] as Y [l, k].
//
// Both matrices are read where they lie, w2 once for some rows. They are small, and of any shapes: products lie in
// whole vectors, of which the last lanes may be nobody's. A row's sums are the same ones in the same order whatever
// other rows there are.
#include <algorithm>

#include "lanes.h"

// Of rows that follow one another.
struct SmallMatrix {
    const float *first;
    int64_t rows, columns;
};

struct Kronecker {
    SmallMatrix w1;
    SmallMatrix w2[2];  // Itself, or the factors whose product it is, as x meets them; else of no rows.
    int64_t count;  // Of them.
    int64_t before;  // Of them, those that x meets before w1.
};

constexpr int SUMS = 12;  // Vectors that stay in registers.
constexpr int MOST_ABREAST = 3;  // Of them, of one row.
constexpr int64_t ROWS = 32, NUMBERS = 1 << 14;  // Of x, for which w2 is laid out together, if there are so many.
constexpr int64_t MOST_ASKED = 4096;  // Bytes of a matrix; what reads more asks for it in time.

template <int N> using Count = std::integral_constant<int, N>;

static inline int64_t in_lanes(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

// Rows of as many lanes as a number of columns takes: number (i, j) of `panel` numbers for each LANES columns is at
// first[j / LANES * panel + i * row + j % LANES].
struct Panels {
    const float *first;
    int64_t row, panel;
};

// c [R, V lanes] = a b.
template <int R, int V>
static inline void multiply(const float *a, int64_t step, int64_t inner, Panels b, float *c, int64_t c_step) {
    Lanes sums[R][V] = {};
    for (int64_t i = 0; i < inner; i++) {
        Lanes own[V];
        for (int v = 0; v < V; v++) keep(own[v] = load(b.first + v * b.panel + i * b.row));
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) add_product(sums[r][v], all(a[r * step + i]), own[v]);
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) store(c + r * c_step + v * LANES, sums[r][v]);
}

// c [rows, V lanes] = a b, of a's rows `step` numbers apart.
template <int V>
static void multiply_rows(SmallMatrix a, int64_t step, Panels b, float *c, int64_t c_step) {
    int64_t row = 0;
    const auto many = [&](auto count) {
        for (; row + count <= a.rows; row += count)
            multiply<count, V>(a.first + row * step, step, a.columns, b, c + row * c_step, c_step);
    };
    if constexpr (V == 1) many(Count<8>());
    many(Count<SUMS / MOST_ABREAST>());
    many(Count<2>());
    many(Count<1>());
}

// What `visit` does to numbers of vectors that are abreast, for as many columns.
template <typename Visit> static void abreast(int64_t columns, Visit visit) {
    int64_t vectors = (columns + LANES - 1) / LANES, first = 0;
    for (; first + MOST_ABREAST <= vectors; first += MOST_ABREAST) visit(Count<MOST_ABREAST>(), first * LANES);
    if (vectors - first == 2) visit(Count<2>(), first * LANES);
    if (vectors - first == 1) visit(Count<1>(), first * LANES);
}

// A matrix of each of some rows of the batch, below one another.
struct Stack {
    SmallMatrix each;
    int64_t step;  // From one row to the next.
    int64_t count;
};

// What a thread makes of them.
class KroneckerWorker {
  public:
    // All factors times x.
    Stack product(const Kronecker &part, Stack x) {
        for (int64_t f = 0; f < part.count; f++) {
            if (f == part.before) x = times_w1(part.w1, x);
            x = times(x, part.w2[f]);
        }
        return part.before == part.count ? times_w1(part.w1, x) : x;
    }

  private:
    // X wᵀ.
    Stack times(const Stack &x, const SmallMatrix &w) {
        float *to = other(x.count * x.each.rows * in_lanes(w.rows));
        float *lanes = panels.of(MOST_ABREAST * LANES * w.columns);
        const Stack made = {{to, x.each.rows, w.rows}, in_lanes(w.rows), x.count};
        const SmallMatrix all_rows = {x.each.first, x.count * x.each.rows, x.each.columns};
        const int64_t panel = w.columns * LANES, order[LANES] = {0, 1, 2, 3, 4, 5, 6, 7};
        abreast(w.rows, [&](auto vectors, int64_t first) {
            for (int64_t v = 0, o = first; v < vectors; v++, o += LANES)
                side_by_side(
                    w.first + o * w.columns, w.columns, order, std::min<int64_t>(w.rows - o, LANES), lanes + v * panel
                );
            multiply_rows<vectors>(all_rows, x.step, {lanes, LANES, panel}, to + first, made.step);
        });
        return made;
    }

    // w1 X.
    Stack times_w1(const SmallMatrix &w1, Stack x) {
        if (x.step % LANES) x = spread(x);
        float *to = other(x.count * w1.rows * x.step);
        const Stack made = {{to, w1.rows, x.each.columns}, x.step, x.count};
        for (int64_t n = 0; n < x.count; n++, to += w1.rows * x.step)
            abreast(x.each.columns, [&](auto vectors, int64_t first) {
                const float *from = x.each.first + n * x.each.rows * x.step + first;
                multiply_rows<vectors>(w1, w1.columns, {from, x.step, LANES}, to + first, x.step);
            });
        return made;
    }

    // The same in whole vectors.
    Stack spread(const Stack &x) {
        const int64_t step = in_lanes(x.each.columns), rows = x.count * x.each.rows;
        float *to = other(rows * step);
        for (int64_t row = 0; row < rows; row++) {
            const float *from = x.each.first + row * x.step;
            std::fill(std::copy(from, from + x.each.columns, to + row * step), to + (row + 1) * step, 0.0f);
        }
        return {{to, x.each.rows, x.each.columns}, step, x.count};
    }

    // Memory that the last product does not lie in.
    float *other(int64_t size) { return products[number ^= 1].of(size); }

    Scratch products[2], panels;
    int number = 0;
};

static void add(Stack product, const float *weights, float *y) {
    auto [from, rows, columns] = product.each;
    if (columns == product.step) columns *= rows, rows = 1;
    for (int64_t n = 0; n < product.count; n++)
        for (int64_t row = 0; row < rows; row++, from += in_lanes(columns), y += columns) {
            int64_t j = 0;
            for (; j + LANES <= columns; j += LANES) store(y + j, load(y + j) + load(from + j) * weights[n]);
            for (; j < columns; j++) y[j] += from[j] * weights[n];
        }
}

// Brings near what is read first of the next adapter's matrices. As a call it would be left out: it changes nothing.
__attribute__((always_inline)) static inline void ask(const Kronecker &next) {
    for (const SmallMatrix &matrix : {next.w1, next.w2[0], next.w2[1]}) {
        const int64_t size = std::min<int64_t>(matrix.rows * matrix.columns * sizeof(float), MOST_ASKED);
        for (int64_t i = 0; i < size; i += LINE)
            __builtin_prefetch(reinterpret_cast<const char *>(matrix.first) + i, 0, 2);
    }
}

// x [rows, in] and y [rows, out] are contiguous.
extern "C" void timbre_kronecker(
    const Uses<Kronecker> *all, const float *x, int64_t rows, int64_t in, float *y, int64_t out, int threads
) {
    const auto uses = all->with_rows();
    threads = all->threads(rows, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        KroneckerWorker worker;
        const Share own = share(rows, thread_number(), thread_count(), 1);
        for (const auto &use : uses) {
            const Kronecker &part = *use.part;
            if (&use != &uses.back()) ask(*(&use + 1)->part);
            const int64_t m = part.w1.columns, most = std::max(ROWS / m, NUMBERS / in) + 1;
            const int64_t *const begin = use.rows->rows;
            const int64_t *row = std::lower_bound(begin, begin + use.rows->count, own.begin);
            const int64_t *const end = std::lower_bound(row, begin + use.rows->count, own.end);
            while (row < end) {
                int64_t count = 1;
                while (count < most && row + count < end && row[count] == *row + count) count++;
                const Stack from = {{x + *row * in, m, in / m}, in / m, count};
                add(worker.product(part, from), use.rows->weights + (row - begin), y + *row * out);
                row += count;
            }
        }
    }
}
PLAYED(timbre_kronecker)
