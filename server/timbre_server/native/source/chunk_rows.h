// Rows of chunks, which the matrix unit may multiply, apart from all others.
#pragma once

#include <algorithm>
#include <deque>

#include "tiled_rows.h"

// Uses by rows of chunks whose part `may` be multiplied so, and by all others. A row's uses keep their order among
// those of their kind.
template <typename Part> struct Parted {
    std::vector<Use<Part>> tiled, others;

    template <typename May> Parted(std::vector<Use<Part>> uses, const uint8_t *in_chunks, May may) {
        if (!in_chunks || !may_use_matrix_unit()) {
            others = std::move(uses);
            return;
        }
        for (const Use<Part> &use : uses)
            if (may(*use.part)) part(use, in_chunks);
            else others.push_back(use);
    }

  private:
    struct Some {
        std::vector<int64_t> rows;
        std::vector<float> weights;
        Rows own;
    };

    std::deque<Some> some;

    void part(const Use<Part> &use, const uint8_t *in_chunks) {
        const auto &[rows, weights, count] = *use.rows;
        const int64_t tiles = std::count_if(rows, rows + count, [&](int64_t row) { return in_chunks[row]; });
        if (tiles == count) return tiled.push_back(use);
        if (!tiles) return others.push_back(use);
        for (bool is_tiled : {true, false}) {
            Some &own = some.emplace_back();
            for (int64_t n = 0; n < count; n++)
                if (bool(in_chunks[rows[n]]) == is_tiled) {
                    own.rows.push_back(rows[n]);
                    own.weights.push_back(weights[n]);
                }
            own.own = {own.rows.data(), own.weights.data(), int64_t(own.rows.size())};
            (is_tiled ? tiled : others).push_back({use.part, &own.own});
        }
    }
};

#ifdef HAS_MATRIX_UNIT
constexpr Asked NEAR = {nullptr, -1};

// A number as the pair of two of bfloat16 whose sum it nearly is: its relative error is 2^-16 at most.
static inline WideBits paired(Wide z) {
    const WideBits first = rounded_to_bfloat16((WideBits)z);
    return first | rounded_to_bfloat16((WideBits)(z - (Wide)(first << 16))) << 16;
}

// Numbers to multiply pairs with: each twice.
static inline WideBits twice(WideHalves numbers) {
    const WideBits each = __builtin_convertvector(numbers, WideBits);
    return each | each << 16;
}
#endif
