// y[row, m] += weight sum_n irfft(g[m, n] rfft(x[row, n])), for adapters with blocks and rows of their own.
//
// While they are transformed, pieces of rows lie side by side, while they are multiplied, frequencies of one piece do:
// each row has an adapter's spectra of its own. Rows that have one in common read it together.
#include <algorithm>

#include "fourier.h"

struct Circulant {
    const FourierPlan *plan;
    int64_t in_pieces;
    const float *spectra;  // [pieces of the output, of the input, frequencies, 2]
};

// Numbers of a piece's spectrum.
static inline int64_t size_of(const FourierPlan &plan) { return 2 * plan.frequencies(); }

template <typename Part> struct Term {
    int64_t row;
    const Part *part;
    float weight;
};

// What rows use, row after row.
template <typename Part> struct Terms {
    std::vector<Term<Part>> all;
    std::vector<int64_t> begins;  // Of each row, and the end.

    Terms(const Uses<Part> &uses, int64_t rows) {
        std::vector<int64_t> order(rows, -1);
        int64_t count = 0;
        for (const Use<Part> &use : uses.with_rows())
            for (int64_t n = 0; n < use.rows->count; n++) {
                const int64_t row = use.rows->rows[n];
                if (order[row] < 0) order[row] = count++;
                all.push_back({row, use.part, use.rows->weights[n]});
            }
        if (int64_t(all.size()) > count)
            std::stable_sort(all.begin(), all.end(), [&](const Term<Part> &a, const Term<Part> &b) {
                return order[a.row] < order[b.row];
            });
        for (size_t t = 0; t < all.size(); t++)
            if (t == 0 || all[t].row != all[t - 1].row) begins.push_back(t);
        begins.push_back(all.size());
    }

    int64_t rows() const { return begins.size() - 1; }
    int64_t row(int64_t n) const { return all[begins[n]].row; }

    bool are_alike(int64_t n, int64_t other) const {
        const auto has_part = [](const Term<Part> &a, const Term<Part> &b) { return a.part == b.part; };
        const Term<Part> *of = all.data();
        return std::equal(of + begins[n], of + begins[n + 1], of + begins[other], of + begins[other + 1], has_part);
    }
};

template <typename Number>
static void spectra_of(const Terms<FourierPlan> &own, const Number *x, int64_t in, float *z, int threads) {
    const FourierPlan &plan = *own.all[0].part;
    const int64_t m = plan.m, length = plan.length(), size = size_of(plan);
    const int64_t pieces = in / length, count = own.rows() * pieces;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        thread_local Scratch memory;  // Kept: fresh pages cost more than what is written to them.
        const auto transform = [&](int64_t first, int64_t side, auto lanes) {
            typedef decltype(lanes) V;
            const Number *from[MOST_ROWS];
            float *to[MOST_ROWS];
            for (int64_t n = 0; n < side; n++) {
                const int64_t row = own.row((first + n) / pieces), piece = (first + n) % pieces;
                from[n] = x + row * in + piece * length;
                to[n] = z + (row * pieces + piece) * size;
            }
            float *numbers = memory.of((4 * m + size) * SIDE<V>), *X = numbers + 4 * m * SIDE<V>;
            put_side_by_side<V>(from, side, length, numbers);
            Complex<V> *packed = reinterpret_cast<Complex<V> *>(numbers);
            spectra(plan, packed, packed + m, reinterpret_cast<Complex<V> *>(X));
            take_apart<V>(X, side, size, [&](int64_t n, int64_t i, auto values) {
                std::memcpy(to[n] + i, &values, sizeof values);
            });
        };
#pragma omp for schedule(static)
        for (int64_t first = 0; first < count; first += WIDTH) {
            const int64_t side = std::min(count - first, int64_t(WIDTH));
            in_registers(side, [&](auto lanes) { transform(first, side, lanes); });
        }
    }
}

