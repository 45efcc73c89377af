// What one call of attention is given, and what its kernels share.
#pragma once

#include "lanes.h"

// Rows first_row .. are at positions start ..; every position up to the last row's has a slot.
struct Sequence {
    int64_t first_row, num_rows, start;
    const int64_t *slots;
};

// [row, head, dim], where the numbers of one head lie side by side.
struct Heads {
    const void *first;
    int64_t row_stride, head_stride;

    template <class Number> const Number *at(int64_t row, int64_t head) const {
        return static_cast<const Number *>(first) + row * row_stride + head * head_stride;
    }
};

struct StepRows {
    const Sequence *singles, *chunks;  // Sequences with one row, and with several.
    int64_t num_singles, num_chunks;
    const int64_t *slots;  // Of all rows.
    int64_t num_rows;
};

struct Attention {
    const StepRows *rows;
    Heads q, k, v;
    void *keys, *values, *out;  // Contiguous: [slot, KV head, dim] and [row, head, value_dim].
    int64_t kv_heads, group, key_dim, value_dim;  // Dims are multiples of LANES.
    int64_t window;  // Keys that a row sees, its own included.
    int64_t least_pairs;  // Of rows and keys, for which more than one thread is worth waking.
    float scale;

    int64_t pairs() const {
        int64_t found = 0;
        for (int64_t s = 0; s < rows->num_singles; s++) found += rows->singles[s].start + 1;
        for (const Sequence *own = rows->chunks; own < rows->chunks + rows->num_chunks; own++)
            found += own->num_rows * (own->start + own->num_rows);
        return found;
    }

    int64_t lowest_seen(int64_t position) const { return position < window ? 0 : position - window + 1; }
};
