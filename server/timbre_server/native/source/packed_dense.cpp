// y[row] += weight Δ x[row], for adapters with a Δ of their own in panels of bfloat16 (`linear.cpp`), which x is rounded
// to.
#include "matrices.h"

// x [rows, in] and y [rows, out] are contiguous.
extern "C" void timbre_packed_dense(
    const Uses<Matrix> *all, const float *x, int64_t rows, int64_t in, float *y, int64_t out, int threads
) {
    threads = all->threads(rows, threads);
    std::vector<Product> products;
    for (const auto &use : all->with_rows()) {
        products.clear();
        for (int64_t n = 0; n < use.rows->count; n++) {
            const int64_t row = use.rows->rows[n];
            products.push_back({use.part, use.rows->weights[n], nullptr, x + row * in, nullptr, y + row * out});
        }
        multiply_in_order(products, threads);
    }
}
PLAYED(timbre_packed_dense)
