// Sequences with several rows, cut into tiles: what keys, queries and their products are in each arithmetic.
#pragma once

#include <algorithm>

#include "attention.h"
#include "wide.h"

constexpr int VECTORS = 3;
constexpr int QUERIES = VECTORS * WIDTH;

// `count` queries of a sequence and a KV head: the i-th of all is of row i / group and of head i % group.
struct Tile {
    const Attention *call;
    const Sequence *sequence;
    int64_t kv_head, first, count;

    // Of the query i; after the last one the last again.
    int64_t row_of(int64_t i) const { return (first + std::min(i, count - 1)) / call->group; }
    int64_t head_of(int64_t i) const { return kv_head * call->group + (first + i) % call->group; }
    int64_t position_of(int64_t i) const { return sequence->start + row_of(i); }
    int64_t last() const { return position_of(count - 1); }
    int64_t lowest_seen() const { return call->lowest_seen(position_of(0)); }

    template <class Number> const Number *query(int64_t i) const {
        return call->q.at<Number>(sequence->first_row + row_of(i), head_of(i));
    }
    template <class Number> const Number *key(int64_t position) const {
        return at<Number>(call->keys, call->key_dim, position);
    }
    template <class Number> const Number *value(int64_t position) const {
        return at<Number>(call->values, call->value_dim, position);
    }

  private:
    template <class Number> const Number *at(const void *pool, int64_t dim, int64_t position) const {
        return static_cast<const Number *>(pool) + (sequence->slots[position] * call->kv_heads + kv_head) * dim;
    }
};
