// y[row] += weight Σ_n outer_n ∘ Q_n (core_n (P_n (inner_n ∘ x[row]))), for adapters whose P and Q are shared.
//
// A sum has the same terms in the same order whatever other rows and adapters there are.
#include <deque>

#include "matrices.h"
#include "sparse.h"

constexpr int64_t DIAGONAL = 0, DENSE = 1, SLICES = 2;

// All blocks of P are one matrix, as are those of Q; but where inner vectors come before P, or outer ones after Q, it
// is one block that all have in common. A core that is not diagonal has one block, and no vectors.
struct Projected {
    Matrix p, q;
    const void *core;    // [blocks, size], [columns of Q, rows of P], or Slices
    const float *inner;  // [blocks, in], or null
    const float *outer;  // [blocks, out], or null
    int64_t blocks, size;
    int64_t form;

    const float *numbers() const { return static_cast<const float *>(core); }
};

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

// Cores other than diagonal ones that have P and Q in common. What all of them make of a row is summed before Q.
class Cores {
  public:
    Cores(const Projected &part, const float *z, int64_t rows)
        : part(part), z(z), rows(rows), h(rows * part.q.columns), is_used(rows) {}

    bool are_of(const Projected &other) const { return part.p == other.p && part.q == other.q; }

    void add(const Use<Projected> &use, std::vector<Product> &products) {
        for (int64_t n = 0; n < use.rows->count; n++) is_used[use.rows->rows[n]] = true;
        if (use.part->form == SLICES) {
            sparse.push_back({static_cast<const Slices *>(use.part->core), use.rows});
            return;
        }
        dense.push_back({use.part->numbers(), part.q.columns, part.p.rows, part.p.rows});
        for (int64_t n = 0; n < use.rows->count; n++) {
            const int64_t row = use.rows->rows[n];
            const float *from = z + row * part.p.rows;
            products.push_back({&dense.back(), use.rows->weights[n], nullptr, from, nullptr, of(row)});
        }
    }

    void multiply_sparse(int threads) {
        if (sparse.empty()) return;
        const Uses<Slices> uses = {sparse.data(), int64_t(sparse.size()), 0, nullptr};
        timbre_sparse(&uses, z, FLOAT32, rows, part.p.rows, h.data(), part.q.columns, threads);
    }

    void add_outs(float *y, int64_t out, std::vector<Product> &products) {
        for (int64_t row = 0; row < rows; row++)
            if (is_used[row]) products.push_back({&part.q, 1, nullptr, of(row), nullptr, y + row * out});
    }

  private:
    const Projected &part;
    const float *z;  // [rows, rows of P]
    int64_t rows;
    std::vector<float> h;  // [rows, columns of Q]
    std::vector<bool> is_used;
    std::deque<Matrix> dense;
    std::vector<Use<Slices>> sparse;

    float *of(int64_t row) { return h.data() + row * part.q.columns; }
};

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
    std::vector<Product> ins, within, outs;
    std::deque<Cores> cores;
    for (const auto &use : uses) {
        const Projected &part = *use.part;
        float *const first = part.inner ? nullptr : shrunk.of(part.p);
        if (part.form != DIAGONAL) {
            auto found = std::find_if(cores.begin(), cores.end(), [&](const Cores &known) { return known.are_of(part); });
            Cores &own_cores = found == cores.end() ? cores.emplace_back(part, first, rows) : *found;
            own_cores.add(use, within);
            continue;
        }
        const int64_t width = part.blocks * part.size;
        for (int64_t n = 0; n < use.rows->count; n++) {
            const int64_t row = use.rows->rows[n];
            const float weight = use.rows->weights[n];
            float *between = first ? first + row * width : next, *to = y + row * out;
            for (int64_t b = 0; part.inner && b < part.blocks; b++, next += part.size)
                ins.push_back({&part.p, 1, part.inner + b * in, z + row * in, nullptr, next});
            if (part.outer == nullptr) outs.push_back({&part.q, weight, part.numbers(), between, nullptr, to});
            for (int64_t b = 0; part.outer && b < part.blocks; b++) {
                const int64_t place = b * part.size;
                outs.push_back({&part.q, weight, part.numbers() + place, between + place, part.outer + b * out, to});
            }
        }
    }
    threads = all->threads(rows, threads);
    multiply_all(ins, threads);
    multiply_in_order(within, threads);  // Of adapters: these lie anywhere.
    for (Cores &own_cores : cores) {
        own_cores.multiply_sparse(threads);
        own_cores.add_outs(y, out, outs);
    }
    multiply_all(outs, threads);
}
PLAYED(timbre_projected)