// z [rows, pieces, frequencies, 2]: the spectra of x [rows, in], twice, for the rows in use alone. x is of bfloat16 or
// of floats; all uses have one plan.
extern "C" void timbre_circulant_spectra(
    const Uses<FourierPlan> *all, const void *x, int64_t is_narrow, int64_t rows, int64_t in, float *z, int threads
) {
    const Terms<FourierPlan> own(*all, rows);
    if (own.rows() == 0) return;
    threads = all->threads(rows, threads);
    if (is_narrow) spectra_of(own, static_cast<const BFloat16 *>(x), in, z, threads);
    else spectra_of(own, static_cast<const float *>(x), in, z, threads);
}
PLAYED(timbre_circulant_spectra)

constexpr int ROWS = 4;  // That read an adapter's spectra together.
constexpr int AHEAD = ROWS;  // Pieces, whose spectra are on their way from memory.

static inline Wide reals_of(Wide complex) {
    WideIntegers order;
    for (int i = 0; i < WIDTH; i++) order[i] = i / 2 * 2;
    return picked(complex, complex, order);
}

static inline Wide imaginaries_of(Wide complex) {
    WideIntegers order;
    for (int i = 0; i < WIDTH; i++) order[i] = i / 2 * 2 + 1;
    return picked(complex, complex, order);
}

static inline Wide times_i(Wide complex) {
    WideIntegers order;
    for (int i = 0; i < WIDTH; i++) order[i] = i ^ 1;
    Wide sign;
    for (int i = 0; i < WIDTH; i++) sign[i] = i % 2 ? 1 : -1;
    return picked(complex, complex, order) * sign;
}

// Where a member's spectra lie: short ones of several pieces in one register.
struct Spectra {
    int64_t size, pieces;
    int64_t together = std::max(WIDTH / size, int64_t(1));

    int64_t floats() const { return pieces * size; }
    int64_t padded() const { return (size + WIDTH - 1) / WIDTH * WIDTH; }

    // What lies together as one.
    Wide folded(Wide each) const {
        float numbers[2 * WIDTH] = {};
        put(each, numbers);
        Wide sum = {};
        for (int64_t n = 0; n < together; n++) sum += wide(numbers + n * size);
        return sum;
    }
};

// What follows a piece is read with it, as far as it is there, and comes to numbers that nobody reads.
static inline Wide read(const float *from, const float *end) {
    if (end - from >= WIDTH) return wide(from);
    Wide found = {};
    std::memcpy(&found, from, (end - from) * sizeof(float));
    return found;
}

// h[r] += weight sum_n g[n] z[r, n] for N rows; asks for what is read `soon`.
template <int N>
static void add_products(
    const Spectra &own, const float *g, const float *end, const float *soon, const float *const *z,
    const float *weights, float *h
) {
    for (int64_t i = 0; i < own.size; i += WIDTH) {
        Wide straight[N] = {}, across[N] = {};
        const auto add = [&](int64_t n) {
            const int64_t place = n * own.size + i;
            __builtin_prefetch(soon + place, 0, 2);
            const Wide factor = read(g + place, end);
            for (int r = 0; r < N; r++) {
                const Wide numbers = wide(z[r] + place);
                straight[r] += reals_of(numbers) * factor;
                across[r] += imaginaries_of(numbers) * factor;
            }
        };
        int64_t n = 0;
        for (; n + own.together <= own.pieces; n += own.together) add(n);
        if (own.together > 1) {
            for (int r = 0; r < N; r++) straight[r] = own.folded(straight[r]), across[r] = own.folded(across[r]);
            for (; n < own.pieces; n++) add(n);
        }
        for (int r = 0; r < N; r++) {
            float *to = h + r * own.padded() + i;
            put(wide(to) + weights[r] * (straight[r] + times_i(across[r])), to);
        }
    }
}

// A piece of the output of a row, which is counted among those in use.
struct Piece {
    int64_t row, number;
};

// Pieces that lie side by side, and those that come next: of as many rows as there are lanes all first ones, then all
// second ones.
struct Pieces {
    int64_t count;
    Piece own[MOST_ROWS + AHEAD];

    // From number `first` on, of so many rows that have `each`; it has a whole number of registers before it.
    Pieces(int64_t rows, int64_t each, int64_t first) : count(std::min(rows * each - first, int64_t(WIDTH))) {
        const int64_t begin = first / (WIDTH * each) * WIDTH, beside = std::min(rows - begin, int64_t(WIDTH));
        int64_t row = (first - begin * each) % beside, number = (first - begin * each) / beside;
        for (int64_t n = 0; n < count + AHEAD; n++) {
            own[n] = {begin + row, std::min(number, each - 1)};
            if (++row == beside) row = 0, number++;
        }
    }

    const Piece &operator[](int64_t n) const { return own[n]; }
};

// h [pieces, padded]: the spectra of their changes, with what the transforms leave out.
static void products(
    const Spectra &layout, const Terms<Circulant> &own, const Pieces &pieces, int64_t each, const float *z, float *h
) {
    std::fill_n(h, pieces.count * layout.padded(), 0.0f);
    const float scale = 1.0f / (2 * own.all[0].part->plan->length());
    const auto add = [&](auto rows, int64_t n) {
        const int64_t row = pieces[n].row, terms = own.begins[row + 1] - own.begins[row];
        const float *soon = own.all[own.begins[pieces[n + AHEAD].row]].part->spectra;
        for (int64_t t = 0; t < terms; t++) {
            const float *g = own.all[own.begins[row] + t].part->spectra, *from[rows];
            float weights[rows];
            for (int r = 0; r < rows; r++) {
                const Term<Circulant> &term = own.all[own.begins[row + r] + t];
                from[r] = z + term.row * layout.floats();
                weights[r] = term.weight * scale;
            }
            add_products<rows>(
                layout, g + pieces[n].number * layout.floats(), g + each * layout.floats(),
                soon + pieces[n + AHEAD].number * layout.floats(), from, weights, h + n * layout.padded()
            );
        }
    };
    for (int64_t n = 0; n < pieces.count;) {
        const auto is_alike = [&](const Piece &piece) {
            return piece.number == pieces[n].number && own.are_alike(piece.row, pieces[n].row);
        };
        int64_t alike = 1;
        while (alike < ROWS && n + alike < pieces.count && is_alike(pieces[n + alike])) alike++;
        if (alike == ROWS) add(std::integral_constant<int, ROWS>(), n), n += ROWS;
        else add(std::integral_constant<int, 1>(), n), n++;
    }
}

// y [rows, out] is contiguous; z is what `timbre_circulant_spectra` made. All uses have one plan.
extern "C" void timbre_circulant(
    const Uses<Circulant> *all, const float *z, int64_t rows, float *y, int64_t out, int threads
) {
    const Terms<Circulant> own(*all, rows);
    if (own.rows() == 0) return;
    const FourierPlan &plan = *own.all[0].part->plan;
    const int64_t length = plan.length();
    const Spectra layout = {size_of(plan), own.all[0].part->in_pieces};
    const int64_t each = out / length, all_pieces = own.rows() * each;
    threads = all->threads(rows, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        thread_local Scratch memory;
        const auto change = [&](const Pieces &pieces, auto lanes) {
            typedef decltype(lanes) V;
            const int64_t count = pieces.count, size = layout.size;
            float *h = memory.of(layout.padded() * WIDTH + (size + 4 * plan.m) * SIDE<V>);
            float *X = h + layout.padded() * WIDTH;
            products(layout, own, pieces, each, z, h);
            const float *from[MOST_ROWS];
            float *to[MOST_ROWS];
            for (int64_t n = 0; n < count; n++) from[n] = h + n * layout.padded();
            put_side_by_side<V>(from, count, size, X);
            Complex<V> *spectra = reinterpret_cast<Complex<V> *>(X);
            const V *numbers = rows_of_spectra(plan, spectra, spectra + plan.frequencies());
            for (int64_t n = 0; n < count; n++)
                to[n] = y + own.row(pieces[n].row) * out + pieces[n].number * length;
            add_to_rows<V>(reinterpret_cast<const float *>(numbers), to, count, length);
        };
#pragma omp for schedule(static)
        for (int64_t first = 0; first < all_pieces; first += WIDTH) {
            const Pieces pieces(own.rows(), each, first);
            in_registers(pieces.count, [&](auto lanes) { change(pieces, lanes); });
        }
    }
}
PLAYED(timbre_circulant)
